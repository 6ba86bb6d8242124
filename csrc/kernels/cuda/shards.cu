// SPDX-License-Identifier: BSD-3-Clause
// What shards of the classes told of each token, merged: a thread for each token.
#include <type_traits>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/numbers.cuh"

namespace masked_loss::cuda {
namespace {

// clang-format off
#include "kernels/cuda/functions.inl.cuh"
#include "kernels/groups.inl.h"
#include "kernels/math.inl.h"
#include "kernels/losses.inl.h"
#include "kernels/shards.inl.h"
// clang-format on

constexpr int kThreads = 256;

template <class A>
__global__ void __launch_bounds__(kThreads) merge_kernel(const MergeArgs args) {
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < args.rows;
       i += int64_t{gridDim.x} * kThreads) {
    Merger<A>{args, {args, i}}.run();
  }
}

}  // namespace

void merge(const MergeArgs& args, Stream stream) {
  launch(args.dtype == DType::kFloat64 ? merge_kernel<double> : merge_kernel<float>,
         (args.rows + kThreads - 1) / kThreads, kThreads, 0, stream, args);
}

}  // namespace masked_loss::cuda
