// SPDX-License-Identifier: BSD-3-Clause
#include "ops/backend_of.h"

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

void check(int error) {
  if (error == cudaSuccess) return;
  if (error == cudaErrorInsufficientDriver) {
    int driver = 0;
    cudaDriverGetVersion(&driver);
    STD_TORCH_CHECK(false, "masked_loss: its CUDA kernels were built with CUDA ",
                    CUDART_VERSION / 1000, ".", CUDART_VERSION % 1000 / 10,
                    ", expected a driver for that, got one for CUDA ", driver / 1000, ".",
                    driver % 1000 / 10,
                    ". Update the driver, or build from source with an older toolkit.");
  }
  if (error == cudaErrorNoKernelImageForDevice) {
    int device = 0, major = 0, minor = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    STD_TORCH_CHECK(false, "masked_loss: its CUDA kernels were built for the architectures ",
                    architectures(), " (compute capability times 100), expected one for ", major,
                    ".", minor,
                    ", this device's. Build from source with TORCH_CUDA_ARCH_LIST=", major, ".",
                    minor, ", or with MASKED_LOSS_CUDA_RELEASE=1 for 7.5 and newer.");
  }
  STD_CUDA_CHECK(static_cast<cudaError_t>(error));
}

}  // namespace masked_loss::cuda
#endif

namespace masked_loss {
namespace {

const Backend& backend_of(const torch::stable::Tensor& t) {
  if (t.is_cpu()) return cpu::kBackend;
#if defined(MASKED_LOSS_WITH_CUDA)
  return cuda::kBackend;
#else
  check::fail("RuntimeError",
              "masked_loss: this build has no CUDA kernels, and a CUDA tensor came. Install it "
              "again from a checkout of the sources, where nvcc is found: "
              "MASKED_LOSS_CUDA=1 pip install --no-build-isolation --force-reinstall --no-deps .");
#endif
}

void run_on_threads(const std::function<void()>& worker) {
  const int64_t count = torch::stable::get_num_threads();
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) worker();
  });
}

}  // namespace

Device::Device(const torch::stable::Tensor& t) : kernels(backend_of(t)), index_(0) {
  if (t.is_cpu()) return;
  index_ = t.get_device_index();
  guard_.emplace(index_);
}

Queue Device::queue() const {
#if defined(MASKED_LOSS_WITH_CUDA)
  if (guard_) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return stream;
  }
#endif
  thread_local cpu::Threads threads{1, run_on_threads};
  threads.count = torch::stable::get_num_threads();
  return &threads;
}

void ask_for_large_pages([[maybe_unused]] const torch::stable::Tensor& t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // Fresh memory comes page by page as it is written: 32,000 faults for 128 MiB, most of the time
  // of a backward pass. Only whole pages inside the tensor are touched. madvise is advisory: a
  // failure is harmless.
  const int64_t bytes = t.numel() * t.element_size();
  if (!t.is_cpu() || bytes < cpu::kBackend.cache_bytes) return;
  const uintptr_t data = reinterpret_cast<uintptr_t>(t.data_ptr());
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (data + page - 1) / page * page, end = (data + bytes) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace masked_loss
