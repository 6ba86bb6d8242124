// SPDX-License-Identifier: BSD-3-Clause
// Divergences of a student from a teacher, given as two rows of logits.
//
// With q the student's softmax, p the teacher's, m = share p + (1 - share) q:
//   D = of_teacher KL(p || m) + of_student KL(q || m)
// A KL(a || b) is the sum of b - a + a log(a / b): the sums of a and of b cancel, and what is left
// to add up is not negative, however close a and b are.
//
// With y the student's logits after softcap and temperature, forward KL has dD/dy = -(p - q), and
// all others
//   dD/dy = factor q (score - sum_j q_j score_j)
// with a score that is known class by class.
//
// Included after math.inl.h, where a backend has also defined min(a, b) = a < b ? a : b, abs,
// if_less, ratio(a, b) = a / b, log_quotient(m, larger, less) = log(m / larger) for m = larger -
// less, 0 where both are 0, and expm1_less() of doubles.

// Below this |log(a / b)| the difference b - a + a log(a / b) would cancel.
constexpr float kNear = 0.25f;

// e^x - 1 - x of floats below kNear: minimax, to 6e-8.
template <class V>
ML_FN V expm1_less(V x) {
  const V square = x * x;
  V g = fma(x, V(0.00834574457257986f), V(0.04166661947965622f));
  g = fma(square, V(0.001391214202158153f), g);
  return fma(square, g, fma(x, V(0.16666656732559204f), V(0.5f))) * square;
}

template <class V>
ML_FN V if_near(V log_ratio, V near, V far) {
  return if_less(abs(log_ratio), V(kNear), near, far);
}

template <class V>
ML_FN V kl_term(V a, V b, V log_ratio) {
  return if_near(log_ratio, a * expm1_less(-log_ratio), fma(a, log_ratio, b - a));
}

// A ratio of which a class is excluded by one or both sides: -inf and NaN become a number whose
// product with the probability 0 is 0.
template <class V>
ML_FN V bounded_below(V log_ratio) {
  return max(log_ratio, V(-Limits<V>::underflow()));
}

// One class of KL(a || b), which is forward or reverse KL, by the same terms, where a and b are yet
// exponentials: no probability is made, which takes fewer instructions. log_ratio is log(a / b), of
// probabilities; a unit makes these of exponentials.
template <class A>
struct KlClass {
  A log_ratio, rest;  // rest: e^-log_ratio - 1 + log_ratio

  ML_FN explicit KlClass(A l) : log_ratio(bounded_below(l)), rest(expm1_less(-log_ratio)) {}
  // Over a's unit; `unit` is b's over it.
  ML_FN A value(A a, A b, A unit) const {
    return if_near(log_ratio, a * rest, fma(a, log_ratio, fma(b, unit, -a)));
  }
  // a - b, whose units are given.
  ML_FN A above(A a, A b, A unit, A unit_of_b) const {
    const A of_a = a * unit;
    return if_near(log_ratio, of_a * (log_ratio - rest), fma(-b, unit_of_b, of_a));
  }
};

// What the two rows' logits are counted from in their difference: from 0, which is exact where they
// are close, but where one row lies far above the other from their largest, or the difference would
// be rounded as numbers of that distance are.
template <class A>
struct Origins {
  A student, teacher;
};
template <class A>
ML_FN Origins<A> origins_of(A top, A teacher_top) {
  if (abs(top - teacher_top) > A(8)) return {top, teacher_top};
  return {A(0), A(0)};
}

// What makes probabilities of the exponentials of both rows, and the student's log-sum-exp less the
// teacher's, each from its origin.
template <class V>
struct SoftmaxPair {
  V q, p, shift;
};

// One class. Where both sides exclude it, l is NaN; of a mixture l is bounded.
template <class V>
struct ClassPair {
  V q, p;   // the probabilities
  V l;      // log p - log q
  V rise;   // e^l - 1 - l where the two are near
  V above;  // p - q, which does not cancel where they are
};

// From z - y, each from its origin, and the exponentials.
template <class Kind, class V>
ML_FN ClassPair<V> pair_of(V apart, V e_y, V e_z, const SoftmaxPair<V>& of) {
  const V q = e_y * of.q, p = e_z * of.p;
  V l = apart + of.shift;
  if constexpr (Kind::kMixed) {
    l = min(V(Limits<V>::underflow()), bounded_below(l));
  }
  const V rise = expm1_less(l);
  return {q, p, l, rise, if_near(l, q * (l + rise), p - q)};
}

// What one class adds to D, and its score: of forward KL dD/dy / factor itself. A score may lack a
// constant: the mean lacks it too.
template <class V>
struct ClassPart {
  V value, score;
};

// `value` unless b excludes the class: infinite, also where a is too small to be more than 0.
template <class V>
ML_FN V or_infinity(V log_ratio, V value) {
  return if_less(V(-Limits<V>::lowest()), log_ratio, V(Limits<V>::infinity()), value);
}

struct ForwardKl {
  static constexpr bool kScored = false, kMixed = false;
  ML_FN static double factor(double) { return -1; }
  template <class V>
  ML_FN static ClassPart<V> part(const ClassPair<V>& c, V) {
    const V log_ratio = bounded_below(c.l);
    // q - p + p l, of which near the first order is taken out: p = q e^l = q (1 + l + rise).
    const V near = c.q * fma(c.l, c.l + c.rise, -c.rise);
    return {or_infinity(log_ratio, if_near(c.l, near, fma(c.p, log_ratio, -c.above))), c.above};
  }
};

struct ReverseKl {
  static constexpr bool kScored = true, kMixed = false;
  ML_FN static double factor(double) { return 1; }
  template <class V>
  ML_FN static ClassPart<V> part(const ClassPair<V>& c, V) {
    const V log_ratio = bounded_below(-c.l);
    const V value = if_near(c.l, c.q * c.rise, fma(c.q, log_ratio, c.above));
    return {or_infinity(log_ratio, value), log_ratio};
  }
};

// m, log(p / m) and log(q / m). Neither side excludes a class that m has: all is finite.
template <class V>
struct MixedPair {
  V m, of_p, of_q;

  ML_FN MixedPair(const ClassPair<V>& c, V share) {
    const V zero(0), larger = if_less(zero, c.l, c.p, c.q);
    const V less = if_less(zero, c.l, V(1) - share, share) * abs(c.above);
    m = fma(share, c.above, c.q);
    const V of_larger = log_quotient(m, larger, less);
    const V between = max(c.l, zero);  // of the larger and q
    of_p = (c.l - between) - of_larger;
    of_q = -of_larger - between;
  }

  // (p - q) / m; 0 where both are too small to be more than 0.
  ML_FN V above(const ClassPair<V>& c) const { return ratio(c.above, max(m, V(kTiny))); }
};

struct JensenShannon {
  static constexpr bool kScored = true, kMixed = true;
  ML_FN static double factor(double beta) { return 1 - beta; }
  template <class V>
  ML_FN static ClassPart<V> part(const ClassPair<V>& c, V beta) {
    const MixedPair<V> mixed(c, beta);
    const V of_p = beta * c.p, of_q = (V(1) - beta) * c.q;
    const V near = fma(of_p, expm1_less(-mixed.of_p), of_q * expm1_less(-mixed.of_q));
    // The two differences b - a add up to 0.
    return {if_near(c.l, near, fma(of_p, mixed.of_p, of_q * mixed.of_q)), mixed.of_q};
  }
};

struct SkewForwardKl {
  static constexpr bool kScored = true, kMixed = true;
  ML_FN static double factor(double beta) { return 1 - beta; }
  template <class V>
  ML_FN static ClassPart<V> part(const ClassPair<V>& c, V beta) {
    const MixedPair<V> mixed(c, beta);
    const V ratio = (V(1) - beta) * mixed.above(c);  // p / m - 1
    return {kl_term(c.p, mixed.m, mixed.of_p), -ratio};
  }
};

struct SkewReverseKl {
  static constexpr bool kScored = true, kMixed = true;
  ML_FN static double factor(double) { return 1; }
  template <class V>
  ML_FN static ClassPart<V> part(const ClassPair<V>& c, V beta) {
    const MixedPair<V> mixed(c, V(1) - beta);
    const V ratio = (beta - V(1)) * mixed.above(c);  // q / m - 1
    return {kl_term(c.q, mixed.m, mixed.of_q), mixed.of_q - beta * ratio};
  }
};
