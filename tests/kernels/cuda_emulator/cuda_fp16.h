// SPDX-License-Identifier: BSD-3-Clause
// The conversions of CUDA's header of this name that csrc/kernels/cuda uses.
#pragma once

#include <cmath>

#include "kernels/half.h"

struct __half {
  unsigned short bits;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline __half __float2half_rn(float x) { return {masked_loss::to_float16(x).bits}; }
inline float __half2float(__half x) { return masked_loss::to_float(masked_loss::Float16{x.bits}); }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
inline float __low2float(__half2 x) { return __half2float(x.x); }
inline float __high2float(__half2 x) { return __half2float(x.y); }
inline __half2 __hmax2(__half2 a, __half2 b) {
  return __floats2half2_rn(fmaxf(__low2float(a), __low2float(b)),
                           fmaxf(__high2float(a), __high2float(b)));
}
