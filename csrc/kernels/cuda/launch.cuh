// SPDX-License-Identifier: BSD-3-Clause
// How a kernel is launched: its grid, its shared memory, its stream.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <map>
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

// A kernel is loaded when it is first asked about, or launched; a stream that is being captured
// allows that in relaxed mode alone, and a loss may well be the first call of a capture.
inline cudaFuncAttributes loaded(const void* kernel) {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  check(cudaThreadExchangeStreamCaptureMode(&mode));
  cudaFuncAttributes own{};
  const int error = cudaFuncGetAttributes(&own, kernel);
  if (error) cudaGetLastError();  // it would be said again of a later call, a good one
  check(cudaThreadExchangeStreamCaptureMode(&mode));  // as it was
  check(error);
  return own;
}

// What the current device has. Asked for once: a plan wants all of it, for each call.
struct Chip {
  int64_t multiprocessors, l2_bytes;
  int64_t shared_of_block, shared_of_multiprocessor;  // bytes, at most
  bool clusters;  // of blocks: by the device, and by the code that it runs, which may be older
};

template <int>
__global__ void nothing() {}

inline const Chip& chip() {
  static std::mutex mutex;
  static std::map<int, Chip> chips;
  const int device = current_device();
  const std::lock_guard<std::mutex> lock(mutex);
  const auto known = chips.find(device);
  if (known != chips.end()) return known->second;
  const auto ask = [device](cudaDeviceAttr name) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, name, device));
    return int64_t{value};
  };
  const bool clusters = ask(cudaDevAttrClusterLaunch) &&
                        loaded(reinterpret_cast<const void*>(nothing<0>)).ptxVersion >= 90;
  return chips[device] = {ask(cudaDevAttrMultiProcessorCount), ask(cudaDevAttrL2CacheSize),
                          ask(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                          ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor), clusters};
}

// What a kernel needs before its first launch on a device: to be loaded, and above 48 KB, what it
// declares included, shared memory must be asked for. Once for all, and as much as there is: a
// limit that followed each launch would be moved by one thread between another's limit and launch.
inline void prepare(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> prepared;
  const int device = current_device();
  const std::lock_guard<std::mutex> lock(mutex);
  if (prepared.count({kernel, device})) return;
  const int64_t own = static_cast<int64_t>(loaded(kernel).sharedSizeBytes);
  const int error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         static_cast<int>(chip().shared_of_block - own));
  if (error) cudaGetLastError();
  check(error);
  prepared.insert({kernel, device});
}

// A grid of blocks, of which `cluster` neighbours may wait for one another.
struct Grid {
  int64_t blocks;
  int threads;
  int64_t shared;
  int cluster = 1;
};

// Kernels loop over whatever is beyond the largest grid.
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), const Grid& grid, Stream stream, const Args&... args) {
  constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 8;  // whole clusters
  if (grid.blocks == 0) return;
  prepare(reinterpret_cast<const void*>(kernel));
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(std::min(grid.blocks, kMaxBlocks)));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = static_cast<size_t>(grid.shared);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = grid.cluster > 1;
  const int error = cudaLaunchKernelEx(&config, kernel, args...);
  if (error) cudaGetLastError();  // it would be said again of the next launch, a good one
  check(error);
}
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), int64_t blocks, int threads, int64_t shared, Stream stream,
            const Args&... args) {
  launch(kernel, Grid{blocks, threads, shared}, stream, args...);
}

}  // namespace masked_loss::cuda
