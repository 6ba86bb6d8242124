// SPDX-License-Identifier: BSD-3-Clause
// What the library is asked about itself.
#include "kernels/cpu/backend.h"
#include "ops/check.h"
#include "ops/ops.h"
#if defined(MASKED_LOSS_WITH_CUDA)
#include "kernels/cuda/backend.h"
#endif

namespace masked_loss {

void check_formula(std::string who, const Options& options) {
  check::formula(who.c_str(), options);
}

std::string cpu_capability() { return cpu::kernels().name; }

std::string cuda_architectures() {
#if defined(MASKED_LOSS_WITH_CUDA)
  return cuda::architectures();
#else
  return "";
#endif
}

std::tuple<int64_t, int64_t, int64_t, int64_t> table_sizes() {
  return {TokenField::kSaved, TokenField::kCount, GroupField::kCount, StatField::kCount};
}

}  // namespace masked_loss
