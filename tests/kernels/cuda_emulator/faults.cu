// SPDX-License-Identifier: BSD-3-Clause
// Kernels with one fault each, which the emulator must notice: what its silence about the library's
// kernels is worth.
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/team.cuh"

namespace emulator {
namespace {

using masked_loss::cuda::shared_memory;

__global__ void writes_beyond_shared_memory(int pieces) {
  if (threadIdx.x == 0) shared_memory[pieces] = uint4{};
}

__global__ void waits_at_different_calls() {
  if (threadIdx.x != 5) __syncwarp();
  __shfl_sync(~0u, threadIdx.x, 0);
}

__global__ void never_reaches_the_barrier() {
  if (threadIdx.x < 40) __syncthreads();
  if (threadIdx.x >= 40) __shfl_sync(~0u, threadIdx.x, 0);
}

__global__ void leaves_others_of_its_cluster_waiting() {
  if (blockIdx.x > 0) masked_loss::cuda::cluster_barrier();
}

__global__ void does_nothing() {}

__global__ void reads_beyond(const float* numbers, int64_t n, float* sum) {
  for (int64_t i = 0; i <= n; ++i) *sum += numbers[i];
}

__global__ void writes_what_another_block_writes(float* number) {
  if (threadIdx.x == 0) *number = static_cast<float>(blockIdx.x);
}

// Of a cluster, with its barrier behind, not between.
__global__ void reads_what_another_block_writes(float* numbers) {
  if (threadIdx.x == 0 && blockIdx.x == 0) numbers[0] = 1;
  if (threadIdx.x == 0 && blockIdx.x == 1) numbers[1] = numbers[0];
  masked_loss::cuda::cluster_barrier();
}

__global__ void reads_what_no_barrier_orders(float* number) {
  const unsigned i = threadIdx.x;
  shared_memory[i].x = i;
  __shfl_sync(~0u, i, 0);  // orders nothing
  if (i == 0) *number = static_cast<float>(shared_memory[1].x);
}

}  // namespace

// `numbers` [n] is torch's memory.
void make_fault(const char* what, float* numbers, int64_t n) {
  using masked_loss::cuda::Grid;
  using masked_loss::cuda::launch;
  const std::string fault = what;
  float sum = 0;
  if (fault == "shared memory") {
    launch(writes_beyond_shared_memory, 1, 64, 256, nullptr, 16);
  } else if (fault == "calls") {
    launch(waits_at_different_calls, 1, 32, 0, nullptr);
  } else if (fault == "barrier") {
    launch(never_reaches_the_barrier, 1, 64, 0, nullptr);
  } else if (fault == "cluster") {
    launch(leaves_others_of_its_cluster_waiting, Grid{2, 32, 0, 2}, nullptr);
  } else if (fault == "no cluster") {
    launch(leaves_others_of_its_cluster_waiting, 2, 32, 0, nullptr);
  } else if (fault == "launch") {
    run(reinterpret_cast<const void*>(does_nothing), dim3(1), dim3(32), 48 << 10, 1, [] {});
  } else if (fault == "beyond") {
    launch(reads_beyond, 1, 1, 0, nullptr, numbers, n, &sum);
  } else if (fault == "race") {
    launch(writes_what_another_block_writes, 2, 32, 0, nullptr, numbers);
  } else if (fault == "cluster race") {
    launch(reads_what_another_block_writes, Grid{2, 32, 0, 2}, nullptr, numbers);
  } else if (fault == "order") {
    launch(reads_what_no_barrier_orders, 1, 32, 512, nullptr, numbers);
  } else {
    fail("no such fault");
  }
}

}  // namespace emulator
