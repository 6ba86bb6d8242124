// SPDX-License-Identifier: BSD-3-Clause
// Rows of float and of double.
#include <climits>
#include <type_traits>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/rows.h"
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
#include "kernels/losses.inl.h"
#include "kernels/shards.inl.h"
#include "kernels/cuda/softcap.inl.cuh"
#include "kernels/cuda/scaled_sum.inl.cuh"
#include "kernels/cuda/look.inl.cuh"
#include "kernels/cuda/forward.inl.cuh"
#include "kernels/cuda/row.inl.cuh"
#include "kernels/cuda/shard.inl.cuh"
#include "kernels/cuda/rows.inl.cuh"
// clang-format on

}  // namespace

void launch_full_rows(const RowArgs& args, const Plan& plan, Stream stream) {
  if (args.dtype == DType::kFloat64) return launch_rows<double>(args, plan, stream);
  launch_rows<float>(args, plan, stream);
}

}  // namespace masked_loss::cuda
