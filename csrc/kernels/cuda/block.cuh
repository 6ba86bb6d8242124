// SPDX-License-Identifier: BSD-3-Clause
// What the kernels share: 16-byte pieces of a row, number formats, reductions, launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <set>
#include <type_traits>
#include <utility>

#include "kernels/args.h"
#include "kernels/cuda/backend.h"
#include "kernels/half.h"

#define ML_FN __device__ __forceinline__

namespace masked_loss::cuda {

constexpr int kWarp = 32;

// A kernel's dynamic shared memory.
extern __shared__ uint4 shared_memory[];

// Launching

inline int attribute(cudaDeviceAttr name) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&value, name, device));
  return value;
}

// Above 48 KB, what the kernel itself declares included, shared memory must be asked for. Once for
// all, and as much as there is: a limit that followed each launch would be moved by one thread
// between another's limit and launch.
inline void allow_shared(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  int device = 0;
  check(cudaGetDevice(&device));
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device})) return;
  cudaFuncAttributes own{};
  check(cudaFuncGetAttributes(&own, kernel));
  const int most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             most - static_cast<int>(own.sharedSizeBytes)));
  allowed.insert({kernel, device});
}

// Kernels loop over whatever is beyond the largest grid.
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), int64_t blocks, int threads, int64_t shared, Stream stream,
            const Args&... args) {
  constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;
  if (blocks == 0) return;
  if (shared > 0) allow_shared(reinterpret_cast<const void*>(kernel));
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(std::min(blocks, kMaxBlocks)));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = static_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernel, args...));
  check(cudaGetLastError());
}

// Numbers

ML_FN float widen(float x) { return x; }
ML_FN double widen(double x) { return x; }
ML_FN float widen(BFloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
ML_FN float widen(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }

ML_FN void narrow(float x, float* out) { *out = x; }
ML_FN void narrow(double x, double* out) { *out = x; }
ML_FN void narrow(float x, BFloat16* out) {
  out->bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
ML_FN void narrow(float x, Float16* out) { out->bits = __half_as_ushort(__float2half_rn(x)); }

template <class T>
struct Accumulation {
  using Type = float;
};
template <>
struct Accumulation<double> {
  using Type = double;
};

ML_FN int64_t index_at(const void* target, DType type, int64_t i) {
  return type == DType::kInt64 ? static_cast<const int64_t*>(target)[i]
                               : static_cast<const int32_t*>(target)[i];
}

// A 64-bit division takes a hundred instructions, and most numbers are small.
ML_FN int64_t quotient(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

// x, of which the compiler knows nothing: what is computed from it is computed anew.
ML_FN int64_t forgotten(int64_t x) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+l"(x));
#endif
  return x;
}

// Pieces: the aligned 16 bytes that one instruction moves.

template <class T>
constexpr int kLanes = 16 / static_cast<int>(sizeof(T));

template <class T>
ML_FN uint4 minus_infinities();
template <>
ML_FN uint4 minus_infinities<double>() {
  return {0, 0xfff00000u, 0, 0xfff00000u};
}
template <>
ML_FN uint4 minus_infinities<float>() {
  return {0xff800000u, 0xff800000u, 0xff800000u, 0xff800000u};
}
template <>
ML_FN uint4 minus_infinities<BFloat16>() {
  return {0xff80ff80u, 0xff80ff80u, 0xff80ff80u, 0xff80ff80u};
}
template <>
ML_FN uint4 minus_infinities<Float16>() {
  return {0xfc00fc00u, 0xfc00fc00u, 0xfc00fc00u, 0xfc00fc00u};
}

ML_FN void unpack(const uint4& piece, double* y, double) { memcpy(y, &piece, 16); }
ML_FN void unpack(const uint4& piece, float* y, float) { memcpy(y, &piece, 16); }
ML_FN void unpack(const uint4& piece, float* y, BFloat16) {
  const uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    y[2 * i] = __uint_as_float(words[i] << 16);
    y[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}
ML_FN void unpack(const uint4& piece, float* y, Float16) {
  const uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    y[2 * i] = __half2float(__ushort_as_half(static_cast<unsigned short>(words[i])));
    y[2 * i + 1] = __half2float(__ushort_as_half(static_cast<unsigned short>(words[i] >> 16)));
  }
}

ML_FN uint4 pack(const double* y, double) {
  uint4 piece;
  memcpy(&piece, y, 16);
  return piece;
}
ML_FN uint4 pack(const float* y, float) {
  uint4 piece;
  memcpy(&piece, y, 16);
  return piece;
}
ML_FN uint4 pack(const float* y, BFloat16) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(y[2 * i], y[2 * i + 1]);
    memcpy(&words[i], &pair, 4);
  }
  return {words[0], words[1], words[2], words[3]};
}
ML_FN uint4 pack(const float* y, Float16) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __half2 pair = __floats2half2_rn(y[2 * i], y[2 * i + 1]);
    memcpy(&words[i], &pair, 4);
  }
  return {words[0], words[1], words[2], words[3]};
}

// 16 bytes from `bytes` (1 to 15) after the beginning of two neighbouring pieces.
ML_FN uint4 between(const uint4& a, const uint4& b, int bytes) {
  uint32_t w[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
  if (bytes & 8) {
#pragma unroll
    for (int i = 0; i < 6; ++i) w[i] = w[i + 2];
  }
  if (bytes & 4) {
#pragma unroll
    for (int i = 0; i < 5; ++i) w[i] = w[i + 1];
  }
  const unsigned bits = (bytes & 3) * 8;
  return {__funnelshift_r(w[0], w[1], bits), __funnelshift_r(w[1], w[2], bits),
          __funnelshift_r(w[2], w[3], bits), __funnelshift_r(w[3], w[4], bits)};
}

// Elements [0, n) at p: `head` single ones, `pieces` aligned pieces, and the rest single again.
template <class T>
struct Span {
  int head, pieces;
  const uint4* first;

  ML_FN Span(const T* p, int n) {
    const int misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(p) % 16);
    head = min(misaligned ? (16 - misaligned) / static_cast<int>(sizeof(T)) : 0, n);
    pieces = (n - head) / kLanes<T>;
    first = reinterpret_cast<const uint4*>(p + head);
  }
  ML_FN int tail() const { return head + pieces * kLanes<T>; }
};

// Reductions. The order is fixed, so a result has the same bits in every run.

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
ML_FN S from_first_lane(const S& s) {
  return shuffle_words(s, [](uint32_t w) { return __shfl_sync(~0u, w, 0); });
}

// Lanes need no word with each other before their states are added.
struct NoAlign {
  template <int kLaneCount, class S>
  ML_FN void lanes(S*) const {}
};

template <int kLaneCount, class S, class Align>
ML_FN void merge_lanes(S* s, const Align& align) {
  align.template lanes<kLaneCount>(s);
#pragma unroll
  for (int mask = kLaneCount / 2; mask > 0; mask /= 2) s->add(from_lane_xor(*s, mask));
}

// Merges the states of a team, which is one warp or a block of at most kWarps; all get the result.
// Another barrier must come before the next merge.
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

}  // namespace masked_loss::cuda
