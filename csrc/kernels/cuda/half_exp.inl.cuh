// SPDX-License-Identifier: BSD-3-Clause
// exp of half rows.
// Included inside a file's own namespace, before tanh.inl.cuh.

ML_FN float exp2(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return ::exp2f(x);
#endif
}
// Three instructions where expf takes eight: at two bytes a logit, the arithmetic of a forward pass
// would not keep up with the memory of an H200. Kernels take only exp(y - top) of it, y <= top, and
// the product's rounding, |y - top| 2^-24 of the result, is at most 0.37 2^-24 of the sum that the
// result is added to, since that sum holds exp(0) = 1. A half type's gradient does not show it.
ML_FN float exp(float x) { return exp2(x * 1.4426950408889634f); }
