// SPDX-License-Identifier: BSD-3-Clause
// How a kernel is launched: its grid, its shared memory, its stream.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <set>
#include <utility>

#include "kernels/cuda/backend.h"

namespace masked_loss::cuda {

// A kernel's dynamic shared memory.
extern __shared__ uint4 shared_memory[];

inline int current_device() {
  int device = 0;
  check(cudaGetDevice(&device));
  return device;
}

inline int attribute(cudaDeviceAttr name) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, current_device()));
  return value;
}

// Above 48 KB, what the kernel itself declares included, shared memory must be asked for. Once for
// all, and as much as there is: a limit that followed each launch would be moved by one thread
// between another's limit and launch.
//
// A kernel that is asked about is loaded, where it was not yet; a stream that is being captured
// allows that in relaxed mode alone, and a loss may well be the first call of a capture.
inline void allow_shared(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  const int device = current_device();
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device})) return;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  check(cudaThreadExchangeStreamCaptureMode(&mode));
  cudaFuncAttributes own{};
  int error = cudaFuncGetAttributes(&own, kernel);
  if (!error) {
    const int most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 most - static_cast<int>(own.sharedSizeBytes));
  }
  check(cudaThreadExchangeStreamCaptureMode(&mode));  // as it was
  check(error);
  allowed.insert({kernel, device});
}

// Kernels loop over whatever is beyond the largest grid.
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), int64_t blocks, int threads, int64_t shared, Stream stream,
            const Args&... args) {
  constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;
  if (blocks == 0) return;
  if (shared > 0) allow_shared(reinterpret_cast<const void*>(kernel));
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(std::min(blocks, kMaxBlocks)));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = static_cast<cudaStream_t>(stream);
  const int error = cudaLaunchKernelEx(&config, kernel, args...);
  if (error) cudaGetLastError();  // it would be said again of the next launch, a good one
  check(error);
}

}  // namespace masked_loss::cuda
