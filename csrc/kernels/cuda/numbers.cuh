// SPDX-License-Identifier: BSD-3-Clause
// Number formats, and integers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/args.h"
#include "kernels/half.h"

#define ML_FN __device__ __forceinline__

namespace masked_loss::cuda {

ML_FN float widen(float x) { return x; }
ML_FN double widen(double x) { return x; }
ML_FN float widen(BFloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
ML_FN float widen(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }

ML_FN void narrow(float x, float* out) { *out = x; }
ML_FN void narrow(double x, double* out) { *out = x; }
ML_FN void narrow(float x, BFloat16* out) {
  out->bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
ML_FN void narrow(float x, Float16* out) { out->bits = __half_as_ushort(__float2half_rn(x)); }

template <class T>
struct Accumulation {
  using Type = float;
};
template <>
struct Accumulation<double> {
  using Type = double;
};

ML_FN int64_t index_at(const void* target, DType type, int64_t i) {
  return type == DType::kInt64 ? static_cast<const int64_t*>(target)[i]
                               : static_cast<const int32_t*>(target)[i];
}

// a / b, a >= 0. A 64-bit division takes a hundred instructions, a 32-bit one twenty, and mostly
// there is one batch of rows, one group of tokens, or one part of a row.
ML_FN int64_t quotient(int64_t a, int64_t b) {
  if (a < b) return 0;
  if (b == 1) return a;
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

__host__ ML_FN int64_t size_of(DType type) {
  switch (type) {
    case DType::kFloat64:
    case DType::kInt64:
      return 8;
    case DType::kFloat32:
    case DType::kInt32:
      return 4;
    case DType::kBFloat16:
    case DType::kFloat16:
    case DType::kInt16:
      return 2;
    default:
      return 1;
  }
}

// Has the L2 fetch the 128 bytes that hold *p, and waits for nothing.
ML_FN void prefetch_line([[maybe_unused]] const void* p) {
#if defined(__CUDA_ARCH__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#endif
}

// An optimization barrier: what is computed from the result is computed again, rather than kept in
// registers.
template <class X>
ML_FN X opaque(X x) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+l"(x));
#endif
  return x;
}

}  // namespace masked_loss::cuda
