// SPDX-License-Identifier: BSD-3-Clause
// Divergences of a student from a teacher, given as two rows of logits.
//
// With q the student's softmax, p the teacher's, m = share p + (1 - share) q:
//   D = of_teacher KL(p || m) + of_student KL(q || m)
// A KL(a || b) is the sum of b - a + a log(a / b): the sums of a and of b cancel, and what is left
// to add up is not negative, however close a and b are.
//
// With y the student's logits after softcap and temperature, forward KL has dD/dy = q - p, and all
// others
//   dD/dy = factor q (score - sum_j q_j score_j)
// with a score that is known class by class.
//
// Included after math.inl.h, where a backend has also defined abs, if_less, division, log1p(x) for
// -1 < x <= 0, and expm1_less(x) = e^x - 1 - x for |x| < kNear.

// Below this |log(a / b)| the difference b - a + a log(a / b) would cancel.
constexpr float kNear = 0.25f;

template <class V>
ML_FN V kl_term(V a, V b, V log_ratio) {
  const V near = a * expm1_less(V(0) - log_ratio);
  const V far = fma(a, log_ratio, b - a);
  return if_less(abs(log_ratio), V(kNear), near, far);
}

// e^x - 1, which is `far` where x is not small.
template <class V>
ML_FN V expm1_or(V far, V x) {
  return if_less(abs(x), V(kNear), x + expm1_less(x), far);
}

// A ratio of which a class is excluded by one or both sides: -inf and NaN become a number whose
// product with the probability 0 is 0.
template <class V>
ML_FN V bounded_below(V log_ratio) {
  return max(log_ratio, V(-Limits<V>::underflow()));
}

// The softmax of a row, from its logits.
template <class V>
struct Softmax {
  V top, inverse;  // of the sum of exp(y - top)
};

// Both rows'; shift: log sum of the student's exponentials less the teacher's.
template <class V>
struct SoftmaxPair {
  Softmax<V> q, p;
  V shift;
};

// One class: the probabilities, log p - log q, and of a mixture e^-|l|. Where both exclude the
// class, or only the teacher, l of a mixture is bounded, else it is NaN or infinite.
template <class V>
struct ClassPair {
  V q, p, l, fall;
};

// The difference of logits comes first: where the two are close, it is exact.
template <class Kind, class V>
ML_FN ClassPair<V> pair_of(V y, V z, const SoftmaxPair<V>& of) {
  const V l = (z - y) + of.shift;
  if constexpr (!Kind::kMixed) {
    return {exp(y - of.q.top) * of.q.inverse, exp(z - of.p.top) * of.p.inverse, l, V(0)};
  } else {
    const V bound(Limits<V>::underflow()), zero(0), lower = bounded_below(l);
    const V both = if_less(bound, lower, bound, lower);
    // Of the larger one, and the other as a share of it: one exponential less.
    const V larger = exp(if_less(zero, both, z - of.p.top, y - of.q.top)) *
                     if_less(zero, both, of.p.inverse, of.q.inverse);
    const V fall = exp(zero - abs(both)), smaller = larger * fall;
    return {if_less(zero, both, smaller, larger), if_less(zero, both, larger, smaller), both, fall};
  }
}

// What one class adds to D, and its score. A score may lack a constant: the mean lacks it too.
template <class V>
struct ClassPart {
  V value, score;
};

// KL(a || b) where b may exclude a class: infinite, also where a is too small to be more than 0.
template <class V>
ML_FN V kl_term_or_infinity(V a, V b, V log_ratio) {
  const V inf(Limits<V>::infinity());
  return if_less(V(-Limits<V>::lowest()), log_ratio, inf, kl_term(a, b, log_ratio));
}

struct ForwardKl {
  static constexpr bool kScored = false, kMixed = false;
  template <class V>
  ML_FN static ClassPart<V> part(const ClassPair<V>& c, V) {
    return {kl_term_or_infinity(c.p, c.q, bounded_below(c.l)), V(0)};
  }
  // q - p
  template <class V>
  ML_FN static V slope(const ClassPair<V>& c) {
    return if_less(abs(c.l), V(kNear), V(0) - c.q * (c.l + expm1_less(c.l)), c.q - c.p);
  }
};

struct ReverseKl {
  static constexpr bool kScored = true, kMixed = false;
  ML_FN static double factor(double) { return 1; }
  template <class V>
  ML_FN static ClassPart<V> part(const ClassPair<V>& c, V) {
    const V log_ratio = bounded_below(V(0) - c.l);
    return {kl_term_or_infinity(c.q, c.p, log_ratio), log_ratio};
  }
};

// m, log(p / m) and log(q / m). Neither side excludes a class that m has: all is finite.
template <class V>
struct MixedPair {
  V m, of_p, of_q;

  ML_FN MixedPair(const ClassPair<V>& c, V share) {
    // Of the larger of p and q: log(m / p) for l > 0, else log(m / q).
    const V other = if_less(V(0), c.l, V(1) - share, share), above = max(c.l, V(0));
    const V of_larger = log1p(other * expm1_or(c.fall - V(1), V(0) - abs(c.l)));
    m = fma(share, c.p - c.q, c.q);
    of_p = (c.l - above) - of_larger;
    of_q = V(0) - of_larger - above;
  }
};

// a / m; 0 where both are too small to be more than 0.
constexpr float kTiny = 1e-37f;
template <class V>
ML_FN V share_of(V a, V m) {
  return a / max(m, V(kTiny));
}

struct JensenShannon {
  static constexpr bool kScored = true, kMixed = true;
  ML_FN static double factor(double beta) { return 1 - beta; }
  template <class V>
  ML_FN static ClassPart<V> part(const ClassPair<V>& c, V beta) {
    const MixedPair<V> mixed(c, beta);
    const V of_q = kl_term(c.q, mixed.m, mixed.of_q);
    const V value = fma(beta, kl_term(c.p, mixed.m, mixed.of_p), (V(1) - beta) * of_q);
    return {value, mixed.of_q};
  }
};

struct SkewForwardKl {
  static constexpr bool kScored = true, kMixed = true;
  ML_FN static double factor(double beta) { return 1 - beta; }
  template <class V>
  ML_FN static ClassPart<V> part(const ClassPair<V>& c, V beta) {
    const MixedPair<V> mixed(c, beta);
    const V ratio = expm1_or(share_of(c.p, mixed.m) - V(1), mixed.of_p);  // p / m - 1
    return {kl_term(c.p, mixed.m, mixed.of_p), V(0) - ratio};
  }
};

struct SkewReverseKl {
  static constexpr bool kScored = true, kMixed = true;
  ML_FN static double factor(double) { return 1; }
  template <class V>
  ML_FN static ClassPart<V> part(const ClassPair<V>& c, V beta) {
    const MixedPair<V> mixed(c, V(1) - beta);
    const V ratio = expm1_or(share_of(c.q, mixed.m) - V(1), mixed.of_q);  // q / m - 1
    return {kl_term(c.q, mixed.m, mixed.of_q), mixed.of_q - beta * ratio};
  }
};
