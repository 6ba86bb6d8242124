// SPDX-License-Identifier: BSD-3-Clause
// Pairs of rows whose student is of bfloat16 or of float16.
#include <climits>
#include <type_traits>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/pairs.h"
#include "kernels/cuda/team.cuh"
#include "kernels/cuda/word16.cuh"

namespace masked_loss::cuda {
namespace {

#include "kernels/cuda/functions.inl.cuh"

// As in rows_half.cu: an fma and an ex2 less than expf takes, and of exp(y - top) alone.
ML_FN float exp2(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return ::exp2f(x);
#endif
}
ML_FN float exp(float x) { return exp2(x * 1.4426950408889634f); }

// clang-format off
#include "kernels/cuda/tanh.inl.cuh"
#include "kernels/groups.inl.h"
#include "kernels/math.inl.h"
// clang-format on

// Exponentials relative to a top take one fma and one ex2, in units whose rounding is made up for
// once: scaled is the top's product with log2(e), rounded.
constexpr float kLog2E = 1.4426950408889634f;

template <class A>
struct Exponential {
  float top, scaled;
  ML_FN explicit Exponential(float top) : top(top), scaled(top * kLog2E) {}
  // Not where the product is no number.
  ML_FN bool fits() const { return abs(scaled) <= -Limits<float>::lowest(); }
  ML_FN float operator()(float y) const { return exp2(fma(y, kLog2E, -scaled)); }
  ML_FN float unit() const { return exp2(-fma(top, kLog2E, -scaled)); }
};

// A thread's LogSumExp in such units.
template <class A>
struct ThreadSum {
  static constexpr float kLowest = -2e38f;
  Exponential<float> e{kLowest};
  float sum = 0;

  template <int N>
  ML_FN void push(float (&y)[N]) {
    const float peak = peak_of(e.top, y);
    if (peak > e.top) {
      const Exponential<float> raised(peak);
      sum = sum * exp2(e.scaled - raised.scaled);
      e = raised;
    }
#pragma unroll
    for (float& each : y) each = e(each);
    sum = sum + tree_sum(y);
  }
  // Not NaN, infinities, and numbers too large; nor none at all.
  ML_FN bool fits() const { return sum > 0 && sum <= -Limits<float>::lowest(); }
  ML_FN LogSumExp<float> logsumexp() const { return {e.top, sum * e.unit()}; }
};

// clang-format off
#include "kernels/cuda/side.inl.cuh"
#include "kernels/cuda/pairs.inl.cuh"
// clang-format on

}  // namespace

void launch_half_pairs(const DivergenceArgs& args, const PairPlan& plan, Stream stream) {
  if (args.student.dtype == DType::kBFloat16) return launch_pairs<BFloat16>(args, plan, stream);
  launch_pairs<Float16>(args, plan, stream);
}

}  // namespace masked_loss::cuda
