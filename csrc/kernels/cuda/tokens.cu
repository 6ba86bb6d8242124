// SPDX-License-Identifier: BSD-3-Clause
// Who loops over the tokens on CUDA: a team takes a piece of a group, a warp adds up the pieces of
// a group, and blocks share the groups. No atomics: the same bits in every run.
//
// Up to 8192 tokens one block does everything, in one launch. Beyond, a piece of up to 2048 tokens
// has a block for itself, since more in one block would wait for memory time and again, and longer
// than a second launch takes; where groups are short, a warp is enough.
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

constexpr int kThreads = 1024;  // of a block that sums, or fewer
constexpr int kWarps = kThreads / kWarp;
constexpr int kTokenThreads = 256;  // of a block that works token by token
constexpr int64_t kPiece = 2048;
constexpr int64_t kShort = 256;  // tokens of a piece, on average, that a warp is enough for
// Blocks that share the groups, at most: one block adds up what all of them found.
constexpr int64_t kGroupBlocks = 1024;
// What one block does alone: each of its warps has a few pieces and groups.
constexpr int64_t kAlone = 8192;
constexpr int kPiecesAlone = 2 * kWarps;

// f(i) for every i, a thread each, in any order.
template <class F>
ML_FN void for_each(int64_t count, const F& f) {
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    f(i);
  }
}

// The token as a piece by itself.
ML_FN Piece piece_at(const Groups& groups, int64_t token) {
  return {group_of(groups, token), token, token + 1};
}

// parts[p] = the sum of what add(i, &sums) adds for every token i of piece p, which one team takes.
// A team is a block, or with kTeams a warp.
template <int kTeams, class S, class Add>
ML_FN void sum_pieces(const Pieces& pieces, S* parts, const Add& add) {
  const int team = kTeams > 1 ? threadIdx.x / kWarp : 0;
  const int size = kTeams > 1 ? kWarp : blockDim.x;
  const int lane = static_cast<int>(threadIdx.x) - team * size;
  for (int64_t p = int64_t{blockIdx.x} * kTeams + team; p < pieces.count;
       p += int64_t{gridDim.x} * kTeams) {
    const Piece piece = pieces[p];
    S sums;
    for (int64_t i = piece.begin + lane; i < piece.end; i += size) add(i, &sums);
    sums = merge_team<kTeams == 1 ? kWarps : 1>(sums);
    if (lane == 0) parts[p] = sums;
    team_barrier<kTeams == 1 ? kWarps : 1>();
  }
}

// One warp's sum over the pieces of a group; all lanes get it.
template <class S>
ML_FN S sum_group(const void* parts, const Pieces& pieces, int64_t group) {
  const int64_t first = pieces.first_of(group), end = first + pieces.number_of(group);
  S sums;
  for (int64_t p = first + threadIdx.x % kWarp; p < end; p += kWarp) sums.add(as<S>(parts)[p]);
  merge_lanes<kWarp>(&sums, NoAlign{});
  return from_first_lane(sums);
}

// Where a block alone keeps what its pieces found.
template <class S>
ML_FN S* parts_alone() {
  __shared__ uint2 slots[kPiecesAlone * sizeof(S) / sizeof(uint2)];
  return reinterpret_cast<S*>(slots);
}

// Asks for all that a block will read of an array: it would wait for memory at each of its tokens.
ML_FN void prefetch(const void* p, int64_t bytes) {
  constexpr int64_t kLine = 128;
  for (int64_t at = threadIdx.x * kLine; p && at < bytes; at += blockDim.x * kLine) {
    prefetch_line(static_cast<const char*>(p) + at);
  }
}

// f(group, sums) in the first lane of the warp that adds up a group, for the groups of one share.
template <class S, class F>
ML_FN void for_each_group(const void* parts, const Pieces& pieces, int64_t share, int64_t shares,
                          const F& f) {
  const int64_t warps = blockDim.x / kWarp;
  for (int64_t g = share * warps + threadIdx.x / kWarp; g < pieces.groups.count;
       g += shares * warps) {
    const S sums = sum_group<S>(parts, pieces, g);
    if (threadIdx.x % kWarp == 0) f(g, sums);
  }
}

// found[share] = the sum of what of(share, &sums) adds up, for every share, a block each.
template <class S, class Of, class Found>
ML_FN void sum_shares(int64_t shares, const Of& of, const Found& found) {
  for (int64_t share = blockIdx.x; share < shares; share += gridDim.x) {
    S sums;
    of(share, &sums);
    sums = merge_team<kWarps>(sums);
    if (threadIdx.x == 0) found(share, sums);
    __syncthreads();  // before the next share's states
  }
}

// The sum of what all shares found; all threads get it.
template <class S>
ML_FN S sum_found(const S* found, int64_t count) {
  S sums;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) sums.add(found[i]);
  return merge_team<kWarps>(sums);
}

// Weights

// A device has no better way to raise an error than to stop.
ML_FN void complain(const WeighArgs& args, int64_t bad) {
  const int64_t target = index_at(args.target, args.target_type, bad);
  printf("masked_loss: target of token %lld is %lld, expected 0 <= target < %lld\n",
         static_cast<long long>(quotient(bad, args.ids)), static_cast<long long>(target),
         static_cast<long long>(args.classes));
  assert(target >= 0 && target < args.classes);
}

ML_FN void check_bounds(const Groups& sequences) {
  for_each(sequences.count, [&](int64_t g) {
    const int64_t begin = group_begin(sequences, g), end = group_end(sequences, g);
    if (begin <= end && (begin == 0 || g > 0)) return;
    printf("masked_loss: cu_seqlens must ascend from 0 to at most %lld, got %lld, %lld\n",
           static_cast<long long>(sequences.tokens), static_cast<long long>(begin),
           static_cast<long long>(end));
    assert(begin <= end && (begin == 0 || g > 0));
  });
}

template <class A, int kTeams>
ML_FN void weigh_pieces(const WeighArgs& args, const Pieces& pieces, WeightSums* parts) {
  check_bounds(args.sequences);
  sum_pieces<kTeams>(pieces, parts, [&](int64_t i, WeightSums* sums) {
    const int64_t sequence = args.sequences.count ? group_of(args.sequences, i) : 0;
    const TokenWeight t = token_weight<A>(args, i, sequence);
    if (t.bad >= 0) complain(args, t.bad);
    add_weight<A>(args, i, t, sums);
  });
}

using Active = Sums<1>;

// How many groups of a share have an active token.
ML_FN void count_active(const void* parts, const Pieces& pieces, int64_t share, int64_t shares,
                        Active* count) {
  for_each_group<WeightSums>(parts, pieces, share, shares, [&](int64_t, const WeightSums& sums) {
    count->v[0] += sums.v[WeightField::kActive] > 0;
  });
}

template <class A>
__global__ void __launch_bounds__(kThreads)
    weigh_alone_kernel(const WeighArgs args, const Pieces pieces) {
  const int64_t tokens = args.groups.tokens;
  prefetch(args.mask, tokens * size_of(args.mask_type));
  prefetch(args.target, tokens * args.ids * size_of(args.target_type));
  WeightSums* const parts = parts_alone<WeightSums>();
  weigh_pieces<A, kWarps>(args, pieces, parts);
  __syncthreads();  // the pieces of other warps
  Active active;
  count_active(parts, pieces, 0, 1, &active);
  active = merge_team<kWarps>(active);
  for_each_group<WeightSums>(parts, pieces, 0, 1, [&](int64_t g, const WeightSums& sums) {
    write_group(args, sums, active.v[0], g);
  });
}

template <class A, int kTeams>
__global__ void __launch_bounds__(kThreads)
    weigh_kernel(const WeighArgs args, const Pieces pieces) {
  weigh_pieces<A, kTeams>(args, pieces, static_cast<WeightSums*>(args.scratch));
}
__global__ void __launch_bounds__(kThreads)
    count_groups_kernel(const WeighArgs args, const Pieces pieces, Active* active, int64_t shares) {
  sum_shares<Active>(
      shares,
      [&](int64_t share, Active* count) {
        count_active(args.scratch, pieces, share, shares, count);
      },
      [&](int64_t share, const Active& count) { active[share] = count; });
}
// active: null where the scales do not depend on it.
__global__ void __launch_bounds__(kThreads)
    write_groups_kernel(const WeighArgs args, const Pieces pieces, const Active* active,
                        int64_t shares) {
  const double active_groups = active ? sum_found(active, shares).v[0] : 0;
  for_each_group<WeightSums>(
      args.scratch, pieces, blockIdx.x, gridDim.x,
      [&](int64_t g, const WeightSums& sums) { write_group(args, sums, active_groups, g); });
}

// Reductions

using Total = Sums<1 + StatField::kCount>;  // loss and statistics

template <class A, int kTeams>
ML_FN void reduce_pieces(const ReduceArgs& args, const Pieces& pieces, LossSums* parts) {
  sum_pieces<kTeams>(pieces, parts, [&](int64_t i, LossSums* sums) { add_loss<A>(args, i, sums); });
}

// Adds up the groups of a share.
template <class A>
ML_FN void add_groups(const ReduceArgs& args, const void* parts, const Pieces& pieces,
                      int64_t share, int64_t shares, Total* total) {
  for_each_group<LossSums>(parts, pieces, share, shares, [&](int64_t g, const LossSums& sums) {
    total->v[0] += group_loss<A>(args, sums, g);
    for (int i = 0; i < StatField::kCount; ++i) {
      total->v[1 + i] += sums.v[LossField::kStats + i];
    }
  });
}

template <class A>
__global__ void __launch_bounds__(kThreads)
    reduce_alone_kernel(const ReduceArgs args, const Pieces pieces) {
  LossSums* const parts = parts_alone<LossSums>();
  reduce_pieces<A, kWarps>(args, pieces, parts);
  __syncthreads();  // the pieces of other warps
  Total total;
  add_groups<A>(args, parts, pieces, 0, 1, &total);
  total = merge_team<kWarps>(total);
  if (threadIdx.x == 0) write_loss<A>(args, total.v[0], total.v + 1);
}

template <class A, int kTeams>
__global__ void __launch_bounds__(kThreads)
    reduce_kernel(const ReduceArgs args, const Pieces pieces) {
  reduce_pieces<A, kTeams>(args, pieces, static_cast<LossSums*>(args.scratch));
}
// Of the groups of each share; of all, where there is one share.
template <class A>
__global__ void __launch_bounds__(kThreads)
    reduce_groups_kernel(const ReduceArgs args, const Pieces pieces, Total* found, int64_t shares) {
  sum_shares<Total>(
      shares,
      [&](int64_t share, Total* total) {
        add_groups<A>(args, args.scratch, pieces, share, shares, total);
      },
      [&](int64_t share, const Total& total) {
        if (shares == 1) {
          write_loss<A>(args, total.v[0], total.v + 1);
        } else {
          found[share] = total;
        }
      });
}
template <class A>
__global__ void __launch_bounds__(kThreads)
    write_loss_kernel(const ReduceArgs args, const Total* found, int64_t shares) {
  const Total total = sum_found(found, shares);
  if (threadIdx.x == 0) write_loss<A>(args, total.v[0], total.v + 1);
}

// Token by token

template <class A>
__global__ void __launch_bounds__(kTokenThreads) mask_grad_kernel(const MaskGradArgs args) {
  for_each(args.groups.tokens,
           [&](int64_t i) { write_mask_grad<A>(args, piece_at(args.groups, i), i); });
}
template <class A>
__global__ void __launch_bounds__(kTokenThreads) load_values_kernel(const ValuesArgs args) {
  for_each(args.groups.tokens, [&](int64_t i) { load_value<A>(args, i); });
}
template <class A>
__global__ void __launch_bounds__(kTokenThreads) values_grad_kernel(const ValuesArgs args) {
  for_each(args.groups.tokens,
           [&](int64_t i) { write_value_grad<A>(args, piece_at(args.groups, i), i); });
}

// Launching

// How the tokens of a launch are cut, each of which takes `reads`.
struct Cut {
  bool alone;
  Pieces pieces;
};
Cut cut(const Groups& groups, int64_t reads) {
  const bool alone = groups.tokens * reads <= kAlone && groups.count <= kWarps;
  const int64_t of_a_warp = std::max<int64_t>(kWarp, (groups.tokens + kWarps - 1) / kWarps);
  return {alone, pieces_of(groups, alone ? of_a_warp : kPiece)};
}

template <class Args>
void launch_alone(void (*kernel)(Args, Pieces), const Args& args, const Pieces& pieces,
                  Stream stream) {
  const int64_t warps = std::min<int64_t>(pieces.count, kWarps);
  launch(kernel, 1, static_cast<int>(warps) * kWarp, 0, stream, args, pieces);
}

// A kernel for each team size: a block takes `teams` pieces at a time.
template <class Args>
void launch_pieces(void (*blocks)(Args, Pieces), void (*warps)(Args, Pieces), const Args& args,
                   const Pieces& pieces, Stream stream) {
  const int64_t average = args.groups.tokens / pieces.count;
  if (average <= kShort) {
    launch(warps, (pieces.count + kWarps - 1) / kWarps, kThreads, 0, stream, args, pieces);
  } else {
    const int64_t most = std::min(average + 1, kPiece);
    const int64_t threads = std::min<int64_t>(kThreads, (most + kWarp - 1) / kWarp * kWarp);
    launch(blocks, pieces.count, static_cast<int>(threads), 0, stream, args, pieces);
  }
}

template <class Args>
void launch_tokens(void (*kernel)(Args), const Args& args, Stream stream) {
  launch(kernel, (args.groups.tokens + kTokenThreads - 1) / kTokenThreads, kTokenThreads, 0, stream,
         args);
}

// How the groups are shared: a warp each, and as many blocks as are needed.
struct Shares {
  int64_t count;
  int threads;
  explicit Shares(int64_t groups)
      : count(std::min((groups + kWarps - 1) / kWarps, kGroupBlocks)),
        threads(static_cast<int>(std::min<int64_t>(groups, kWarps)) * kWarp) {}
};

// What the pieces found, and behind it what the shares did.
template <class Part, class Found>
int64_t scratch_for(const Groups& groups, int64_t reads) {
  const auto [alone, pieces] = cut(groups, reads);
  if (alone) return 0;
  return pieces.count * sizeof(Part) + Shares(groups.count).count * sizeof(Found);
}
template <class Part, class Found>
Found* found_in(void* scratch, const Pieces& pieces) {
  return reinterpret_cast<Found*>(static_cast<Part*>(scratch) + pieces.count);
}

}  // namespace

int64_t scratch_bytes(const WeighArgs& args) {
  return scratch_for<WeightSums, Active>(args.groups, args.ids);
}
int64_t scratch_bytes(const ReduceArgs& args) {
  return scratch_for<LossSums, Total>(args.groups, 1);
}

int64_t weigh(const WeighArgs& args, Stream stream) {
  const auto [alone, pieces] = cut(args.groups, args.ids);
  if (alone) {
    launch_alone(args.wide ? weigh_alone_kernel<double> : weigh_alone_kernel<float>, args, pieces,
                 stream);
    return -1;
  }
  launch_pieces(args.wide ? weigh_kernel<double, 1> : weigh_kernel<float, 1>,
                args.wide ? weigh_kernel<double, kWarps> : weigh_kernel<float, kWarps>, args,
                pieces, stream);
  const Shares shares(args.groups.count);
  Active* const active = found_in<WeightSums, Active>(args.scratch, pieces);
  const bool counts = args.reduction == Reduction::kSequenceMean;
  if (counts) {
    launch(count_groups_kernel, shares.count, shares.threads, 0, stream, args, pieces, active,
           shares.count);
  }
  const Active* const counted = counts ? active : nullptr;
  launch(write_groups_kernel, shares.count, shares.threads, 0, stream, args, pieces, counted,
         shares.count);
  return -1;
}

void reduce(const ReduceArgs& args, Stream stream) {
  const auto [alone, pieces] = cut(args.groups, 1);
  if (alone) {
    return launch_alone(args.wide ? reduce_alone_kernel<double> : reduce_alone_kernel<float>, args,
                        pieces, stream);
  }
  launch_pieces(args.wide ? reduce_kernel<double, 1> : reduce_kernel<float, 1>,
                args.wide ? reduce_kernel<double, kWarps> : reduce_kernel<float, kWarps>, args,
                pieces, stream);
  const Shares shares(args.groups.count);
  Total* const found = found_in<LossSums, Total>(args.scratch, pieces);
  launch(args.wide ? reduce_groups_kernel<double> : reduce_groups_kernel<float>, shares.count,
         shares.threads, 0, stream, args, pieces, found, shares.count);
  if (shares.count > 1) {
    launch(args.wide ? write_loss_kernel<double> : write_loss_kernel<float>, 1, kThreads, 0, stream,
           args, found, shares.count);
  }
}

void load_values(const ValuesArgs& args, Stream stream) {
  launch_tokens(args.wide ? load_values_kernel<double> : load_values_kernel<float>, args, stream);
}
void values_grad(const ValuesArgs& args, Stream stream) {
  launch_tokens(args.wide ? values_grad_kernel<double> : values_grad_kernel<float>, args, stream);
}
void mask_grad(const MaskGradArgs& args, Stream stream) {
  launch_tokens(args.wide ? mask_grad_kernel<double> : mask_grad_kernel<float>, args, stream);
}

const Backend kBackend = {weigh,         cross_entropy, merge,         rescale,     divergence,
                          load_values,   reduce,        mask_grad,     values_grad, scale,
                          scratch_bytes, scratch_bytes, scratch_bytes, 32 << 20};  // most of an L2

}  // namespace masked_loss::cuda
