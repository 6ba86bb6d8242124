// SPDX-License-Identifier: BSD-3-Clause
// From the token table to the loss, its groups' means and the statistics.
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/team.cuh"

namespace masked_loss::cuda {
namespace {

#include "kernels/cuda/functions.inl.cuh"
#include "kernels/groups.inl.h"
#include "kernels/math.inl.h"
#include "kernels/token.inl.h"
// clang-format off
#include "kernels/cuda/sums.inl.cuh"
// clang-format on

// Registers have no index: the first of some numbers is used, and the others move up.
template <class A, int kSize>
ML_FN void move_up(A (&numbers)[kSize]) {
#pragma unroll
  for (int i = 0; i + 1 < kSize; ++i) numbers[i] = numbers[i + 1];
}

template <class A, int kSize>
ML_FN void reduce_batch(const ReduceArgs& args, const Batch<kSize>& batch, LossSums* sums) {
  const A* const table = as<A>(args.table) + batch.first;
  A weights[kSize];
  batch.for_each_place([&](int k) {
    weights[k] = 0;
    if (batch.has(k)) weights[k] = table[TokenField::kWeight * args.groups.tokens + k * kWarp];
  });
  // Of a masked token `instead`: nobody wrote what the table has there.
  const auto read = [&](int64_t field, A(&numbers)[kSize], A instead = 0) {
    batch.for_each_place([&](int k) {
      numbers[k] = instead;
      if (weights[k] != 0) numbers[k] = table[field * args.groups.tokens + k * kWarp];
    });
  };
  A losses[kSize];
  read(TokenField::kLoss, losses);
  if (args.stats) {
    A correct[kSize], entropies[kSize];
    read(TokenField::kCorrect, correct);
    read(TokenField::kEntropy, entropies);
    batch.for_each_place(
        [&](int k) { add_statistics(weights[k], correct[k], entropies[k], sums); });
  }
  if (args.z_loss != 0) {
    A tops[kSize], totals[kSize];
    read(TokenField::kTop, tops);
    read(TokenField::kSum, totals, A(1));
    // In turn: a copy of the logarithm for each would have to be fetched, for one use.
    batch.for_each_in_turn([&](int, int64_t i) {
      const double z = weights[0] * z_term<double>(tops[0], totals[0], args.z_loss);
      sums->v[LossField::kZ] += z;
      write_token_loss<A>(args, i, add_loss(weights[0], losses[0], sums) + z);
      move_up(weights), move_up(losses), move_up(tops), move_up(totals);
    });
  } else if (args.reduction == Reduction::kNone) {
    batch.for_each([&](int k, int64_t i) {
      write_token_loss<A>(args, i, add_loss(weights[k], losses[k], sums));
    });
  } else {
    batch.for_each_place([&](int k) { add_loss(weights[k], losses[k], sums); });
  }
}

// Whether there are more fields of the sums than two.
ML_FN bool has_more(const ReduceArgs& args) { return args.stats; }

template <class A>
ML_FN void reduce_pieces(const ReduceArgs& args, const Pieces& pieces, LossSums* parts) {
  // All at once, before it is known which tokens are masked.
  const auto ask = [&](const Piece& piece) {
    const auto column = [&](int64_t field) {
      prefetch(as<A>(args.table) + field * args.groups.tokens, piece, sizeof(A));
    };
    column(TokenField::kWeight);
    column(TokenField::kLoss);
    if (args.z_loss != 0) {
      column(TokenField::kTop);
      column(TokenField::kSum);
    }
    if (args.stats) {
      column(TokenField::kCorrect);
      column(TokenField::kEntropy);
    }
  };
  sum_pieces<kBatch<A>>(pieces, has_more(args), parts, ask, [&](const auto& batch, LossSums* sums) {
    reduce_batch<A>(args, batch, sums);
  });
}

// Adds up the groups of a share: losses as they enter the result, statistics as they are. The first
// lanes get it.
template <class A>
ML_FN void add_groups(const ReduceArgs& args, const LossSums* parts, const Pieces& pieces,
                      int64_t share, int64_t shares, LossSums* total) {
  for_each_group(parts, pieces, has_more(args), share, shares, [&](int64_t g, LossSums sums) {
    if (threadIdx.x % kWarp == 0) sums.v[LossField::kLoss] = group_loss<A>(args, sums, g);
    total->add(sums);
  });
}

template <class A>
__global__ void __launch_bounds__(kThreads, 1)
    reduce_alone_kernel(const ReduceArgs args, const Pieces pieces) {
  const Groups& groups = args.groups;
  if (threadIdx.x < groups.count) prefetch_line(group_at(groups, threadIdx.x));
  LossSums* const parts = parts_alone<LossSums>();
  reduce_pieces<A>(args, pieces, parts);
  __syncthreads();  // the pieces of other warps
  LossSums total;
  add_groups<A>(args, parts, pieces, 0, 1, &total);
  if (groups.count > 1) merge_block(&total, has_more(args));
  if (threadIdx.x == 0) write_loss<A>(args, total);
}

template <class A>
__global__ void __launch_bounds__(kThreads, 1)
    reduce_kernel(const ReduceArgs args, const Pieces pieces, LossSums* parts) {
  reduce_pieces<A>(args, pieces, parts);
}
// found[share] = the groups of each share; where there is one share, the loss.
template <class A>
__global__ void __launch_bounds__(kThreads, 1)
    reduce_groups_kernel(const ReduceArgs args, const Pieces pieces, const LossSums* parts,
                         LossSums* found, int64_t shares) {
  sum_shares<LossSums>(
      shares, has_more(args),
      [&](int64_t share, LossSums* total) {
        add_groups<A>(args, parts, pieces, share, shares, total);
      },
      [&](int64_t share, const LossSums& total) {
        if (shares == 1) {
          write_loss<A>(args, total);
        } else {
          found[share] = total;
        }
      });
}
template <class A>
__global__ void __launch_bounds__(kWarp)
    write_loss_kernel(const ReduceArgs args, const LossSums* found, int64_t shares) {
  const LossSums total = sum_found(found, shares, has_more(args));
  if (threadIdx.x == 0) write_loss<A>(args, total);
}

}  // namespace

int64_t scratch_bytes(const ReduceArgs& args) {
  return scratch_for<LossSums, LossSums>(args.groups, 1);
}

void reduce(const ReduceArgs& args, Stream stream) {
  const auto [alone, pieces] = cut(args.groups, 1);
  if (alone) {
    return launch_alone(args.wide ? reduce_alone_kernel<double> : reduce_alone_kernel<float>, args,
                        pieces, stream);
  }
  const auto [parts, found] = scratch_at<LossSums, LossSums>(args.scratch, pieces);
  launch_pieces(args.wide ? reduce_kernel<double> : reduce_kernel<float>, args, pieces, parts,
                stream);
  const auto [shares, threads] = share(args.groups.count);
  launch(args.wide ? reduce_groups_kernel<double> : reduce_groups_kernel<float>, shares, threads, 0,
         stream, args, pieces, parts, found, shares);
  if (shares > 1) {
    launch(args.wide ? write_loss_kernel<double> : write_loss_kernel<float>, 1, kWarp, 0, stream,
           args, found, shares);
  }
}

}  // namespace masked_loss::cuda
