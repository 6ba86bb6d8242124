// SPDX-License-Identifier: BSD-3-Clause
// The contract between a loss and the kernels that read rows, and every loss under it.
//
// A loss says which sums a look at a row adds up (math.inl.h), what is kept of them in the token
// table, and of which coefficients its gradient is made. That has one shape for all losses:
//   d/dy_j = e_j (alpha + beta u_j) - gamma q_j - h [j = t],   e_j = exp(y_j - top)
// with u_j = y_j - top where the loss has kSlope, else nothing, and q_j where it has kSoft. The
// derivative at a target is computed apart, as it may cancel. Kernels hold who loops and who
// fetches, and nothing else; they get their coefficients once for each row.
//
// Included after math.inl.h, where a backend has also defined quotient(a, b) of two int64.

// The token that a row of logits scores.
template <class A>
struct Token {
  const RowArgs& args;
  int64_t index;

  ML_FN A& column(int64_t which) const {
    return static_cast<A*>(args.table)[which * args.rows + index];
  }
  ML_FN A temperature() const {
    if (args.temperatures) return static_cast<const A*>(args.temperatures)[index];
    return static_cast<A>(args.temperature);
  }
  ML_FN const double* group() const { return group_at(args.groups, group_of(args.groups, index)); }
  ML_FN int64_t id(int64_t k) const {
    return index_at(args.target, args.target_type, index * args.ids + k);
  }
  ML_FN A& log_prob(int64_t k) const {
    return static_cast<A*>(args.results[0])[index * args.ids + k];
  }
  ML_FN A upstream_of_id(int64_t k) const {
    return static_cast<const A*>(args.upstream[0].values)[index * args.ids + k];
  }
  ML_FN A& entropy() const { return static_cast<A*>(args.results[1])[index]; }
  ML_FN A upstream(int result) const {
    const Upstream& u = args.upstream[result];
    return u.values ? static_cast<const A*>(u.values)[u.per_token ? index : 0] : A(1);
  }
};

template <class C>
struct RowGrad {
  C alpha, beta, gamma;
};
template <class Loss, class V>
ML_FN V gradient_term(V y, V top, const RowGrad<V>& g, V q) {
  const V e = exp(y - top);
  V factor = g.alpha;
  if constexpr (Loss::kSlope) factor = factor + g.beta * below_top(y, top);
  if constexpr (Loss::kSoft) return fma(factor, e, V(0) - g.gamma * q);
  return factor * e;
}

// Cross entropy with class weights and z-loss; soft: also with a smoothed target distribution or
// class probabilities.
template <bool soft>
struct CrossEntropy {
  static constexpr bool kSoft = soft, kSlope = false, kManyTargets = false;
  template <class V>
  using Sums = LogSumExp<V>;

  // A target's share of the distribution, but for the soft part.
  template <class A>
  ML_FN static A hard(const RowArgs& args, int64_t target) {
    const A* const weights = static_cast<const A*>(args.class_weight);
    const A weight = weights ? weights[target] : A(1);
    if constexpr (!kSoft) return weight;  // nothing is smoothed
    return static_cast<A>(1 - args.label_smoothing) * weight;
  }

  // In double: a handful of operations, of which each would add its rounding to the loss.
  template <class A>
  ML_FN static void finish(const Token<A>& token, const TargetSums<double>& sums, double y,
                           A hard) {
    double loss = token.args.probs ? 0 : hard_loss<double>(sums, y, hard);
    if constexpr (kSoft) loss += sums.soft_loss + sums.soft_mass * log(sums.sum);
    token.column(TokenField::kLoss) = static_cast<A>(loss);
    token.column(TokenField::kTop) = static_cast<A>(sums.top);
    token.column(TokenField::kSum) = static_cast<A>(sums.sum);
    token.column(TokenField::kTargetMass) = static_cast<A>(kSoft ? hard + sums.soft_mass : hard);
  }
  template <class A>
  ML_FN static void finish_stats(const Token<A>& token, const TargetSums<double>& sums) {
    token.column(TokenField::kEntropy) = static_cast<A>(entropy(sums.sum, sums.entropy_sum));
    token.column(TokenField::kCorrect) = !token.args.probs && !sums.beaten;
  }
  template <class A>
  ML_FN static void finish_masked(const Token<A>& token) {
    token.column(TokenField::kLoss) = 0;
    token.column(TokenField::kTop) = 0;
    token.column(TokenField::kSum) = 1;
    token.column(TokenField::kTargetMass) = 0;
    if (!token.args.stats) return;
    token.column(TokenField::kEntropy) = 0;
    token.column(TokenField::kCorrect) = 0;
  }

  // alpha = (ce mass + 2 z lse) / sum, gamma = ce: of the scales of both terms. scale: the token's
  // weight and upstream gradient, over its temperature.
  template <class C>
  struct Grad : RowGrad<C> {
    C mass, z;  // of alpha: the target distribution's over sum, and the z-loss's share
  };
  template <class C, class A>
  ML_FN static Grad<C> grad(const Token<A>& token, C scale, const LogSumExp<C>& lse, C mass) {
    const double* group = token.group();
    const C ce = static_cast<C>(scale * group[GroupField::kScaleLoss]);
    const C z_loss = static_cast<A>(token.args.z_loss);
    // Without a z-loss its term must not appear at all: 0 * lse is NaN for an infinite lse.
    C z(0);
    if (z_loss != C(0)) {
      z = C(2) * static_cast<C>(scale * group[GroupField::kScaleZ]) * z_loss * lse.value() /
          lse.sum;
    }
    return {{ce * mass / lse.sum + z, C(0), ce}, mass / lse.sum, z};
  }

  // At the target, whose whole part is q. Where p is almost 1 this is a difference of almost equal
  // numbers: they are subtracted first, and a z-loss is added to what is left.
  template <class C>
  ML_FN static C target_grad(C y, C top, C q, const Grad<C>& g) {
    const C e = exp(y - top);
    return g.gamma * (g.mass * e - q) + g.z * e;
  }
};

// The log-probabilities of a token's ids, log p_t = (y_t - top) - log(sum), and where they are
// asked for the entropies of p. With the upstream gradients a_k of the first and b of the second,
//   d/dy_j = e_j (-sum_k a_k - b (u_j + entropy_sum / sum)) / sum + sum_k a_k [j = t_k]
template <bool with_entropy>
struct LogProbs {
  static constexpr bool kSoft = false, kSlope = with_entropy, kManyTargets = true;
  template <class V>
  using Sums = std::conditional_t<with_entropy, EntropySums<V>, LogSumExp<V>>;
  template <class C>
  using Grad = RowGrad<C>;

  // log_sum: the logarithm of the row's sum, taken once for all of its ids.
  ML_FN static double log_prob(double y, double top, double log_sum) { return (y - top) - log_sum; }
  template <class A, class SumsOfRow>
  ML_FN static void finish(const Token<A>& token, const SumsOfRow& sums) {
    // 0 says that a token is masked. The sum of a row of nothing but -inf is no number either.
    const auto sum = sums.sum == 0 ? sums.sum / sums.sum : sums.sum;
    token.column(LogProbField::kSum) = static_cast<A>(sum);
    token.column(LogProbField::kTop) = static_cast<A>(sums.top);
    if constexpr (with_entropy) {
      token.column(LogProbField::kEntropySum) = static_cast<A>(sums.entropy_sum);
      token.entropy() = static_cast<A>(entropy<double>(sums.sum, sums.entropy_sum));
    }
  }
  template <class A>
  ML_FN static void finish_masked(const Token<A>& token) {
    token.column(LogProbField::kSum) = 0;
    token.column(LogProbField::kTop) = 0;
    if constexpr (with_entropy) {
      token.column(LogProbField::kEntropySum) = 0;
      token.entropy() = 0;
    }
  }

  template <class A>
  ML_FN static RowGrad<double> grad(const Token<A>& token) {
    const double sum = token.column(LogProbField::kSum), temperature = token.temperature();
    double a = 0, b = 0;
    for (int64_t k = 0; k < token.args.ids; ++k) {
      if (token.id(k) != token.args.ignore_index) a += token.upstream_of_id(k);
    }
    if constexpr (with_entropy) {
      b = token.upstream(1);
      a += b * token.column(LogProbField::kEntropySum) / sum;
    }
    return {-a / sum / temperature, -b / sum / temperature, 0};
  }
  // At an id, to which goes the upstream gradient `own` over the temperature.
  ML_FN static double target_grad(double y, double top, const RowGrad<double>& g, double own) {
    return exp(y - top) * (g.alpha + g.beta * below_top(y, top)) + own;
  }
};
