// SPDX-License-Identifier: BSD-3-Clause
// What is computed token by token, whatever the vocabulary, written once: weights and scales before
// the rows of logits are read, reductions and the gradients of masks and values after. The
// backends' tokens files hold who loops.
//
// Included like math.inl.h, and after it. The backend has index_at, quotient, widen and narrow.

template <class T>
ML_FN const T* as(const void* p) {
  return static_cast<const T*>(p);
}

// Number types are told apart at run time: next to the logits these arrays are small.
struct Truth {
  uint8_t byte;
};
template <class F>
ML_FN auto with_numbers(const void* p, DType type, const F& f) {
  switch (type) {
    case DType::kFloat64:
      return f(as<double>(p));
    case DType::kFloat32:
      return f(as<float>(p));
    case DType::kBFloat16:
      return f(as<BFloat16>(p));
    case DType::kFloat16:
      return f(as<Float16>(p));
    case DType::kInt64:
      return f(as<int64_t>(p));
    case DType::kInt32:
      return f(as<int32_t>(p));
    case DType::kInt16:
      return f(as<int16_t>(p));
    case DType::kInt8:
      return f(as<int8_t>(p));
    case DType::kUInt8:
      return f(as<uint8_t>(p));
    case DType::kBool:
      break;
  }
  return f(as<Truth>(p));
}
template <class T>
ML_FN double number(T x) {
  return static_cast<double>(x);
}
ML_FN double number(BFloat16 x) { return widen(x); }
ML_FN double number(Float16 x) { return widen(x); }
ML_FN double number(Truth x) { return x.byte != 0; }

ML_FN double number_at(const void* p, DType type, int64_t i) {
  return with_numbers(p, type, [&](const auto* numbers) { return number(numbers[i]); });
}
ML_FN void store_number(double x, void* p, DType type, int64_t i) {
  switch (type) {
    case DType::kFloat64:
      return narrow(x, static_cast<double*>(p) + i);
    case DType::kFloat32:
      return narrow(static_cast<float>(x), static_cast<float*>(p) + i);
    case DType::kBFloat16:
      return narrow(static_cast<float>(x), static_cast<BFloat16*>(p) + i);
    default:
      return narrow(static_cast<float>(x), static_cast<Float16*>(p) + i);
  }
}

// The token table.
template <class A>
struct Table {
  const A* base;
  int64_t tokens;
  ML_FN A operator()(int64_t field, int64_t token) const { return base[field * tokens + token]; }
};

// Sums over the tokens of a piece or of a group, in double precision.
template <int N>
struct Sums {
  double v[N];
  ML_FN Sums() {
    for (int i = 0; i < N; ++i) v[i] = 0;
  }
  ML_FN void add(const Sums& other) {
    for (int i = 0; i < N; ++i) v[i] += other.v[i];
  }
};

// Groups are cut into pieces of at most `size` tokens. A piece is added up in order, and then the
// pieces of a group are, so that a sum has the same bits whoever adds up which piece.

struct Piece {
  int64_t group, begin, end;
};
struct Pieces {
  Groups groups;
  int64_t size, per_group, count;

  // The pieces of a group have numbers of their own, some of which stay unused where groups have
  // any length: so they need no table.
  ML_FN int64_t first_of(int64_t group) const {
    if (!groups.bounds) return group * per_group;
    return quotient(group_begin(groups, group), size) + group;
  }
  ML_FN int64_t number_of(int64_t group) const {
    if (!groups.bounds) return per_group;
    return quotient(group_end(groups, group) - group_begin(groups, group) + size - 1, size);
  }
  ML_FN Piece operator[](int64_t piece) const {
    if (!groups.bounds) return of(quotient(piece, per_group), piece);
    return of(last_where(groups.count, [&](int64_t g) { return first_of(g) <= piece; }), piece);
  }
  // The next one in order: to search for each would cost more than short sequences do.
  ML_FN Piece after(const Piece& last, int64_t piece) const {
    if (!groups.bounds) return (*this)[piece];
    int64_t group = last.group;
    while (group + 1 < groups.count && first_of(group + 1) <= piece) ++group;
    return of(group, piece);
  }
  ML_FN Piece of(int64_t group, int64_t piece) const {
    const int64_t end = group_end(groups, group);
    const int64_t begin = group_begin(groups, group) + (piece - first_of(group)) * size;
    // CUDA finds wrong bounds while it runs: until then nothing is read beside the tokens.
    if (begin < 0 || end > groups.tokens) return {group, 0, 0};
    return {group, begin, begin + size < end ? begin + size : end};
  }
};

inline Pieces pieces_of(const Groups& groups, int64_t size) {
  if (groups.bounds) return {groups, size, 0, groups.tokens / size + groups.count};
  const int64_t per_group = groups.size > size ? (groups.size + size - 1) / size : 1;
  return {groups, size, per_group, groups.count * per_group};
}

// Weights

struct WeightField {
  // kClassWeights: filled only where classes have weights
  enum : int { kWeights, kActive, kClassWeights, kCount };
};
using WeightSums = Sums<WeightField::kCount>;

// Whether nothing predicts the token. `sequence`: that of the token, in args.sequences.
ML_FN bool is_left_out(const WeighArgs& args, int64_t i, int64_t sequence) {
  if (args.sequences.count && sequence == args.sequences.count - 1) return true;
  if (!args.skip_first) return false;
  if (i == quotient(i, args.steps) * args.steps) return true;
  return args.sequences.count && i == group_begin(args.sequences, sequence);
}

// The token's factor in the mask. A weight that underflows in A is none, as the rows' kernels see
// it.
template <class A>
ML_FN A mask_at(const WeighArgs& args, int64_t i) {
  return args.mask ? static_cast<A>(number_at(args.mask, args.mask_type, i)) : A(1);
}

ML_FN bool in_range(const WeighArgs& args, int64_t id) {
  return static_cast<uint64_t>(id) < static_cast<uint64_t>(args.classes);
}

// An index of the token, and where args.target has it: of several the last that is not ignored, or
// the first that is out of range.
struct Target {
  int64_t id, at;
};
ML_FN Target target_of(const WeighArgs& args, int64_t i) {
  Target target{args.ignore_index, i};
  for (int64_t at = i * args.ids; at < (i + 1) * args.ids; ++at) {
    const int64_t id = index_at(args.target, args.target_type, at);
    if (id == args.ignore_index) continue;
    target = {id, at};
    if (!in_range(args, id)) break;
  }
  return target;
}

// weight = mask * [target != ignore_index]; a masked token's target is not looked at either.
template <class A>
struct TokenWeight {
  A weight;
  bool bad;  // the target is out of range
};
template <class A>
ML_FN TokenWeight<A> token_weight(const WeighArgs& args, A mask, int64_t id) {
  const bool ignored = id == args.ignore_index;
  const bool bad = mask != 0 && !ignored && !in_range(args, id);
  return {bad || (ignored && !args.keep_ignored) ? A(0) : mask, bad};
}
// Of a token that has a weight.
template <class A>
ML_FN A class_weight(const WeighArgs& args, int64_t id) {
  return id == args.ignore_index ? A(1) : as<A>(args.class_weight)[id];
}

template <class A>
ML_FN void add_weight(A weight, WeightSums* sums) {
  sums->v[WeightField::kWeights] += weight;
  sums->v[WeightField::kActive] += weight != 0 ? 1 : 0;
}
template <class A>
ML_FN void add_class_weight(A weight, A of_class, WeightSums* sums) {
  sums->v[WeightField::kClassWeights] += double(weight) * of_class;
}

// All of a token, whose weight is `mask` but for its target. Returns where that is out of range, or
// -1.
template <class A>
ML_FN int64_t weigh_token(const WeighArgs& args, int64_t i, A mask, WeightSums* sums) {
  int64_t bad = -1;
  TokenWeight<A> t{mask, false};
  if (args.target && mask != 0) {
    const Target target = target_of(args, i);
    t = token_weight(args, mask, target.id);
    if (t.bad) bad = target.at;
    if (args.class_weight && t.weight != 0) {
      add_class_weight(t.weight, class_weight<A>(args, target.id), sums);
    }
  }
  static_cast<A*>(args.weight)[i] = t.weight;
  add_weight(t.weight, sums);
  return bad;
}

// One of the factors that the group's sums are multiplied by:
// mean: 1 / sum w c (z: 1 / sum w); sequence_mean: that over the number of active sequences; with a
// normalizer 1 / normalizer, and for sequence_mean the mean over it; none and sum: 1.
// A group without an active token gets 0.
ML_FN double group_factor(const WeighArgs& args, const WeightSums& sums, double active_groups,
                          int64_t field) {
  const bool sequences = args.reduction == Reduction::kSequenceMean;
  const bool mean = sequences || (args.reduction == Reduction::kMean && !args.normalizer);
  const bool scale = field == GroupField::kScaleLoss || field == GroupField::kScaleZ;
  if (sums.v[WeightField::kActive] == 0 || (!scale && !mean)) return 0;
  const bool classes =
      args.class_weight && (field == GroupField::kScaleLoss || field == GroupField::kInverseLoss);
  const double given = args.normalizer ? *args.normalizer : 1;
  const double share = !sequences ? 1 : args.normalizer ? given : active_groups;
  const double weights =
      classes ? sums.v[WeightField::kClassWeights] : sums.v[WeightField::kWeights];
  return 1 / ((mean ? weights : given) * (scale ? share : 1));
}

// A number of the group's row of the table.
ML_FN void write_group(const WeighArgs& args, const WeightSums& sums, double active_groups,
                       int64_t group, int64_t field) {
  group_at(args.groups, group)[field] = field == Groups::kBound ? args.groups.bounds[group]
                                        : field >= GroupField::kMeanLoss
                                            ? 0
                                            : group_factor(args, sums, active_groups, field);
}

// Reductions

struct LossField {
  // from kTokens on: filled only where statistics are wanted
  enum : int { kLoss, kZ, kTokens, kCorrect, kEntropy, kCount };
};
using LossSums = Sums<LossField::kCount>;

template <class A>
ML_FN double z_of(const Table<A>& table, double z_loss, int64_t token) {
  if (z_loss == 0) return 0;
  return z_term<double>(table(TokenField::kTop, token), table(TokenField::kSum, token), z_loss);
}

// What a token adds; of a masked one all of it is 0.
template <class A>
ML_FN double add_loss(A weight, A loss, LossSums* sums) {
  const double weighted = double(weight) * loss;
  sums->v[LossField::kLoss] += weighted;
  return weighted;
}
template <class A>
ML_FN void add_statistics(A weight, A correct, A entropy, LossSums* sums) {
  const double w = weight;
  sums->v[LossField::kTokens] += w;
  sums->v[LossField::kCorrect] += w * correct;
  sums->v[LossField::kEntropy] += w * entropy;
}
template <class A>
ML_FN void write_token_loss(const ReduceArgs& args, int64_t i, double loss) {
  if (args.reduction == Reduction::kNone) static_cast<A*>(args.loss)[i] = static_cast<A>(loss);
}

// All of a token; where it is masked, nothing but its weight is read.
template <class A>
ML_FN void reduce_token(const ReduceArgs& args, int64_t i, LossSums* sums) {
  const Table<A> table{as<A>(args.table), args.groups.tokens};
  const A weight = table(TokenField::kWeight, i);
  double loss = 0, z = 0;
  if (weight != 0) {
    loss = add_loss<A>(weight, table(TokenField::kLoss, i), sums);
    z = weight * z_of(table, args.z_loss, i);
    sums->v[LossField::kZ] += z;
    if (args.stats) {
      add_statistics<A>(weight, table(TokenField::kCorrect, i), table(TokenField::kEntropy, i),
                        sums);
    }
  }
  write_token_loss<A>(args, i, loss + z);
}

// Where nothing is divided by weights there is no mean: 0 times an infinite sum would be a NaN in
// the gradient of every weight.
ML_FN double mean_of(double sum, double inverse) { return inverse != 0 ? sum * inverse : 0; }

// A group's share in the loss; its means go to the group table, and its loss where each has one.
// Without an active token all of its factors are 0.
template <class A>
ML_FN double group_loss(const ReduceArgs& args, const LossSums& sums, int64_t index) {
  double* const group = group_at(args.groups, index);
  const double loss = sums.v[LossField::kLoss], z = sums.v[LossField::kZ];
  double share = loss * group[GroupField::kScaleLoss];
  if (args.z_loss != 0) share += z * group[GroupField::kScaleZ];
  group[GroupField::kMeanLoss] = mean_of(loss, group[GroupField::kInverseLoss]);
  group[GroupField::kMeanZ] = mean_of(z, group[GroupField::kInverseZ]);
  const bool behind = args.groups.bounds && index == args.groups.count - 1;
  if (args.per_group && !behind) static_cast<A*>(args.loss)[index] = static_cast<A>(share);
  return share;
}

// total: over all groups, but for kLoss, the sum of their shares.
template <class A>
ML_FN void write_loss(const ReduceArgs& args, const LossSums& total) {
  const bool one = args.reduction != Reduction::kNone && !args.per_group;
  if (one) *static_cast<A*>(args.loss) = static_cast<A>(total.v[LossField::kLoss]);
  if (!args.stats) return;
  args.stats[StatField::kTokens] = total.v[LossField::kTokens];
  args.stats[StatField::kCorrect] = total.v[LossField::kCorrect];
  args.stats[StatField::kEntropy] = total.v[LossField::kEntropy];
  args.stats[StatField::kZLoss] = total.v[LossField::kZ];
}

// Gradients, of masked tokens 0: they take no part.

template <class A>
ML_FN double upstream_at(const Upstream& dloss, const Piece& piece, int64_t token) {
  if (!dloss.values) return 1;
  return as<A>(dloss.values)[dloss.per_token ? token : dloss.per_group ? piece.group : 0];
}

// d loss / d w_n = scale_loss (ce_n - c_n mean_loss) + scale_z (z_n - mean_z)
template <class A>
ML_FN void write_mask_grad(const MaskGradArgs& args, const Piece& piece, int64_t i) {
  const Table<A> table{as<A>(args.table), args.groups.tokens};
  double d = 0;
  if (table(TokenField::kWeight, i) != 0) {
    const double* const group = group_at(args.groups, piece.group);
    const double c = args.class_weight
                         ? as<A>(args.class_weight)[index_at(args.target, args.target_type, i)]
                         : A(1);
    d = group[GroupField::kScaleLoss] *
        (table(TokenField::kLoss, i) - c * group[GroupField::kMeanLoss]);
    // As in CrossEntropy::grad(): weights that cancel make scale_z infinite.
    if (args.z_loss != 0) {
      d += group[GroupField::kScaleZ] * (z_of(table, args.z_loss, i) - group[GroupField::kMeanZ]);
    }
    d = upstream_at<A>(args.dloss, piece, i) * d;
  }
  store_number(d, args.dmask, args.mask_type, i);
}

// Masked values are not read.
template <class A>
ML_FN void load_value(const ValuesArgs& args, int64_t i) {
  A* const table = static_cast<A*>(args.table);
  const int64_t tokens = args.groups.tokens;
  table[TokenField::kLoss * tokens + i] =
      table[TokenField::kWeight * tokens + i] != 0
          ? static_cast<A>(number_at(args.values, args.dtype, i))
          : A(0);
}

template <class A>
ML_FN void write_value_grad(const ValuesArgs& args, const Piece& piece, int64_t i) {
  const double w = as<A>(args.table)[TokenField::kWeight * args.groups.tokens + i];
  double d = 0;
  if (w != 0) {
    d = upstream_at<A>(args.dloss, piece, i) * w *
        group_at(args.groups, piece.group)[GroupField::kScaleLoss];
  }
  store_number(d, args.dvalues, args.dtype, i);
}
