// SPDX-License-Identifier: BSD-3-Clause
// The conversions of CUDA's header of this name that csrc/kernels/cuda uses.
#pragma once

#include <cmath>

#include "kernels/half.h"

struct __nv_bfloat16 {
  unsigned short bits;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {masked_loss::to_bfloat16(x).bits}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline float __low2float(__nv_bfloat162 x) {
  return masked_loss::to_float(masked_loss::BFloat16{x.x.bits});
}
inline float __high2float(__nv_bfloat162 x) {
  return masked_loss::to_float(masked_loss::BFloat16{x.y.bits});
}
inline __nv_bfloat162 __hmax2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return __floats2bfloat162_rn(fmaxf(__low2float(a), __low2float(b)),
                               fmaxf(__high2float(a), __high2float(b)));
}
