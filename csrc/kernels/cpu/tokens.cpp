// SPDX-License-Identifier: BSD-3-Clause
// Who loops over the tokens on the CPU: threads take pieces, so that every sum has the same bits
// for any number of threads.
#include <vector>

#include "kernels/cpu/isa.h"

namespace masked_loss::cpu {
namespace {

#include "kernels/cpu/scalar.inl.h"
#include "kernels/math.inl.h"
#include "kernels/token.inl.h"

constexpr int64_t kPiece = 8192;

// f(number, piece) for every piece.
template <class F>
void for_each_piece(const Groups& groups, const Threads& threads, const F& f) {
  const Pieces pieces = pieces_of(groups, kPiece);
  const int64_t work = groups.tokens / std::max<int64_t>(1, pieces.count);
  share(pieces.count, work, threads, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) f(p, pieces[p]);
  });
}

template <class F>
void for_each_token(const Groups& groups, const Threads& threads, const F& f) {
  for_each_piece(groups, threads, [&](int64_t, const Piece& piece) {
    for (int64_t i = piece.begin; i < piece.end; ++i) f(piece, i);
  });
}

// The sum of each group's pieces, in order.
template <class S>
std::vector<S> sum_groups(const Groups& groups, const std::vector<S>& parts) {
  const Pieces pieces = pieces_of(groups, kPiece);
  std::vector<S> sums(groups.count);
  for (int64_t g = 0; g < groups.count; ++g) {
    const int64_t first = pieces.first_of(g);
    for (int64_t p = first; p < first + pieces.number_of(g); ++p) sums[g].add(parts[p]);
  }
  return sums;
}

template <class F>
void with_accumulation(bool wide, const F& f) {
  wide ? f(double{}) : f(float{});
}

}  // namespace

int64_t weigh(const WeighArgs& args, const Threads& threads) {
  const int64_t pieces = pieces_of(args.groups, kPiece).count;
  std::vector<WeightSums> parts(pieces);
  std::vector<int64_t> bad(pieces, -1);  // the first token of each piece whose target is
  with_accumulation(args.wide, [&](auto a) {
    using A = decltype(a);
    for_each_piece(args.groups, threads, [&](int64_t p, const Piece& piece) {
      for (int64_t i = piece.begin; i < piece.end; ++i) {
        const TokenWeight t = token_weight<A>(args, piece, i);
        if (t.bad && bad[p] < 0) bad[p] = i;
        add_weight<A>(args, i, t, &parts[p]);
      }
    });
  });
  const std::vector<WeightSums> sums = sum_groups(args.groups, parts);
  double active_groups = 0;
  for (const WeightSums& sum : sums) active_groups += sum.v[WeightField::kActive] > 0;
  for (int64_t g = 0; g < args.groups.count; ++g) write_group(args, sums[g], active_groups, g);
  const auto first = std::find_if(bad.begin(), bad.end(), [](int64_t i) { return i >= 0; });
  return first == bad.end() ? -1 : *first;
}

void reduce(const ReduceArgs& args, const Threads& threads) {
  std::vector<LossSums> parts(pieces_of(args.groups, kPiece).count);
  with_accumulation(args.wide, [&](auto a) {
    using A = decltype(a);
    for_each_piece(args.groups, threads, [&](int64_t p, const Piece& piece) {
      for (int64_t i = piece.begin; i < piece.end; ++i) add_loss<A>(args, i, &parts[p]);
    });
    const std::vector<LossSums> sums = sum_groups(args.groups, parts);
    double loss = 0;
    LossSums all;
    for (int64_t g = 0; g < args.groups.count; ++g) {
      all.add(sums[g]);
      loss += group_loss(args, sums[g], g);
    }
    write_loss<A>(args, loss, all.v + LossField::kStats);
  });
}

void mask_grad(const MaskGradArgs& args, const Threads& threads) {
  with_accumulation(args.wide, [&](auto a) {
    for_each_token(args.groups, threads, [&](const Piece& piece, int64_t i) {
      write_mask_grad<decltype(a)>(args, piece, i);
    });
  });
}

void load_values(const ValuesArgs& args, const Threads& threads) {
  with_accumulation(args.wide, [&](auto a) {
    for_each_token(args.groups, threads,
                   [&](const Piece&, int64_t i) { load_value<decltype(a)>(args, i); });
  });
}

void values_grad(const ValuesArgs& args, const Threads& threads) {
  with_accumulation(args.wide, [&](auto a) {
    for_each_token(args.groups, threads, [&](const Piece& piece, int64_t i) {
      write_value_grad<decltype(a)>(args, piece, i);
    });
  });
}

}  // namespace masked_loss::cpu
