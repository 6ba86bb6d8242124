// SPDX-License-Identifier: BSD-3-Clause
// What the wide vectors share of their elementary functions. Included before a vector type V that
// has fma, arithmetic, abs, if_less and with_sign.

// 2^f, |f| <= 1/2: minimax polynomial for the relative error, 2e-9 before rounding, with the
// constant term fixed to 1, so that exp(0) is exactly 1.
template <class V>
ML_FN V exp2_fraction(V f) {
  V p = V(0.00015353361959569156f);
  p = fma(p, f, V(0.0013398875016719103f));
  p = fma(p, f, V(0.00961843691766262f));
  p = fma(p, f, V(0.055503323674201965f));
  p = fma(p, f, V(0.24022647738456726f));
  p = fma(p, f, V(0.6931471824645996f));
  return fma(p, f, V(1.0f));
}

// tanh(x) / x - 1 over x^2 for |x| <= 0.625, as a polynomial in x^2: of the Cephes library's form
// (fp32), minimax to 1e-17 (fp64).
template <class A>
struct Tanh;
template <>
struct Tanh<float> {
  static constexpr float kCoefficients[] = {-5.70498872745e-3f, 2.06390887954e-2f,
                                            -5.37397155531e-2f, 1.33314422036e-1f,
                                            -3.33332819422e-1f};
};
template <>
struct Tanh<double> {
  static constexpr double kCoefficients[] = {
      -1.6072568848487125872e-5, 7.7144365143505044864e-5,  -2.2856421000511063944e-4,
      5.8631653991530045001e-4,  -1.4549588779078006955e-3, 3.5919891738119406436e-3,
      -8.8632210026321532294e-3, 2.1869487576095108e-2,     -5.3968253931267726014e-2,
      1.3333333333262091411e-1,  -3.3333333333332855266e-1};
};

// Near 0 the polynomial, elsewhere 1 - rest (math.inl.h). A NaN passes both.
template <class V>
ML_FN V tanh_wide(V x) {
  using T = Tanh<typename V::Scalar>;
  const V magnitude = abs(x);
  const V square = x * x;
  V p(T::kCoefficients[0]);
  for (size_t i = 1; i < std::size(T::kCoefficients); ++i) {
    p = fma(p, square, V(T::kCoefficients[i]));
  }
  const V near = fma(p * square, x, x);
  const V far = V(1) - tanh_rest(x);
  return if_less(magnitude, V(0.625f), near, with_sign(far, x));
}
