// SPDX-License-Identifier: BSD-3-Clause
// Pairs of rows whose student is of float or of double.
#include <climits>
#include <type_traits>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/pairs.h"
#include "kernels/cuda/team.cuh"
#include "kernels/cuda/word16.cuh"

namespace masked_loss::cuda {
namespace {

#include "kernels/cuda/functions.inl.cuh"

// Right to the last bit but one: a float gradient shows it.
ML_FN float exp(float x) { return ::expf(x); }
ML_FN float exp2(float x) { return ::exp2f(x); }

// clang-format off
#include "kernels/cuda/tanh.inl.cuh"
#include "kernels/groups.inl.h"
#include "kernels/math.inl.h"
#include "kernels/cuda/side.inl.cuh"
#include "kernels/cuda/pair_sums.inl.cuh"
#include "kernels/cuda/pair_full.inl.cuh"
// clang-format on

template <class A>
using Exponential = FullExp<A>;
template <class A, class T>
using ThreadSum = FullSum<A>;

// clang-format off
#include "kernels/cuda/pair_softmax.inl.cuh"
#include "kernels/cuda/pair_rows.inl.cuh"
#include "kernels/cuda/pair_look.inl.cuh"
#include "kernels/cuda/pair_stats.inl.cuh"
#include "kernels/cuda/pairs.inl.cuh"
// clang-format on

}  // namespace

void launch_full_pairs(const DivergenceArgs& args, const PairPlan& plan, Stream stream) {
  if (args.wide) return launch_pairs<double>(args, plan, stream);
  launch_pairs<float>(args, plan, stream);
}

}  // namespace masked_loss::cuda
