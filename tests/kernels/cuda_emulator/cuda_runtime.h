// SPDX-License-Identifier: BSD-3-Clause
// CUDA on the CPU, as much of it as csrc/kernels/cuda needs: the kernels' own sources compile
// against this header as C++, and run with their real blocks, barriers, shuffles and shared memory.
//
// A thread is a fiber. All threads of a block live on one system thread; which of them runs next is
// drawn from a seed whenever one waits, and so is the order of the blocks. A kernel whose result
// depends on a barrier that is not there gives different results for different seeds.
//
// The blocks of a cluster run by turns, each up to where it waits for the others, with a shared
// memory of its own.
//
// Built with kernels that report each access of memory (accesses.cpp), it refuses a launch in which
// two threads touch the same byte, one of them writing it, with no barrier of both between.
//
// Not covered: weak memory ordering, and speed.
#pragma once

#include <algorithm>
#include <array>
#include <cassert>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
// Also right for `extern __shared__`: one system thread runs a block, and its fibers share these.
#define __shared__ thread_local

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace emulator {

struct Settings {
  uint64_t seed = 0;
  int multiprocessors = 4;
  int shared_per_block = 227 << 10;  // bytes, at most
  int l2_bytes = 50 << 20;
  int64_t max_blocks = 1 << 30;  // a larger grid is cut: kernels must loop over the rest
  int ptx_version = 90;          // that the kernels were compiled from
  bool clusters = true;          // whether the device has any
  bool record = false;           // launches are noted, not run
  bool math_errors = false;      // expf and logf are off as the device's may be
  std::string missing_barrier;   // "file:line" of one that does nothing
};
extern Settings settings;
extern int64_t launches;

// What a driver would get to see of a launch.
struct Launch {
  const void* kernel;
  unsigned grid, block;
  size_t shared;
  std::string parameters;  // their bytes, as they lie in a kernel's constant bank
};
extern std::vector<Launch> recorded;

// For accesses.cpp.
bool in_kernel();
bool on_stack(const void* p);  // of the thread that runs
extern std::string conflict;   // what it found, if anything
// The barriers that the running block, and the running thread's warp, have come through. A shuffle
// is none: a device promises nothing of the order of memory around it.
int64_t barriers_of_block();
int64_t barriers_of_warp();
int64_t barriers_of_cluster();
int cluster_of_block();

// This file's thread-local memory, which stands for shared memory.
struct Range {
  uintptr_t begin = 0, end = 0;
};
Range shared_range();

template <class T>
void append_parameter(std::string* bytes, const T& value) {
  bytes->resize((bytes->size() + alignof(T) - 1) / alignof(T) * alignof(T));
  bytes->append(reinterpret_cast<const char*>(&value), sizeof value);
}
template <class... Params>
std::string parameter_bytes(const Params&... params) {
  std::string bytes;
  (append_parameter(&bytes, params), ...);
  return bytes;
}

// Stands for what a kernel declares: here nobody knows.
constexpr int kStaticShared = 512;
// Dynamic shared memory that a kernel was allowed to take.
void allow_shared(const void* kernel, int bytes);
int least_shared_allowed();  // to any kernel, on this device

void run(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, unsigned cluster,
         const std::function<void()>& body);
void block_barrier();
void cluster_barrier();
bool is_missing(const char* file, int line);
void make_fault(const char* what, float* numbers, int64_t n);  // faults.cu

// Calls that the lanes of a mask make together: each the same call, and none has left the kernel.
enum class WarpCall { kBarrier, kShuffle, kShuffleXor };
void meet(WarpCall call, unsigned mask);
// The word that another lane brought to the same shuffle.
uint32_t shuffle(WarpCall call, unsigned mask, uint32_t word, int source_lane);
int lane();
void check_aligned(const void* p, size_t bytes);

}  // namespace emulator

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

// Where they are called from is what a barrier that is to be missing is known by.
inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  if (!::emulator::is_missing(file, line)) ::emulator::block_barrier();
}
inline void __syncwarp(unsigned mask = ~0u, const char* file = __builtin_FILE(),
                       int line = __builtin_LINE()) {
  if (::emulator::is_missing(file, line)) return;
  ::emulator::meet(::emulator::WarpCall::kBarrier, mask);
}

// Arriving and waiting are one here.
inline void __cluster_barrier_arrive() {}
inline void __cluster_barrier_wait(const char* file = __builtin_FILE(),
                                   int line = __builtin_LINE()) {
  if (!::emulator::is_missing(file, line)) ::emulator::cluster_barrier();
}

inline uint32_t __shfl_sync(unsigned mask, uint32_t word, int source) {
  return ::emulator::shuffle(::emulator::WarpCall::kShuffle, mask, word, source);
}
inline uint32_t __shfl_xor_sync(unsigned mask, uint32_t word, int lanes) {
  const int source = ::emulator::lane() ^ lanes;
  return ::emulator::shuffle(::emulator::WarpCall::kShuffleXor, mask, word, source);
}

template <class T>
T __ldcs(const T* p) {
  ::emulator::check_aligned(p, sizeof(T));
  return *p;
}
template <class T>
void __stcs(T* p, const T& value) {
  ::emulator::check_aligned(p, sizeof(T));
  *p = value;
}

inline float __uint_as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// The device's functions are off by so many units in the last digit; here by what the argument's
// bits say. CUDA's programming guide has the numbers.
namespace emulator {
inline float off_by(float y, float x, uint32_t most) {
  uint32_t bits, seed;
  memcpy(&bits, &y, sizeof bits);
  memcpy(&seed, &x, sizeof seed);
  const uint32_t size = bits & 0x7fffffff;
  if (size < 0x00800000 || size >= 0x7f7fffff) return y;
  bits += (seed * 2654435761u >> 16) % (2 * most + 1) - most;
  memcpy(&y, &bits, sizeof y);
  return y;
}
// ex2.approx.ftz, for which the kernels' host code has exp2f. Never as exact as that.
inline float exp2_approx(float x) {
  const float y = exp2f(x);
  if (y < 1.17549435e-38f) return 0;
  return x == 0 ? y : off_by(y, x, 2);
}
inline float exp_float(float x) {
  const float y = expf(x);
  return settings.math_errors && x != 0 ? off_by(y, x, 1) : y;
}
inline float log_float(float x) {
  const float y = logf(x);
  return settings.math_errors ? off_by(y, x, 1) : y;
}
}  // namespace emulator
#define exp2f emulator::exp2_approx
#define expf emulator::exp_float
#define logf emulator::log_float
// rcp.approx.ftz, for which the kernels' host code has this.
inline float __frcp_rn(float x) { return emulator::off_by(1 / x, x, 1); }
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, unsigned bits) {
  return static_cast<uint32_t>(((uint64_t{high} << 32) | low) >> (bits & 31));
}

template <class A, class B>
constexpr auto min(A a, B b) {
  return a < b ? a : b;
}

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrL2CacheSize,
  cudaDevAttrClusterLaunch
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaFuncAttributes {
  size_t sharedSizeBytes;
  int ptxVersion;
};
using cudaStream_t = void*;
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
enum cudaStreamCaptureMode { cudaStreamCaptureModeRelaxed = 2 };
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) {
  return cudaSuccess;
}
// Another amount of anything is another device.
inline cudaError_t cudaGetDevice(int* device) {
  static std::vector<std::array<int, 5>> devices;
  const auto& settings = ::emulator::settings;
  const std::array<int, 5> now = {settings.multiprocessors, settings.shared_per_block,
                                  settings.l2_bytes, settings.clusters, settings.ptx_version};
  const auto known = std::find(devices.begin(), devices.end(), now);
  *device = static_cast<int>(known - devices.begin());
  if (known == devices.end()) devices.push_back(now);
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
  const auto& settings = ::emulator::settings;
  *value = name == cudaDevAttrMultiProcessorCount ? settings.multiprocessors
           : name == cudaDevAttrL2CacheSize       ? settings.l2_bytes
           : name == cudaDevAttrClusterLaunch     ? settings.clusters
                                                  : settings.shared_per_block;
  return cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->sharedSizeBytes = ::emulator::kStaticShared;
  attributes->ptxVersion = ::emulator::settings.ptx_version;
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  if (bytes + ::emulator::kStaticShared > ::emulator::settings.shared_per_block) {
    return cudaErrorInvalidValue;
  }
  ::emulator::allow_shared(kernel, bytes);
  return cudaSuccess;
}
template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               const Args&... args) {
  if (::emulator::settings.record) {
    ::emulator::recorded.push_back({reinterpret_cast<const void*>(kernel), config->gridDim.x,
                                    config->blockDim.x, config->dynamicSmemBytes,
                                    ::emulator::parameter_bytes<Params...>(args...)});
    return cudaSuccess;
  }
  const unsigned cluster = config->numAttrs ? config->attrs->val.clusterDim.x : 1;
  ::emulator::run(reinterpret_cast<const void*>(kernel), config->gridDim, config->blockDim,
                  config->dynamicSmemBytes, cluster, [&] { kernel(args...); });
  return cudaSuccess;
}
