// SPDX-License-Identifier: BSD-3-Clause
// What is done token by token, whatever the vocabulary: weights and scales before the rows of
// logits are read, reductions and the gradients of masks and values after.
//
// Every sum is over fixed pieces of a group, each added up in order, in double precision, and then
// the pieces in order: the same bits for any number of threads.
#include <atomic>
#include <vector>

#include "kernels/cpu/isa.h"

namespace masked_loss::cpu {
namespace {

#include "kernels/cpu/vec_lane.inl.h"
#include "kernels/math.inl.h"

constexpr int64_t kPiece = 8192;

template <class F>
void for_each_piece(int64_t pieces, const Threads& threads, const F& f) {
  if (pieces <= 4 || threads.count <= 1) {
    for (int64_t i = 0; i < pieces; ++i) f(i);
    return;
  }
  std::atomic<int64_t> next{0};
  threads.run([&] {
    for (int64_t i = next++; i < pieces; i = next++) f(i);
  });
}

// Groups of tokens, each cut into pieces: piece p covers tokens [begin(p), end(p)) of one group.
struct Pieces {
  int64_t tokens, group_size;
  int64_t groups = group_size ? tokens / group_size : 1;
  int64_t per_group = std::max<int64_t>(1, (group_size + kPiece - 1) / kPiece);

  int64_t count() const { return groups * per_group; }
  int64_t begin(int64_t p) const { return (p / per_group) * group_size + (p % per_group) * kPiece; }
  int64_t end(int64_t p) const {
    return std::min(begin(p) + kPiece, (p / per_group + 1) * group_size);
  }
};

// sum(piece) over each group, in order. Sum has operator+=.
template <class Sum, class F>
std::vector<Sum> sum_groups(const Pieces& pieces, const Threads& threads, const F& sum) {
  std::vector<Sum> parts(pieces.count());
  for_each_piece(pieces.count(), threads,
                 [&](int64_t p) { parts[p] = sum(pieces.begin(p), pieces.end(p)); });
  std::vector<Sum> groups(pieces.groups);
  for (int64_t p = 0; p < pieces.count(); ++p) groups[p / pieces.per_group] += parts[p];
  return groups;
}

template <class F>
void for_each_token(int64_t tokens, const Threads& threads, const F& f) {
  for_each_piece((tokens + kPiece - 1) / kPiece, threads, [&](int64_t p) {
    for (int64_t i = p * kPiece; i < std::min((p + 1) * kPiece, tokens); ++i) f(i);
  });
}

// f(T{}) for the C++ type of a mask, of values or of targets.
template <class F>
auto with_type(DType type, const F& f) {
  switch (type) {
    case DType::kFloat64:
      return f(double{});
    case DType::kFloat32:
      return f(float{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat16:
      return f(Float16{});
    case DType::kInt64:
      return f(int64_t{});
    case DType::kInt32:
      return f(int32_t{});
    case DType::kInt16:
      return f(int16_t{});
    case DType::kInt8:
      return f(int8_t{});
    case DType::kUInt8:
      return f(uint8_t{});
    case DType::kBool:
      break;
  }
  return f(bool{});
}
template <class F>
auto with_accumulation(bool wide, const F& f) {
  return wide ? f(double{}) : f(float{});
}

ML_FN double number(double x) { return x; }
ML_FN double number(float x) { return x; }
ML_FN double number(BFloat16 x) { return to_float(x); }
ML_FN double number(Float16 x) { return to_float(x); }
ML_FN double number(int64_t x) { return static_cast<double>(x); }
ML_FN double number(int32_t x) { return x; }
ML_FN double number(int16_t x) { return x; }
ML_FN double number(int8_t x) { return x; }
ML_FN double number(uint8_t x) { return x; }
ML_FN double number(bool x) { return x; }

template <class T>
const T* as(const void* p) {
  return static_cast<const T*>(p);
}

template <class A>
struct Table {
  const A* base;
  int64_t tokens;
  A operator()(int64_t which, int64_t token) const { return base[which * tokens + token]; }
};

double upstream(const void* dloss, bool per_token, bool wide, int64_t token) {
  if (!dloss) return 1;
  const int64_t i = per_token ? token : 0;
  return wide ? as<double>(dloss)[i] : as<float>(dloss)[i];
}

struct WeightSums {
  double weights = 0, class_weights = 0;
  int64_t active = 0, bad = -1;
  void operator+=(const WeightSums& other) {
    weights += other.weights;
    class_weights += other.class_weights;
    active += other.active;
    if (bad < 0) bad = other.bad;
  }
};

// w = mask * [target != ignore_index]; a masked token's target is not looked at either.
template <class A, class M>
WeightSums weigh_piece(const WeighArgs& args, int64_t begin, int64_t end) {
  WeightSums sums;
  A* weight = static_cast<A*>(args.weight);
  int64_t step = begin % std::max<int64_t>(1, args.steps);
  for (int64_t i = begin; i < end; ++i, step = step + 1 == args.steps ? 0 : step + 1) {
    // As the rows' kernels see it: a weight that underflows there is none here either.
    double w = args.mask ? static_cast<A>(number(as<M>(args.mask)[i])) : A(1);
    if (args.skip_first && step == 0) w = 0;
    double c = 1;
    if (args.target && w != 0) {
      const int64_t target = index_at(args.target, args.target_type, i);
      if (target == args.ignore_index) {
        w = 0;
      } else if (target < 0 || target >= args.classes) {
        if (sums.bad < 0) sums.bad = i;
        w = 0;
      } else if (args.class_weight) {
        c = number(as<A>(args.class_weight)[target]);
      }
    }
    weight[i] = static_cast<A>(w);
    if (w == 0) continue;
    sums.weights += w;
    sums.class_weights += w * c;
    ++sums.active;
  }
  return sums;
}

}  // namespace

int64_t weigh(const WeighArgs& args, const Threads& threads) {
  const std::vector<WeightSums> sums = with_accumulation(args.wide, [&](auto a) {
    return with_type(args.mask_type, [&](auto m) {
      return sum_groups<WeightSums>(
          Pieces{args.tokens, args.group_size}, threads, [&](int64_t begin, int64_t end) {
            return weigh_piece<decltype(a), decltype(m)>(args, begin, end);
          });
    });
  });
  double active_groups = 0;
  int64_t bad = -1;
  for (const WeightSums& sum : sums) {
    active_groups += sum.active > 0;
    if (bad < 0) bad = sum.bad;
  }
  // The denominators are made of the weights.
  const bool mean = !args.normalizer && (args.reduction == Reduction::kMean ||
                                         args.reduction == Reduction::kSequenceMean);
  for (size_t g = 0; g < sums.size(); ++g) {
    double* group = args.groups + g * GroupField::kCount;
    double loss = 1, z = 1;
    if (args.normalizer) {
      loss = z = *args.normalizer;
    } else if (mean) {
      loss = sums[g].class_weights;
      z = sums[g].weights;
    }
    const bool active = sums[g].active > 0;
    const double share = mean ? active_groups : 1;
    group[GroupField::kScaleLoss] = active ? group_scale(loss, share) : 0;
    group[GroupField::kScaleZ] = active ? group_scale(z, share) : 0;
    group[GroupField::kMeanLoss] = active && mean ? 1 / loss : 0;  // reduce() makes them means
    group[GroupField::kMeanZ] = active && mean ? 1 / z : 0;
  }
  return bad;
}

namespace {

struct LossSums {
  double loss = 0, z = 0, stats[StatField::kCount] = {};
  int64_t active = 0;
  void operator+=(const LossSums& other) {
    loss += other.loss;
    z += other.z;
    active += other.active;
    for (int i = 0; i < StatField::kCount; ++i) stats[i] += other.stats[i];
  }
};

template <class A>
double z_of(const Table<A>& table, double z_loss, int64_t token) {
  if (z_loss == 0) return 0;
  return z_term<double>(table(TokenField::kTop, token), table(TokenField::kSum, token), z_loss);
}

template <class A>
LossSums reduce_piece(const ReduceArgs& args, int64_t begin, int64_t end) {
  const Table<A> table{as<A>(args.table), args.tokens};
  A* losses = args.reduction == Reduction::kNone ? static_cast<A*>(args.loss) : nullptr;
  LossSums sums;
  for (int64_t i = begin; i < end; ++i) {
    const double w = table(TokenField::kWeight, i);
    double loss = 0, z = 0;
    if (w != 0) {
      loss = w * table(TokenField::kLoss, i);
      z = w * z_of(table, args.z_loss, i);
      sums.loss += loss;
      sums.z += z;
      ++sums.active;
      if (args.stats) {
        sums.stats[StatField::kTokens] += w;
        sums.stats[StatField::kCorrect] += w * table(TokenField::kCorrect, i);
        sums.stats[StatField::kEntropy] += w * table(TokenField::kEntropy, i);
        sums.stats[StatField::kZLoss] += z;
      }
    }
    if (losses) losses[i] = static_cast<A>(loss + z);
  }
  return sums;
}

template <class A>
void reduce_as(const ReduceArgs& args, const Threads& threads) {
  const std::vector<LossSums> sums = sum_groups<LossSums>(
      Pieces{args.tokens, args.group_size}, threads,
      [&](int64_t begin, int64_t end) { return reduce_piece<A>(args, begin, end); });
  double loss = 0;
  LossSums all;
  for (size_t g = 0; g < sums.size(); ++g) {
    double* group = args.groups + g * GroupField::kCount;
    all += sums[g];
    if (sums[g].active == 0) continue;
    loss += sums[g].loss * group[GroupField::kScaleLoss];
    if (args.z_loss != 0) loss += sums[g].z * group[GroupField::kScaleZ];
    group[GroupField::kMeanLoss] *= sums[g].loss;
    group[GroupField::kMeanZ] *= sums[g].z;
  }
  if (args.reduction != Reduction::kNone) *static_cast<A*>(args.loss) = static_cast<A>(loss);
  for (int i = 0; args.stats && i < StatField::kCount; ++i) {
    static_cast<A*>(args.stats)[i] = static_cast<A>(all.stats[i]);
  }
}

}  // namespace

void reduce(const ReduceArgs& args, const Threads& threads) {
  args.wide ? reduce_as<double>(args, threads) : reduce_as<float>(args, threads);
}

void mask_grad(const MaskGradArgs& args, const Threads& threads) {
  with_accumulation(args.wide, [&](auto a) {
    using A = decltype(a);
    const Table<A> table{as<A>(args.table), args.tokens};
    for_each_token(args.tokens, threads, [&](int64_t i) {
      double d = 0;  // of a masked token too: it takes no part
      if (table(TokenField::kWeight, i) != 0) {
        const double c = args.class_weight
                             ? as<A>(args.class_weight)[index_at(args.target, args.target_type, i)]
                             : 1;
        d = upstream(args.dloss, args.dloss_per_token, args.wide, i) *
            weight_grad(table(TokenField::kLoss, i), z_of(table, args.z_loss, i), c, args.z_loss,
                        args.groups + (i / args.group_size) * GroupField::kCount);
      }
      with_type(args.mask_type, [&](auto m) {
        using M = decltype(m);
        if constexpr (!std::is_integral_v<M>) {
          using Compute = std::conditional_t<std::is_same_v<M, double>, double, float>;
          narrow(static_cast<Compute>(d), static_cast<M*>(args.dmask) + i);
        }
      });
    });
  });
}

// Masked values are not read.
void load_values(const ValuesArgs& args, const Threads& threads) {
  with_accumulation(args.wide, [&](auto a) {
    with_type(args.dtype, [&](auto t) {
      using A = decltype(a);
      A* table = static_cast<A*>(args.table);
      const A* weight = table + TokenField::kWeight * args.tokens;
      A* loss = table + TokenField::kLoss * args.tokens;
      for_each_token(args.tokens, threads, [&](int64_t i) {
        loss[i] = weight[i] != 0 ? static_cast<A>(number(as<decltype(t)>(args.values)[i])) : A(0);
      });
    });
  });
}

void values_grad(const ValuesArgs& args, const Threads& threads) {
  with_accumulation(args.wide, [&](auto a) {
    with_type(args.dtype, [&](auto t) {
      using A = decltype(a);
      using T = decltype(t);
      if constexpr (!std::is_integral_v<T>) {
        const A* weight = as<A>(args.table) + TokenField::kWeight * args.tokens;
        for_each_token(args.tokens, threads, [&](int64_t i) {
          double d = 0;
          if (weight[i] != 0) {
            d = upstream(args.dloss, args.dloss_per_token, args.wide, i) * weight[i] *
                args.groups[(i / args.group_size) * GroupField::kCount + GroupField::kScaleLoss];
          }
          using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;
          narrow(static_cast<Compute>(d), static_cast<T*>(args.dvalues) + i);
        });
      }
    });
  });
}

}  // namespace masked_loss::cpu
