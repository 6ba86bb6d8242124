// SPDX-License-Identifier: BSD-3-Clause
// The mathematics of masked_loss, written once.
//
// Included inside a backend's namespace, after the backend has defined, for its value type V,
// arithmetic, exp, log, tanh, max(a, b) = a > b ? a : b, any_greater and ML_FN. It has no guard and
// includes nothing: an instruction set's code must be compiled inside that instruction set's target
// region.
//
// One token: x_j are its logits, y_j = softcap(x_j), p = softmax(y), q its target distribution:
//   ce      = sum_j q_j (lse - y_j),   lse = log sum_j exp(y_j)
//   z       = z_loss lse^2
//   q_j     = (1 - smoothing) c_t [j = t]  +  c_j (probs_scale probs_j + uniform)
//              -- the hard part, class t --     -- the soft part, every class --
// A class index has probs_scale = 0 and uniform = smoothing / V; class probabilities have no hard
// part, probs_scale = 1 - smoothing and the same uniform.

// log sum_j exp(y_j) in one pass. Invariant: sum = sum_j exp(y_j - top) over all y pushed so far.
// top starts at the lowest finite number: with -inf, a first value of -inf would give
// exp(-inf - -inf) = NaN.
template <class V>
struct LogSumExp {
  V top, sum;

  // Written out: an implicit constructor would not belong to the target region.
  ML_FN LogSumExp() : top(V(Limits<V>::lowest())), sum(V(0)) {}
  ML_FN LogSumExp(V t, V s) : top(t), sum(s) {}

  ML_FN void raise(V to) {
    sum = sum * exp(top - to);
    top = to;
  }

  // N exponentials, and one more where the maximum grows, not 2 N. A NaN reaches sum.
  template <int N>
  ML_FN void push(const V (&y)[N]) {
    V peak = top;
    for (int i = 0; i < N; ++i) peak = max(y[i], peak);
    if (any_greater(peak, top)) raise(peak);
    V part[N];
    for (int i = 0; i < N; ++i) part[i] = exp(y[i] - top);
    for (int width = N / 2; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) part[i] = part[i] + part[i + width];
    }
    sum = sum + part[0];
  }

  ML_FN void merge(const LogSumExp& other) {
    const V peak = max(top, other.top);
    sum = sum * exp(top - peak) + other.sum * exp(other.top - peak);
    top = peak;
  }

  ML_FN V value() const { return top + log(sum); }
};

// y = cap tanh(x / cap), and dy/dx from t = tanh(x / cap).
template <class V>
ML_FN V softcap(V x, V cap, V inverse) {
  return cap * tanh(x * inverse);
}
template <class V>
ML_FN V tanh_slope(V t) {
  return V(1) - t * t;
}

// The soft part of q_j.
template <class V>
ML_FN V soft_target(V class_weight, V probs, V probs_scale, V uniform) {
  return class_weight * (probs_scale * probs + uniform);
}

// q_j (lse - y_j) of the hard part. (top - y) + log(sum), not lse - y: exact where logits are
// large.
template <class A>
ML_FN A hard_loss(const LogSumExp<A>& lse, A y, A q) {
  return q * ((lse.top - y) + log(lse.sum));
}

// The soft part of ce, from its two sums over the row: sum_j q_j (top - y_j) and sum_j q_j.
template <class A>
ML_FN A soft_loss(const LogSumExp<A>& lse, A below, A mass) {
  return below + mass * log(lse.sum);
}

template <class A>
ML_FN A z_term(A top, A sum, A z_loss) {
  const A lse = top + log(sum);
  return z_loss * lse * lse;
}

// d(ce_scale ce + z_scale z) / dy_j = softmax exp(y_j - top) - soft q_j(soft part) - [j = t] hard
template <class A>
struct LogitGrad {
  A softmax, soft, hard;
  A mass, z;  // for target_grad(): the target distribution's over sum, and the z-loss's share
};
template <class A>
ML_FN LogitGrad<A> logit_grad(const LogSumExp<A>& lse, A mass, A hard, A z_loss, A ce_scale,
                              A z_scale) {
  // Without a z-loss its term must not appear at all: 0 * lse is NaN for an infinite lse.
  const A z = z_loss != A(0) ? A(2) * z_scale * z_loss * lse.value() / lse.sum : A(0);
  return {ce_scale * mass / lse.sum + z, ce_scale, ce_scale * hard, mass / lse.sum, z};
}
template <class V>
ML_FN V softmax_grad(V y, V top, V softmax) {
  return softmax * exp(y - top);
}

// All of it at the target, whose whole part is q. Where p is almost 1 this is a difference of
// almost equal numbers: they are subtracted first, and a z-loss is added to what is left.
template <class A>
ML_FN A target_grad(A y, A top, A q, const LogitGrad<A>& g) {
  const A e = exp(y - top);
  return g.soft * (g.mass * e - q) + g.z * e;
}

// The entropy of p from spread = sum_j e_j (top - y_j), e_j = exp(y_j - top). y = -inf has e = 0:
// 0 * inf must not be made.
template <class V>
ML_FN V spread_term(V e, V y, V top) {
  return e * (V(0) - max(V(Limits<V>::lowest()), y - top));
}
template <class A>
ML_FN A entropy(A sum, A spread) {
  return log(sum) + spread / sum;
}

// Everything that one look at a row can tell: beside its logsumexp the sums of soft_loss() and the
// entropy, all kept relative to a top that grows. For one lane.
template <class A>
struct RowSums {
  LogSumExp<A> lse;
  A below, mass;  // sum_j q_j (top - y_j) and sum_j q_j over the soft part
  A spread;       // sum_j exp(y_j - top) (top - y_j)

  ML_FN RowSums() : below(A(0)), mass(A(0)), spread(A(0)) {}

  ML_FN void raise(A to) {
    const A step = to - lse.top;
    if (lse.sum != A(0)) {  // else step may be infinite, and nothing depends on it
      below = below + mass * step;
      spread = (spread + lse.sum * step) * exp(-step);
    }
    lse.raise(to);
  }

  template <int N>
  ML_FN void push(const A (&y)[N]) {
    A peak = lse.top;
    for (int i = 0; i < N; ++i) peak = max(y[i], peak);
    if (peak > lse.top) raise(peak);
    for (int i = 0; i < N; ++i) {
      const A p = exp(y[i] - lse.top);
      lse.sum = lse.sum + p;
      spread = spread + spread_term(p, y[i], lse.top);
    }
  }
  // After push() of the same y, so that top is not below it.
  ML_FN void push_target(A y, A q) {
    below = below + q * (lse.top - y);
    mass = mass + q;
  }

  // Of the same top.
  ML_FN void add(const RowSums& other) {
    lse.sum = lse.sum + other.lse.sum;
    below = below + other.below;
    mass = mass + other.mass;
    spread = spread + other.spread;
  }
};
