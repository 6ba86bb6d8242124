// SPDX-License-Identifier: BSD-3-Clause
// tanh where the library's own takes long: of the wide vectors, and of CUDA's float. For a type V
// that has fma, arithmetic, abs, if_less, with_sign and a tanh_rest (math.inl.h's will do).

// tanh(x) / x - 1 over x^2 for |x| <= 0.625, as a polynomial in x^2: of the Cephes library's form
// (fp32), minimax to 1e-17 (fp64).
template <class V>
ML_FN V tanh_series(V square, float) {
  V p(-5.70498872745e-3f);
  p = fma(p, square, V(2.06390887954e-2f));
  p = fma(p, square, V(-5.37397155531e-2f));
  p = fma(p, square, V(1.33314422036e-1f));
  return fma(p, square, V(-3.33332819422e-1f));
}
template <class V>
ML_FN V tanh_series(V square, double) {
  V p(-1.6072568848487125872e-5);
  p = fma(p, square, V(7.7144365143505044864e-5));
  p = fma(p, square, V(-2.2856421000511063944e-4));
  p = fma(p, square, V(5.8631653991530045001e-4));
  p = fma(p, square, V(-1.4549588779078006955e-3));
  p = fma(p, square, V(3.5919891738119406436e-3));
  p = fma(p, square, V(-8.8632210026321532294e-3));
  p = fma(p, square, V(2.1869487576095108e-2));
  p = fma(p, square, V(-5.3968253931267726014e-2));
  p = fma(p, square, V(1.3333333333262091411e-1));
  return fma(p, square, V(-3.3333333333332855266e-1));
}

// Near 0 the series, elsewhere 1 - rest (math.inl.h). A NaN passes both.
template <class Scalar, class V>
ML_FN V tanh_wide(V x) {
  const V square = x * x;
  const V near = fma(tanh_series(square, Scalar()) * square, x, x);
  const V far = V(1) - tanh_rest(x);
  return if_less(abs(x), V(0.625f), near, with_sign(far, x));
}
