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

// clang-format off
#include "kernels/cuda/half_exp.inl.cuh"
#include "kernels/cuda/tanh.inl.cuh"
#include "kernels/groups.inl.h"
#include "kernels/math.inl.h"
#include "kernels/cuda/side.inl.cuh"
#include "kernels/cuda/pair_sums.inl.cuh"
#include "kernels/cuda/scaled_sum.inl.cuh"
#include "kernels/cuda/pair_half.inl.cuh"
// clang-format on

template <class A>
using Exponential = HalfExp;
template <class A, class T>
using ThreadSum = HalfSum<T>;

// clang-format off
#include "kernels/cuda/pair_softmax.inl.cuh"
#include "kernels/cuda/pair_rows.inl.cuh"
#include "kernels/cuda/pair_look.inl.cuh"
#include "kernels/cuda/pair_stats.inl.cuh"
#include "kernels/cuda/pairs.inl.cuh"
// clang-format on

}  // namespace

void launch_half_pairs(const DivergenceArgs& args, const PairPlan& plan, Stream stream) {
  if (args.student.dtype == DType::kBFloat16) return launch_pairs<BFloat16>(args, plan, stream);
  launch_pairs<Float16>(args, plan, stream);
}

}  // namespace masked_loss::cuda
