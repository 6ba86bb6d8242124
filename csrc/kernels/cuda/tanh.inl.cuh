// SPDX-License-Identifier: BSD-3-Clause
// tanh of float, and what is left of it to 1, from one exponential and one reciprocal: CUDA's tanhf
// and the division of tanh_rest (math.inl.h) take four times as many instructions, and a row with a
// softcap would be computed for longer than it is read.
// Included inside a file's own namespace, after exp2(float) and before math.inl.h.

// Both are computed first: a branch at each logit would have it wait for the one before.
ML_FN float if_less(float a, float b, float yes, float no) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("{ .reg .pred p; setp.lt.f32 p, %1, %2; selp.f32 %0, %3, %4, p; }"
      : "=f"(result)
      : "f"(a), "f"(b), "f"(yes), "f"(no));
  return result;
#else
  return a < b ? yes : no;
#endif
}
ML_FN float with_sign(float magnitude, float sign) { return ::copysignf(magnitude, sign); }

ML_FN float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return ::__frcp_rn(x);
#endif
}

ML_FN float tanh_rest(float u) {
  const float e = exp2(-2.8853900817779268f * abs(u));  // exp(-2 |u|)
  return (e + e) * reciprocal(1.0f + e);
}

#include "kernels/tanh.inl.h"

ML_FN float tanh(float u) { return tanh_wide<float>(u); }
