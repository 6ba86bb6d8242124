// SPDX-License-Identifier: BSD-3-Clause
// Weights of tokens, and what each group's sums are multiplied by.
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/team.cuh"

// The assertions below must hold in every build.
#undef NDEBUG
#include <cassert>

namespace masked_loss::cuda {
namespace {

#include "kernels/cuda/functions.inl.cuh"
#include "kernels/groups.inl.h"
#include "kernels/math.inl.h"
#include "kernels/token.inl.h"
// clang-format off
#include "kernels/cuda/sums.inl.cuh"
// clang-format on

// A device has no better way to raise an error than to stop.
ML_FN void complain(const WeighArgs& args, int64_t bad) {
  const int64_t target = index_at(args.target, args.target_type, bad);
  printf("masked_loss: target of token %lld is %lld, expected 0 <= target < %lld\n",
         static_cast<long long>(quotient(bad, args.ids)), static_cast<long long>(target),
         static_cast<long long>(args.classes));
  assert(target >= 0 && target < args.classes);
}

ML_FN void check_bounds(const Groups& sequences) {
  for (int64_t g = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; g < sequences.count;
       g += int64_t{gridDim.x} * blockDim.x) {
    const int64_t begin = group_begin(sequences, g), end = group_end(sequences, g);
    if (begin <= end && (begin == 0 || g > 0)) continue;
    printf("masked_loss: cu_seqlens must ascend from 0 to at most %lld, got %lld, %lld\n",
           static_cast<long long>(sequences.tokens), static_cast<long long>(begin),
           static_cast<long long>(end));
    assert(begin <= end && (begin == 0 || g > 0));
  }
}

// A bit for each token of the batch that nothing predicts.
template <class Batch>
ML_FN unsigned left_out_of(const WeighArgs& args, const Batch& batch) {
  unsigned bits = 0;
  if (!args.skip_first && !args.sequences.count) return bits;
  batch.for_each_in_turn([&](int k, int64_t i) {
    const int64_t sequence = args.sequences.count ? group_of(args.sequences, i) : 0;
    bits |= unsigned{is_left_out(args, i, sequence)} << k;
  });
  return bits;
}

// Step by step, for all tokens of the batch; what is not there has no weight. *bad: where a target
// is out of range.
template <class A, int kSize>
ML_FN void weigh_batch(const WeighArgs& args, const Batch<kSize>& batch, int64_t* bad,
                       WeightSums* sums) {
  if (args.ids != 1) {
    const unsigned left_out = left_out_of(args, batch);
    batch.for_each_in_turn([&](int k, int64_t i) {
      const A mask = left_out >> k & 1 ? A(0) : mask_at<A>(args, i);
      const int64_t found = weigh_token(args, i, mask, sums);
      if (found >= 0) *bad = found;
    });
    return;
  }
  A weights[kSize];
  int64_t ids[kSize];
  batch.for_each_place([&](int k) {
    weights[k] = batch.has(k) && !args.mask;
    ids[k] = 0;
  });
  if (args.target && args.target_type == DType::kInt64) {
    batch.for_each([&](int k, int64_t i) { ids[k] = as<int64_t>(args.target)[i]; });
  } else if (args.target) {
    batch.for_each([&](int k, int64_t i) { ids[k] = as<int32_t>(args.target)[i]; });
  }
  if (args.mask) {
    with_numbers(args.mask, args.mask_type, [&](const auto* mask) {
      batch.for_each([&](int k, int64_t i) { weights[k] = static_cast<A>(number(mask[i])); });
    });
  }
  const unsigned left_out = left_out_of(args, batch);
  batch.for_each_place([&](int k) { weights[k] = left_out >> k & 1 ? A(0) : weights[k]; });
  if (args.target) {
    int found = -1;
    batch.for_each_place([&](int k) {
      const TokenWeight<A> t = token_weight(args, weights[k], ids[k]);
      weights[k] = t.weight;
      found = t.bad ? k : found;
    });
    if (found >= 0) *bad = batch[found];
  }
  if (args.class_weight) {
    A of_class[kSize];
    batch.for_each_place([&](int k) {
      of_class[k] = 0;
      if (weights[k] != 0) of_class[k] = class_weight<A>(args, ids[k]);
    });
    batch.for_each_place([&](int k) { add_class_weight(weights[k], of_class[k], sums); });
  }
  batch.for_each([&](int k, int64_t i) { static_cast<A*>(args.weight)[i] = weights[k]; });
  batch.for_each_place([&](int k) { add_weight(weights[k], sums); });
}

// Whether there are more fields of the sums than two.
ML_FN bool has_more(const WeighArgs& args) { return args.class_weight; }

template <class A>
ML_FN void weigh_pieces(const WeighArgs& args, const Pieces& pieces, WeightSums* parts) {
  check_bounds(args.sequences);
  if (args.normalizer) prefetch_line(args.normalizer);
  const auto ask = [&](const Piece& piece) {
    if (piece.end - piece.begin <= kBatch<A> * kWarp) return;  // one batch asks for all by itself
    if (args.mask) prefetch(args.mask, piece, size_of(args.mask_type));
    if (args.target) prefetch(args.target, piece, args.ids * size_of(args.target_type));
  };
  int64_t bad = -1;
  sum_pieces<kBatch<A>>(
      pieces, has_more(args), parts, ask,
      [&](const auto& batch, WeightSums* sums) { weigh_batch<A>(args, batch, &bad, sums); });
  if (bad >= 0) complain(args, bad);
}

using Active = Sums<1>;

// How many of a warp's groups have an active token.
ML_FN Active count_active(const WeightSums* parts, const Pieces& pieces, int64_t share,
                          int64_t shares) {
  Active count;
  for_each_group(parts, pieces, false, share, shares, [&](int64_t, const WeightSums& sums) {
    count.v[0] += sums.v[WeightField::kActive] > 0;
  });
  return count;
}

ML_FN void write_groups(const WeighArgs& args, const WeightSums* parts, const Pieces& pieces,
                        double active_groups, int64_t share, int64_t shares) {
  const int64_t field = threadIdx.x % kWarp;  // of the table, a lane each
  for_each_group(parts, pieces, has_more(args), share, shares,
                 [&](int64_t g, const WeightSums& sums) {
                   if (field < args.groups.columns)
                     write_group(args, sums, active_groups, g, field);
                 });
}
// All groups, by one block.
ML_FN void write_all_groups(const WeighArgs& args, const WeightSums* parts, const Pieces& pieces) {
  Active active;
  if (args.reduction == Reduction::kSequenceMean) {
    active = count_active(parts, pieces, 0, 1);
    merge_block(&active, true);
  }
  write_groups(args, parts, pieces, active.v[0], 0, 1);
}

template <class A>
__global__ void __launch_bounds__(kThreads, 1)
    weigh_alone_kernel(const WeighArgs args, const Pieces pieces) {
  WeightSums* const parts = parts_alone<WeightSums>();
  weigh_pieces<A>(args, pieces, parts);
  __syncthreads();  // the pieces of other warps
  write_all_groups(args, parts, pieces);
}

template <class A>
__global__ void __launch_bounds__(kThreads, 1)
    weigh_kernel(const WeighArgs args, const Pieces pieces, WeightSums* parts) {
  weigh_pieces<A>(args, pieces, parts);
}
__global__ void __launch_bounds__(kThreads, 1)
    write_all_groups_kernel(const WeighArgs args, const Pieces pieces, const WeightSums* parts) {
  write_all_groups(args, parts, pieces);
}
__global__ void __launch_bounds__(kThreads, 1)
    count_groups_kernel(const Pieces pieces, const WeightSums* parts, Active* active,
                        int64_t shares) {
  sum_shares<Active>(
      shares, true,
      [&](int64_t share, Active* count) { *count = count_active(parts, pieces, share, shares); },
      [&](int64_t share, const Active& count) { active[share] = count; });
}
// active: null where the scales do not depend on it.
__global__ void __launch_bounds__(kThreads, 1)
    write_groups_kernel(const WeighArgs args, const Pieces pieces, const WeightSums* parts,
                        const Active* active, int64_t shares) {
  const double active_groups = active ? sum_found(active, shares, true).v[0] : 0;
  write_groups(args, parts, pieces, active_groups, blockIdx.x, gridDim.x);
}

}  // namespace

int64_t scratch_bytes(const WeighArgs& args) {
  return scratch_for<WeightSums, Active>(args.groups, args.ids);
}

int64_t weigh(const WeighArgs& args, Stream stream) {
  const auto [alone, pieces] = cut(args.groups, args.ids);
  if (alone) {
    launch_alone(args.wide ? weigh_alone_kernel<double> : weigh_alone_kernel<float>, args, pieces,
                 stream);
    return -1;
  }
  const auto [parts, active] = scratch_at<WeightSums, Active>(args.scratch, pieces);
  launch_pieces(args.wide ? weigh_kernel<double> : weigh_kernel<float>, args, pieces, parts,
                stream);
  const auto [shares, threads] = share(args.groups.count);
  if (shares == 1) {
    launch(write_all_groups_kernel, 1, threads, 0, stream, args, pieces, parts);
    return -1;
  }
  const bool counts = args.reduction == Reduction::kSequenceMean;
  if (counts) {
    launch(count_groups_kernel, shares, threads, 0, stream, pieces, parts, active, shares);
  }
  launch(write_groups_kernel, shares, threads, 0, stream, args, pieces, parts,
         counts ? active : nullptr, shares);
  return -1;
}

}  // namespace masked_loss::cuda
