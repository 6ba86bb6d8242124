// SPDX-License-Identifier: BSD-3-Clause
#include "ops/device.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "kernels/cpu/backend.h"
#include "ops/check.h"
#if defined(MASKED_LOSS_WITH_CUDA)
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>

#include "kernels/cuda/backend.h"

// Only a torch that was built with CUDA has these. Bound weakly, they let the same library load
// into one that was not.
#pragma weak aoti_torch_get_current_cuda_stream
#pragma weak torch_c10_cuda_check_msg
#pragma weak torch_c10_cuda_free_error_msg

namespace masked_loss::cuda {

Stream current_stream(int32_t device) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

void check(int error) { STD_CUDA_CHECK(static_cast<cudaError_t>(error)); }

}  // namespace masked_loss::cuda
#endif

namespace masked_loss {
namespace {

// Less work than this is done before another thread has woken up.
constexpr int64_t kSerialWork = 1 << 15;

cpu::Threads threads_for(int64_t work) {
  const int64_t count = work < kSerialWork ? 1 : torch::stable::get_num_threads();
  return {count, [count](const std::function<void()>& worker) {
            torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) worker();
            });
          }};
}

}  // namespace

Device Device::of(const torch::stable::Tensor& t) {
  if (t.is_cpu()) return {false, 0};
#if !defined(MASKED_LOSS_WITH_CUDA)
  check::fail(
      "RuntimeError",
      "masked_loss: this build has no CUDA kernels, and a CUDA tensor came. Install it from "
      "source where nvcc is found: MASKED_LOSS_CUDA=1 pip install --no-binary masked_loss "
      "masked_loss");
#endif
  return {true, t.get_device_index()};
}

// One line per kernel: the CPU's threads, or the device's stream.
#if defined(MASKED_LOSS_WITH_CUDA)
#define ML_RUN(kernel, args, work)                               \
  if (cuda_) {                                                   \
    const torch::stable::accelerator::DeviceGuard guard(index_); \
    return cuda::kernel(args, cuda::current_stream(index_));     \
  }                                                              \
  return cpu::kernel(args, threads_for(work))
#else
#define ML_RUN(kernel, args, work) return cpu::kernel(args, threads_for(work))
#endif

int64_t Device::weigh(const WeighArgs& args) const { ML_RUN(weigh, args, args.tokens); }
void Device::cross_entropy(const CrossEntropyArgs& args) const {
  ML_RUN(cross_entropy, args, args.rows * args.cols);
}
void Device::rescale(const CrossEntropyArgs& args) const {
  ML_RUN(rescale, args, args.rows * args.cols);
}
void Device::load_values(const ValuesArgs& args) const { ML_RUN(load_values, args, args.tokens); }
void Device::reduce(const ReduceArgs& args) const { ML_RUN(reduce, args, args.tokens); }
void Device::mask_grad(const MaskGradArgs& args) const { ML_RUN(mask_grad, args, args.tokens); }
void Device::values_grad(const ValuesArgs& args) const { ML_RUN(values_grad, args, args.tokens); }

#if defined(MASKED_LOSS_WITH_CUDA)
#define ML_SCRATCH(args)                                       \
  if (!cuda_) return 0;                                        \
  const torch::stable::accelerator::DeviceGuard guard(index_); \
  return cuda::scratch_bytes(args)
#else
#define ML_SCRATCH(args) return 0
#endif

int64_t Device::scratch_bytes([[maybe_unused]] const WeighArgs& args) const { ML_SCRATCH(args); }
int64_t Device::scratch_bytes([[maybe_unused]] const CrossEntropyArgs& args) const {
  ML_SCRATCH(args);
}
int64_t Device::scratch_bytes([[maybe_unused]] const ReduceArgs& args) const { ML_SCRATCH(args); }

bool Device::prepare_output(void* data, int64_t bytes, bool fresh) const {
  constexpr int64_t kLarge = 4 << 20, kLargeOnCuda = 32 << 20;  // on CUDA: most of an L2
  if (cuda_) return bytes > kLargeOnCuda;
  if (bytes < kLarge || !fresh) return bytes >= kLarge;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // Fresh memory comes page by page as it is written: 32,000 faults for 128 MiB, most of the time
  // of a backward pass. Only whole pages inside the tensor are touched, and it is only a wish.
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return true;
}

}  // namespace masked_loss
