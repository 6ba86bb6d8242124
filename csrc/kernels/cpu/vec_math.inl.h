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

#include "kernels/tanh.inl.h"
