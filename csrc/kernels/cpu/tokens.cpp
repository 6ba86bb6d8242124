// SPDX-License-Identifier: BSD-3-Clause
// Who loops over the tokens on the CPU: threads take pieces, so that every sum has the same bits
// for any number of threads.
#include <vector>

#include "kernels/cpu/isa.h"

namespace masked_loss::cpu {
namespace {

// clang-format off
#include "kernels/cpu/scalar.inl.h"
#include "kernels/groups.inl.h"
#include "kernels/math.inl.h"
#include "kernels/token.inl.h"
#include "kernels/losses.inl.h"
#include "kernels/shards.inl.h"
// clang-format on

constexpr int64_t kPiece = 8192;

// f(number, piece) for every piece.
template <class F>
void for_each_piece(const Groups& groups, const Threads& threads, const F& f) {
  const Pieces pieces = pieces_of(groups, kPiece);
  const int64_t work = groups.tokens / std::max<int64_t>(1, pieces.count);
  share(pieces.count, work, threads, [&](int64_t begin, int64_t end) {
    Piece piece{};
    for (int64_t p = begin; p < end; ++p) {
      piece = p == begin ? pieces[p] : pieces.after(piece, p);
      f(p, piece);
    }
  });
}

// f(args, piece, i) for every token. The arguments are copied, so that the compiler knows that
// nothing written changes them, and keeps them in registers.
template <class Args, class F>
void for_each_token(const Args& args, const Threads& threads, const F& f) {
  for_each_piece(args.groups, threads, [&](int64_t, const Piece& piece) {
    const Args copy = args;
    for (int64_t i = piece.begin; i < piece.end; ++i) f(copy, piece, i);
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
  std::vector<int64_t> bad(pieces, -1);  // the first bad target of each piece
  with_accumulation(args.wide, [&](auto a) {
    using A = decltype(a);
    for_each_piece(args.groups, threads, [&](int64_t p, const Piece& piece) {
      const WeighArgs copy = args;
      const Groups sequences = args.sequences;
      int64_t sequence = piece.group;  // of tokens that are grouped by sequence
      if (!copy.groups.bounds) sequence = sequences.count ? group_of(sequences, piece.begin) : 0;
      int64_t next = sequences.count ? group_end(sequences, sequence) : sequences.tokens;
      WeightSums sums;
      for (int64_t i = piece.begin; i < piece.end; ++i) {
        while (sequences.count && next <= i) next = group_end(sequences, ++sequence);
        const A mask = is_left_out(copy, i, sequence) ? A(0) : mask_at<A>(copy, i);
        const int64_t bad_here = weigh_token<A>(copy, i, mask, &sums);
        if (bad[p] < 0) bad[p] = bad_here;
      }
      parts[p] = sums;
    });
  });
  const std::vector<WeightSums> sums = sum_groups(args.groups, parts);
  double active_groups = 0;
  for (const WeightSums& sum : sums) active_groups += sum.v[WeightField::kActive] > 0;
  for (int64_t g = 0; g < args.groups.count; ++g) {
    for (int64_t field = 0; field < args.groups.columns; ++field) {
      write_group(args, sums[g], active_groups, g, field);
    }
  }
  const auto first = std::find_if(bad.begin(), bad.end(), [](int64_t i) { return i >= 0; });
  return first == bad.end() ? -1 : *first;
}

void merge(const MergeArgs& args, const Threads& threads) {
  with_accumulation(args.dtype == DType::kFloat64, [&](auto a) {
    share(args.rows, args.shards * args.numbers, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) Merger<decltype(a)>{args, {args, i}}.run();
    });
  });
}

void reduce(const ReduceArgs& args, const Threads& threads) {
  std::vector<LossSums> parts(pieces_of(args.groups, kPiece).count);
  with_accumulation(args.wide, [&](auto a) {
    using A = decltype(a);
    for_each_piece(args.groups, threads, [&](int64_t p, const Piece& piece) {
      const ReduceArgs copy = args;
      LossSums sums;
      for (int64_t i = piece.begin; i < piece.end; ++i) reduce_token<A>(copy, i, &sums);
      parts[p] = sums;
    });
    const std::vector<LossSums> sums = sum_groups(args.groups, parts);
    double loss = 0;
    LossSums total;
    for (int64_t g = 0; g < args.groups.count; ++g) {
      total.add(sums[g]);
      loss += group_loss<A>(args, sums[g], g);
    }
    total.v[LossField::kLoss] = loss;
    write_loss<A>(args, total);
  });
}

void mask_grad(const MaskGradArgs& args, const Threads& threads) {
  with_accumulation(args.wide, [&](auto a) {
    for_each_token(args, threads, [](const auto&... of) { write_mask_grad<decltype(a)>(of...); });
  });
}

void load_values(const ValuesArgs& args, const Threads& threads) {
  with_accumulation(args.wide, [&](auto a) {
    for_each_token(args, threads, [](const auto& copy, const Piece&, int64_t i) {
      load_value<decltype(a)>(copy, i);
    });
  });
}

void values_grad(const ValuesArgs& args, const Threads& threads) {
  with_accumulation(args.wide, [&](auto a) {
    for_each_token(args, threads, [](const auto&... of) { write_value_grad<decltype(a)>(of...); });
  });
}

namespace {

template <class From, class To, class A>
void scale_numbers(const ScaleArgs& args, A factor, const Threads& threads) {
  share(args.count, 1, threads, [&](int64_t begin, int64_t end) {
    const From* const gradient = static_cast<const From*>(args.gradient);
    To* const scaled = static_cast<To*>(args.scaled);
    for (int64_t i = begin; i < end; ++i) narrow(widen(gradient[i]) * factor, &scaled[i]);
  });
}

}  // namespace

void scale(const ScaleArgs& args, const Threads& threads) {
  if (args.dtype == DType::kFloat64) {
    return scale_numbers<double, double>(args, *static_cast<const double*>(args.factor), threads);
  }
  const float factor = *static_cast<const float*>(args.factor);
  if (args.dtype == DType::kBFloat16) {
    return scale_numbers<BFloat16, BFloat16>(args, factor, threads);
  }
  if (args.dtype == DType::kFloat16) {
    return scale_numbers<Float16, Float16>(args, factor, threads);
  }
  switch (args.scaled_type) {
    case DType::kBFloat16:
      return scale_numbers<float, BFloat16>(args, factor, threads);
    case DType::kFloat16:
      return scale_numbers<float, Float16>(args, factor, threads);
    default:
      return scale_numbers<float, float>(args, factor, threads);
  }
}

}  // namespace masked_loss::cpu
