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

// Near 0 the odd Taylor-like polynomial (of the Cephes library's form), elsewhere
// 1 - 2 / (e^(2|x|) + 1), which is 1 to the last bit from 9.1 on. A NaN passes both.
template <class V>
ML_FN V tanh_wide(V x) {
  const V magnitude = abs(x);
  const V square = x * x;
  V p = V(-5.70498872745e-3f);
  p = fma(p, square, V(2.06390887954e-2f));
  p = fma(p, square, V(-5.37397155531e-2f));
  p = fma(p, square, V(1.33314422036e-1f));
  p = fma(p, square, V(-3.33332819422e-1f));
  const V near = fma(p * square, x, x);
  const V bounded = if_less(V(10.0f), magnitude, V(10.0f), magnitude);
  const V far = V(1.0f) - V(2.0f) / (exp(bounded + bounded) + V(1.0f));
  return if_less(magnitude, V(0.625f), near, with_sign(far, x));
}
