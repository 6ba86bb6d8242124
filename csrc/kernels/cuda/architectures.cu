// SPDX-License-Identifier: BSD-3-Clause
// What the CUDA kernels were compiled for, as nvcc was told.
#include "kernels/cuda/backend.h"

#define ML_TEXT_OF(...) #__VA_ARGS__
#define ML_TEXT(...) ML_TEXT_OF(__VA_ARGS__)

namespace masked_loss::cuda {

const char* architectures() {
#if defined(__CUDA_ARCH_LIST__)
  return ML_TEXT(__CUDA_ARCH_LIST__);
#else
  return "";
#endif
}

}  // namespace masked_loss::cuda
