// SPDX-License-Identifier: BSD-3-Clause
// A vocabulary whose classes are shared out to ranks: what a shard tells of a token, and how all
// shards together make its loss. A shard is one more part of a row, so its sums are merged as those
// of lanes and blocks are, by merge(), in the order of the ranks.
//
// Included after losses.inl.h, where a backend has also defined index_at.

struct ShardSums : TargetSums<double> {
  // Where the target is in another shard, the largest of these logits as the model gave them, NaN
  // if one is; where it is here, its own, or NaN if another one here wins against it.
  double best;

  ML_FN explicit ShardSums(const TargetSums<double>& sums = TargetSums<double>())
      : TargetSums<double>(sums), best(-Limits<double>::infinity()) {}
};

// The numbers that a shard tells, in their order: f(number) for each. The logits of the ids, as the
// loss takes them, follow, of which only those that are in the shard are read.
template <class Shard, class F>
ML_FN void for_each_number(const RowArgs& args, Shard* sums, const F& f) {
  const bool log_probs = args.loss == RowLoss::kLogProbs;
  f(&sums->top);
  f(&sums->sum);
  if (!log_probs && args.label_smoothing != 0) {
    f(&sums->soft_loss);
    f(&sums->soft_mass);
  }
  if (args.stats) f(&sums->entropy_sum);
  if (args.stats && !log_probs) f(&sums->best);
}

template <class A>
ML_FN void write_number(const Token<A>& token, int64_t which, A number) {
  static_cast<A*>(token.args.part)[which * token.args.rows + token.index] = number;
}
template <class A>
ML_FN void write_shard(const Token<A>& token, const ShardSums& sums) {
  int64_t which = 0;
  for_each_number(token.args, &sums,
                  [&](const double* x) { write_number(token, which++, static_cast<A>(*x)); });
}
// y: the logit of id k, one of these columns.
template <class A>
ML_FN void write_id(const Token<A>& token, int64_t k, A y) {
  write_number(token, token.args.numbers - token.args.ids + k, y);
}

// What all shards told of one token.
template <class A>
struct Merger {
  const MergeArgs& args;
  const Token<A> token;

  ML_FN const A* number(int64_t shard, int64_t which) const {
    return static_cast<const A*>(args.parts) + (shard * args.numbers + which) * args.rows +
           token.index;
  }
  ML_FN ShardSums sums_of(int64_t shard) const {
    ShardSums sums;
    int64_t which = 0;
    for_each_number(args, &sums, [&](double* x) { *x = *number(shard, which++); });
    return sums;
  }
  // Of the shards with that first class the last one, which is not empty.
  ML_FN int64_t owner_of(int64_t id) const {
    return last_where(args.shards, [&](int64_t r) { return args.bounds[r] <= id; });
  }
  ML_FN double own(int64_t k) const {
    return *number(owner_of(token.id(k)), args.numbers - args.ids + k);
  }

  // The row's sums, and f(shard, sums) for each shard that has a class.
  template <class F>
  ML_FN TargetSums<double> merged(const F& f) const {
    TargetSums<double> all;
    for (int64_t r = 0; r < args.shards; ++r) {
      if (args.bounds[r] == args.bounds[r + 1]) continue;
      const ShardSums sums = sums_of(r);
      f(r, sums);
      merge<TargetSums<double>>(&all, sums);
    }
    return all;
  }

  template <class Loss>
  ML_FN void cross_entropy() const {
    if (token.column(TokenField::kWeight) == 0) return Loss::finish_masked(token);
    const int64_t target = token.id(0), owner = owner_of(target);
    const double best = args.stats ? sums_of(owner).best : 0;
    bool beaten = best != best;
    // The first of equal logits is the argmax.
    TargetSums<double> all = merged([&](int64_t r, const ShardSums& other) {
      if (r < owner) beaten |= !(best > other.best);
      if (r > owner) beaten |= !(best >= other.best);
    });
    Loss::finish(token, all, own(0), Loss::template hard<A>(args, target));
    if (!args.stats) return;
    all.beaten = beaten;
    Loss::finish_stats(token, all);
  }

  template <class Loss>
  ML_FN void log_probs() const {
    const bool masked = token.column(LogProbField::kSum) == 0;
    TargetSums<double> all;
    if (masked) {
      Loss::finish_masked(token);
    } else {
      all = merged([](int64_t, const ShardSums&) {});
      Loss::finish(token, all);
    }
    const double log_sum = log(all.sum);
    for (int64_t k = 0; k < args.ids; ++k) {
      const bool none = masked || token.id(k) == args.ignore_index;
      token.log_prob(k) = none ? A(0) : static_cast<A>(Loss::log_prob(own(k), all.top, log_sum));
    }
  }

  ML_FN void run() const {
    if (args.loss == RowLoss::kLogProbs) {
      args.stats ? log_probs<LogProbs<true>>() : log_probs<LogProbs<false>>();
    } else {
      args.label_smoothing != 0 ? cross_entropy<CrossEntropy<true>>()
                                : cross_entropy<CrossEntropy<false>>();
    }
  }
};
