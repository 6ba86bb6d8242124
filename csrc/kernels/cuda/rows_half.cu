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

// clang-format off
#include "kernels/cuda/half_exp.inl.cuh"
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

void launch_half_rows(const RowArgs& args, const Plan& plan, Stream stream) {
  if (args.dtype == DType::kBFloat16) return launch_rows<BFloat16>(args, plan, stream);
  launch_rows<Float16>(args, plan, stream);
}

}  // namespace masked_loss::cuda
