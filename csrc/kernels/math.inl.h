// SPDX-License-Identifier: BSD-3-Clause
// The mathematics of masked_loss, written once.
//
// Included inside a backend's namespace, after the backend has defined, for its value type V,
// arithmetic, fma, exp, log, tanh, abs, max(a, b) = a > b ? a : b, any_greater and ML_FN. It has no
// guard and includes nothing: an instruction set's code must be compiled inside that instruction
// set's target region.
//
// One token: x_j are its logits, y_j = softcap(x_j) / temperature, p = softmax(y), q its target
// distribution:
//   ce      = sum_j q_j (lse - y_j),   lse = log sum_j exp(y_j)
//   z       = z_loss lse^2
//   q_j     = (1 - smoothing) c_t [j = t]  +  c_j (probs_scale probs_j + uniform)
//              -- the hard part, class t --     -- the soft part, every class --
// A class index has probs_scale = 0 and uniform = smoothing / V; class probabilities have no hard
// part, probs_scale = 1 - smoothing and the same uniform.

// Sums over a row
//
// What a look at a row tells is kept relative to the largest y_j so far. Such sums are a monoid:
// raise() both to a common top, then add(). Vector lanes, threads, segments of a row, blocks and
// shards of a vocabulary are all merged by these two.

// How far below the top a logit can matter: exp(-kUnderflow) is 0. The distance is clamped there,
// so that -inf, whose exponential is 0, does not make 0 * inf.
template <class V>
ML_FN V below_top(V y, V top) {
  return max(V(-Limits<V>::underflow()), y - top);
}

template <class V, int N>
ML_FN V peak_of(V top, const V (&y)[N]) {
  for (int i = 0; i < N; ++i) top = max(y[i], top);
  return top;
}

// Overwrites its terms. A long chain of additions would lose digits.
template <class V, int N>
ML_FN V tree_sum(V (&terms)[N]) {
  for (int width = N / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) terms[i] = terms[i] + terms[i + width];
  }
  return terms[0];
}

// Overwrites its terms.
template <class V, int N>
ML_FN V tree_max(V (&terms)[N]) {
  for (int width = N / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) terms[i] = max(terms[i], terms[i + width]);
  }
  return terms[0];
}

// sum_i a_i b_i, by short chains.
template <class V, int N>
ML_FN V tree_dot(const V (&a)[N], const V (&b)[N]) {
  constexpr int kChains = N > 4 ? N / 4 : 1;
  V sums[kChains];
  for (int i = 0; i < kChains; ++i) sums[i] = a[i] * b[i];
  for (int i = kChains; i < N; ++i) sums[i % kChains] = fma(a[i], b[i], sums[i % kChains]);
  return tree_sum(sums);
}

// log sum_j exp(y_j) in one pass. Invariant: sum = sum_j exp(y_j - top) over all y pushed so far.
// top starts at the lowest finite number: with -inf, a first value of -inf would give
// exp(-inf - -inf) = NaN.
template <class V>
struct LogSumExp {
  V top, sum;

  // Written out: an implicit constructor would not belong to the target region.
  ML_FN LogSumExp() : top(V(Limits<V>::lowest())), sum(V(0)) {}
  ML_FN LogSumExp(V t, V s) : top(t), sum(s) {}
  template <class B>
  ML_FN explicit LogSumExp(const LogSumExp<B>& other) : top(other.top), sum(other.sum) {}

  ML_FN void raise(V to) {
    sum = sum * exp(top - to);
    top = to;
  }

  // N exponentials, and one more where the maximum grows, not 2 N. A NaN reaches sum.
  template <int N>
  ML_FN void push(const V (&y)[N]) {
    const V peak = peak_of(top, y);
    if (any_greater(peak, top)) raise(peak);
    V e[N];
    for (int i = 0; i < N; ++i) e[i] = exp(y[i] - top);
    sum = sum + tree_sum(e);
  }

  // Of the same top.
  ML_FN void add(const LogSumExp& other) { sum = sum + other.sum; }

  ML_FN V value() const { return top + log(sum); }
};

// And the entropy of p: log(sum) + entropy_sum / sum, entropy_sum = sum_j e_j (top - y_j),
// e_j = exp(y_j - top). Nothing cancels, however large the logits are.
template <class V>
struct EntropySums : LogSumExp<V> {
  V entropy_sum;

  ML_FN EntropySums() : entropy_sum(V(0)) {}
  template <class B>
  ML_FN explicit EntropySums(const EntropySums<B>& other)
      : LogSumExp<V>(other), entropy_sum(other.entropy_sum) {}

  ML_FN void raise(V to) {
    entropy_sum = (entropy_sum - this->sum * below_top(this->top, to)) * exp(this->top - to);
    LogSumExp<V>::raise(to);
  }

  template <int N>
  ML_FN void push(const V (&y)[N]) {
    const V peak = peak_of(this->top, y);
    if (any_greater(peak, this->top)) raise(peak);
    V e[N], below[N];
    for (int i = 0; i < N; ++i) {
      e[i] = exp(y[i] - this->top);
      below[i] = e[i] * below_top(y[i], this->top);
    }
    this->sum = this->sum + tree_sum(e);
    entropy_sum = entropy_sum - tree_sum(below);
  }

  ML_FN void add(const EntropySums& other) {
    LogSumExp<V>::add(other);
    entropy_sum = entropy_sum + other.entropy_sum;
  }
};

template <class V>
ML_FN V entropy_term(V e, V y, V top) {
  return V(0) - e * below_top(y, top);
}
template <class A>
ML_FN A entropy(A sum, A entropy_sum) {
  return log(sum) + entropy_sum / sum;
}

// And the soft part of ce: its two sums over the row, and whether another logit wins against the
// target's. For one lane.
template <class A>
struct TargetSums : EntropySums<A> {
  A soft_loss, soft_mass;  // sum_j q_j (top - y_j) and sum_j q_j over the soft part, over its unit
  int beaten;

  ML_FN TargetSums() : soft_loss(A(0)), soft_mass(A(0)), beaten(0) {}
  template <class B>
  ML_FN explicit TargetSums(const TargetSums<B>& other)
      : EntropySums<A>(other),
        soft_loss(other.soft_loss),
        soft_mass(other.soft_mass),
        beaten(other.beaten) {}

  ML_FN void raise(A to) {
    // Of a row of nothing but -inf the top is no logit, and soft_loss infinite, whatever the top.
    if (this->sum != A(0)) soft_loss = soft_loss + soft_mass * (to - this->top);
    EntropySums<A>::raise(to);
  }

  template <int N>
  ML_FN void push(const A (&y)[N], bool with_entropy) {
    A e[N];
    for (int i = 0; i < N; ++i) e[i] = y[i];
    const A peak = tree_max(e);
    if (peak > this->top) raise(peak);
    for (int i = 0; i < N; ++i) e[i] = exp(y[i] - this->top);
    if (with_entropy) {
      A below[N];
      for (int i = 0; i < N; ++i) below[i] = below_top(y[i], this->top);
      this->entropy_sum = this->entropy_sum - tree_dot(e, below);
    }
    this->sum = this->sum + tree_sum(e);
  }
  // After push() of the same y, so that top is not below them. Overwrites q.
  template <int N>
  ML_FN void push_soft(const A (&y)[N], A (&q)[N]) {
    A terms[N];
    for (int i = 0; i < N; ++i) terms[i] = q[i] * (this->top - y[i]);
    soft_loss = soft_loss + tree_sum(terms);
    soft_mass = soft_mass + tree_sum(q);
  }

  // The same where every q is 1.
  template <int N>
  ML_FN void push_uniform(const A (&y)[N]) {
    A terms[N];
    for (int i = 0; i < N; ++i) terms[i] = this->top - y[i];
    soft_loss = soft_loss + tree_sum(terms);
    soft_mass = soft_mass + A(N);
  }

  ML_FN void add(const TargetSums& other) {
    EntropySums<A>::add(other);
    soft_loss = soft_loss + other.soft_loss;
    soft_mass = soft_mass + other.soft_mass;
    beaten |= other.beaten;
  }
};

template <class Sums>
ML_FN void merge(Sums* all, Sums next) {
  const auto top = max(all->top, next.top);
  all->raise(top);
  next.raise(top);
  all->add(next);
}

// A probability that is as good as none, but no zero to divide by.
constexpr float kTiny = 1e-37f;

// From a logit of the model to y.

// 1 / temperature = high + low, low > 0. x high + x low is x / temperature to one rounding, and an
// infinite x stays infinite; a product with a rounded inverse would be off by up to three.
template <class A>
struct InverseTemperature {
  A high, low;

  ML_FN explicit InverseTemperature(double temperature) {
    const double inverse = 1 / temperature;
    high = static_cast<A>(inverse * (1 - Limits<A>::epsilon()));
    low = static_cast<A>(inverse - static_cast<double>(high));
  }
};
template <class V, class A>
ML_FN V cooled(V x, const InverseTemperature<A>& inverse) {
  return fma(x, V(inverse.high), x * V(inverse.low));
}

// y = cap tanh(x / cap). A quotient: where y is large, a rounded inverse would be many roundings of
// exp(y).
template <class V>
ML_FN V softcap(V x, V cap) {
  return cap * tanh(x / cap);
}
// The same, where a division takes long: by the inverse of cap, in two parts.
template <class V, class A>
ML_FN V softcap(V x, V cap, const InverseTemperature<A>& inverse) {
  return cap * tanh(cooled(x, inverse));
}
// rest = 1 - |tanh(u)|, u = x / cap, and dy/dx = 1 - tanh(u)^2 from it. Where tanh is almost 1 no
// digits of it are left to subtract.
template <class V>
ML_FN V tanh_rest(V u) {
  const V e = exp(V(-2) * abs(u));
  return (e + e) / (V(1) + e);
}
template <class V>
ML_FN V tanh_slope(V rest) {
  return rest * (V(2) - rest);
}
// Of softcap(x, cap), by x.
template <class V>
ML_FN V softcap_slope(V x, V cap) {
  return tanh_slope(tanh_rest(x / cap));
}

// Cross entropy

// The soft part of q_j.
template <class V>
ML_FN V soft_target(V class_weight, V probs, V probs_scale, V uniform) {
  return class_weight * (probs_scale * probs + uniform);
}
// Its unit: where the soft part is uniform the sums are of c_j alone, and multiplied at the end.
// The same share added up again and again would be rounded the same way each time.
template <class A>
ML_FN A soft_unit(bool probs, A uniform) {
  return probs ? A(1) : uniform;
}
template <class A>
ML_FN A uniform_in_units(bool probs, A uniform) {
  return probs ? uniform : A(1);
}

// q_j (lse - y_j) of the hard part. (top - y) + log(sum), not lse - y: exact where logits are
// large.
template <class A>
ML_FN A hard_loss(const LogSumExp<A>& lse, A y, A q) {
  return q * ((lse.top - y) + log(lse.sum));
}

template <class A>
ML_FN A z_term(A top, A sum, A z_loss) {
  const A lse = top + log(sum);
  return z_loss * lse * lse;
}
