// SPDX-License-Identifier: BSD-3-Clause
// The softcap of some logits of a thread, and its slope: all together, or each would wait for the
// one before. Any other type than float takes the library's tanh.
// Included inside a file's own namespace, after math.inl.h.

template <class A>
struct Softcap {
  A cap;
  InverseTemperature<A> uncap;

  ML_FN explicit Softcap(double cap) : cap(static_cast<A>(cap)), uncap(cap) {}

  template <int N>
  ML_FN void apply(A (&x)[N]) const {
#pragma unroll
    for (A& each : x) each = softcap(each, cap, uncap);
  }
  template <int N>
  ML_FN void apply(A (&x)[N], A (&slope)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) slope[i] = tanh_slope(tanh_rest(cooled(x[i], uncap)));
    apply(x);
  }
};

// Near 0, y = x (1 + u^2 P(u^2)), u = x / cap: eight instructions, and little of what cap's inverse
// is off by. Elsewhere cap - cap rest, which takes an exponential and a reciprocal more: only where
// one of the logits needs it, and mostly none does.
template <>
struct Softcap<float> {
  static constexpr float kNear = 0.625f;
  float cap, inverse, near;
  InverseTemperature<float> uncap;

  ML_FN explicit Softcap(double cap)
      : cap(static_cast<float>(cap)),
        inverse(static_cast<float>(1 / cap)),
        near(kNear * static_cast<float>(cap)),
        uncap(cap) {}

  template <int N>
  ML_FN void apply(float (&x)[N]) const {
    run<false>(x, x);
  }
  template <int N>
  ML_FN void apply(float (&x)[N], float (&slope)[N]) const {
    run<true>(x, slope);
  }

 private:
  template <bool kSlope, int N>
  ML_FN void run(float (&x)[N], float (&slope)[N]) const {
    float y[N], sizes[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      sizes[i] = abs(x[i]);
      const float u = x[i] * inverse, square = u * u;
      y[i] = fma(x[i] * square, tanh_series(square, float()), x[i]);
      if constexpr (kSlope) {
        const float t = y[i] * inverse;
        slope[i] = fma(-t, t, 1.0f);
      }
    }
    if (tree_max(sizes) > near) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float rest = tanh_rest(cooled(x[i], uncap));
        const float far = with_sign(fma(-cap, rest, cap), x[i]);
        y[i] = if_less(near, abs(x[i]), far, y[i]);
        if constexpr (kSlope) slope[i] = if_less(near, abs(x[i]), tanh_slope(rest), slope[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = y[i];
  }
};
