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
ML_FN double number_at(const void* p, DType type, int64_t i) {
  switch (type) {
    case DType::kFloat64:
      return as<double>(p)[i];
    case DType::kFloat32:
      return as<float>(p)[i];
    case DType::kBFloat16:
      return widen(as<BFloat16>(p)[i]);
    case DType::kFloat16:
      return widen(as<Float16>(p)[i]);
    case DType::kInt64:
      return static_cast<double>(as<int64_t>(p)[i]);
    case DType::kInt32:
      return as<int32_t>(p)[i];
    case DType::kInt16:
      return as<int16_t>(p)[i];
    case DType::kInt8:
      return as<int8_t>(p)[i];
    case DType::kUInt8:
      return as<uint8_t>(p)[i];
    case DType::kBool:
      break;
  }
  return as<uint8_t>(p)[i] != 0;
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
  ML_FN double operator()(int64_t field, int64_t token) const {
    return base[field * tokens + token];
  }
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
  enum : int { kWeights, kClassWeights, kActive, kCount };
};
using WeightSums = Sums<WeightField::kCount>;

struct TokenWeight {
  double weight, class_weight;
  int64_t bad;  // where in args.target an index is out of range, or -1
};

// weight = mask * [target != ignore_index]; a masked token's target is not looked at either.
// `sequence`: that of the token, in args.sequences.
template <class A>
ML_FN TokenWeight token_weight(const WeighArgs& args, int64_t i, int64_t sequence) {
  const TokenWeight masked{0, 1, -1};
  if (args.sequences.count && sequence == args.sequences.count - 1) return masked;
  if (args.skip_first) {
    if (i == quotient(i, args.steps) * args.steps) return masked;
    if (args.sequences.count && i == group_begin(args.sequences, sequence)) return masked;
  }
  // As the rows' kernels see it: a weight that underflows there is none here either.
  const double w = args.mask ? static_cast<A>(number_at(args.mask, args.mask_type, i)) : A(1);
  if (!args.target || w == 0) return {w, 1, -1};
  int64_t target = args.ignore_index;
  for (int64_t k = i * args.ids; k < (i + 1) * args.ids; ++k) {
    const int64_t id = index_at(args.target, args.target_type, k);
    if (id == args.ignore_index) continue;
    if (id < 0 || id >= args.classes) return {0, 1, k};
    target = id;
  }
  if (target == args.ignore_index) return args.keep_ignored ? TokenWeight{w, 1, -1} : masked;
  return {w, args.class_weight ? as<A>(args.class_weight)[target] : A(1), -1};
}

template <class A>
ML_FN void add_weight(const WeighArgs& args, int64_t i, const TokenWeight& t, WeightSums* sums) {
  static_cast<A*>(args.weight)[i] = static_cast<A>(t.weight);
  if (t.weight == 0) return;
  sums->v[WeightField::kWeights] += t.weight;
  sums->v[WeightField::kClassWeights] += t.weight * t.class_weight;
  sums->v[WeightField::kActive] += 1;
}

// What the group's sums are multiplied by:
// mean: 1 / sum w c (z: 1 / sum w); sequence_mean: that over the number of active sequences; with a
// normalizer 1 / normalizer, and for sequence_mean the mean over it; none and sum: 1.
// A group without an active token gets 0.
ML_FN void write_group(const WeighArgs& args, const WeightSums& sums, double active_groups,
                       int64_t group) {
  const bool sequences = args.reduction == Reduction::kSequenceMean;
  const bool mean = sequences || (args.reduction == Reduction::kMean && !args.normalizer);
  const double given = args.normalizer ? *args.normalizer : 1;
  const double share = !sequences ? 1 : args.normalizer ? given : active_groups;
  const double loss = mean ? sums.v[WeightField::kClassWeights] : given;
  const double z = mean ? sums.v[WeightField::kWeights] : given;
  const bool active = sums.v[WeightField::kActive] > 0;
  double* const out = group_at(args.groups, group);
  out[GroupField::kScaleLoss] = active ? 1 / (loss * share) : 0;
  out[GroupField::kScaleZ] = active ? 1 / (z * share) : 0;
  out[GroupField::kInverseLoss] = active && mean ? 1 / loss : 0;
  out[GroupField::kInverseZ] = active && mean ? 1 / z : 0;
  out[GroupField::kMeanLoss] = out[GroupField::kMeanZ] = 0;
  if (args.groups.bounds) out[Groups::kBound] = args.groups.bounds[group];
}

// Reductions

struct LossField {
  enum : int { kLoss, kZ, kActive, kStats, kCount = kStats + StatField::kCount };
};
using LossSums = Sums<LossField::kCount>;

template <class A>
ML_FN double z_of(const Table<A>& table, double z_loss, int64_t token) {
  if (z_loss == 0) return 0;
  return z_term<double>(table(TokenField::kTop, token), table(TokenField::kSum, token), z_loss);
}

template <class A>
ML_FN void add_loss(const ReduceArgs& args, int64_t i, LossSums* sums) {
  const Table<A> table{as<A>(args.table), args.groups.tokens};
  const double w = table(TokenField::kWeight, i);
  double loss = 0, z = 0;
  if (w != 0) {
    loss = w * table(TokenField::kLoss, i);
    z = w * z_of(table, args.z_loss, i);
    sums->v[LossField::kLoss] += loss;
    sums->v[LossField::kZ] += z;
    sums->v[LossField::kActive] += 1;
    if (args.stats) {
      double* const stats = sums->v + LossField::kStats;
      stats[StatField::kTokens] += w;
      stats[StatField::kCorrect] += w * table(TokenField::kCorrect, i);
      stats[StatField::kEntropy] += w * table(TokenField::kEntropy, i);
      stats[StatField::kZLoss] += z;
    }
  }
  if (args.reduction == Reduction::kNone) {
    static_cast<A*>(args.loss)[i] = static_cast<A>(loss + z);
  }
}

// A group's share in the loss; its means go to the group table, and its loss where each has one.
template <class A>
ML_FN double group_loss(const ReduceArgs& args, const LossSums& sums, int64_t index) {
  double share = 0;
  if (sums.v[LossField::kActive] > 0) {
    double* const group = group_at(args.groups, index);
    const double loss = sums.v[LossField::kLoss], z = sums.v[LossField::kZ];
    group[GroupField::kMeanLoss] = group[GroupField::kInverseLoss] * loss;
    group[GroupField::kMeanZ] = group[GroupField::kInverseZ] * z;
    share = loss * group[GroupField::kScaleLoss];
    if (args.z_loss != 0) share += z * group[GroupField::kScaleZ];
  }
  const bool behind = args.groups.bounds && index == args.groups.count - 1;
  if (args.per_group && !behind) static_cast<A*>(args.loss)[index] = static_cast<A>(share);
  return share;
}

template <class A>
ML_FN void write_loss(const ReduceArgs& args, double loss, const double* stats) {
  const bool one = args.reduction != Reduction::kNone && !args.per_group;
  if (one) *static_cast<A*>(args.loss) = static_cast<A>(loss);
  for (int i = 0; args.stats && i < StatField::kCount; ++i) {
    args.stats[i] = stats[i];
  }
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
