// SPDX-License-Identifier: BSD-3-Clause
// What the threads of a warp or of a block add up together. The order is fixed, so a result has the
// same bits in every run.
#pragma once

#include <cstring>

#include "kernels/cuda/numbers.cuh"

namespace masked_loss::cuda {

constexpr int kWarp = 32;

template <class S, class Shuffle>
ML_FN S shuffle_words(const S& s, const Shuffle& shuffle) {
  static_assert(sizeof(S) % 4 == 0, "whole words");
  uint32_t words[sizeof(S) / 4];
  memcpy(words, &s, sizeof(S));
#pragma unroll
  for (uint32_t& word : words) word = shuffle(word);
  S result = s;
  memcpy(&result, words, sizeof(S));
  return result;
}
template <class S>
ML_FN S from_lane_xor(const S& s, int mask) {
  return shuffle_words(s, [mask](uint32_t w) { return __shfl_xor_sync(~0u, w, mask); });
}
template <class S>
ML_FN S from_lane(const S& s, int lane) {
  return shuffle_words(s, [lane](uint32_t w) { return __shfl_sync(~0u, w, lane); });
}
template <class S>
ML_FN S from_first_lane(const S& s) {
  return from_lane(s, 0);
}

// Which of its block's teams a thread is in. The first lane says so: what depends on it, a row and
// all that belongs to it, is then known to be one for all lanes, and takes none of a thread's
// registers.
template <int kWarps>
ML_FN int team_of_block() {
  return from_first_lane(static_cast<int>(threadIdx.x) / (kWarps * kWarp));
}

// Plain sums need no common maximum before they are added.
struct NoAlign {
  template <int kLanes, class S>
  ML_FN void lanes(S*) const {}
};

template <int kLanes, class S, class Align>
ML_FN void merge_lanes(S* s, const Align& align) {
  align.template lanes<kLanes>(s);
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) s->add(from_lane_xor(*s, mask));
}

// Merges the states of a team, which is one warp or a block of at most kWarps; all get the result.
// Another barrier must come before the next merge of such states; another type's have slots of
// their own, and the barrier of its merge will do.
template <int kWarps, class S, class Align = NoAlign>
ML_FN S merge_team(S s, const Align& align = {}) {
  merge_lanes<kWarp>(&s, align);
  if constexpr (kWarps > 1) {
    __shared__ uint2 slots[kWarps * sizeof(S) / sizeof(uint2)];
    static_assert(sizeof(S) % sizeof(uint2) == 0, "whole slots");
    S* const states = reinterpret_cast<S*>(slots);
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    if (lane == 0) states[threadIdx.x / kWarp] = s;
    __syncthreads();
    if (lane * kWarp < static_cast<int>(blockDim.x)) {
      s = states[lane];
    } else {
      s = S();
    }
    merge_lanes<kWarps>(&s, align);
  } else {
    __syncwarp();  // orders what the lanes wrote, as the other barrier does
  }
  // Lanes beyond the warps of a block hold less: the first lane's result is everybody's.
  return from_first_lane(s);
}

template <int kWarps>
ML_FN void team_barrier() {
  if constexpr (kWarps > 1) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}

// Kernels of older architectures are never launched in clusters.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr bool kHasClusters = true;
#else
constexpr bool kHasClusters = false;
#endif

// Of all threads of a cluster's blocks: what they wrote before, all of them see behind it.
ML_FN void cluster_barrier() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
#endif
}

}  // namespace masked_loss::cuda
