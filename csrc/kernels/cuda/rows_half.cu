// SPDX-License-Identifier: BSD-3-Clause
// Rows of bfloat16 and of float16.
#include <climits>
#include <type_traits>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/rows.h"
#include "kernels/cuda/team.cuh"
#include "kernels/cuda/word16.cuh"

namespace masked_loss::cuda {
namespace {

#include "kernels/cuda/functions.inl.cuh"

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

// clang-format off
#include "kernels/cuda/tanh.inl.cuh"
#include "kernels/groups.inl.h"
#include "kernels/math.inl.h"
#include "kernels/losses.inl.h"
#include "kernels/shards.inl.h"
#include "kernels/cuda/look.inl.cuh"
#include "kernels/cuda/forward.inl.cuh"
#include "kernels/cuda/row.inl.cuh"
#include "kernels/cuda/shard.inl.cuh"
#include "kernels/cuda/rows.inl.cuh"
// clang-format on

}  // namespace

void launch_half_rows(const RowArgs& args, const Plan& plan, Stream stream) {
  if (args.dtype == DType::kBFloat16) return launch_rows<BFloat16>(args, plan, stream);
  launch_rows<Float16>(args, plan, stream);
}

}  // namespace masked_loss::cuda
