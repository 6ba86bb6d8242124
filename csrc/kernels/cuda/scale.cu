// SPDX-License-Identifier: BSD-3-Clause
// A gradient times one number that only the device knows. As large as a head's weight it takes as
// long as memory does, and of a dloss of 1, in place, nothing.
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/word16.cuh"

namespace masked_loss::cuda {
namespace {

constexpr int kScaleThreads = 256;

// A thread writes 16 bytes at a time, of as many numbers of the gradient.
template <class From, class To>
__global__ void __launch_bounds__(kScaleThreads) scale_kernel(const ScaleArgs args) {
  using A = typename Accumulation<From>::Type;
  constexpr int kNumbers = kPerWord16<To>;
  constexpr int kWords = kNumbers / kPerWord16<From>;  // of the gradient
  const A factor = *static_cast<const A*>(args.factor);
  if (factor == 1 && args.gradient == args.scaled) return;
  const From* const gradient = static_cast<const From*>(args.gradient);
  To* const scaled = static_cast<To*>(args.scaled);
  const uintptr_t both =
      reinterpret_cast<uintptr_t>(gradient) | reinterpret_cast<uintptr_t>(scaled);
  const int64_t pieces = both % 16 == 0 ? args.count / kNumbers : 0;
  const int64_t first = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t threads = int64_t{gridDim.x} * blockDim.x;
  for (int64_t p = first; p < pieces; p += threads) {
    const uint4* const words = static_cast<const uint4*>(args.gradient) + p * kWords;
    A numbers[kNumbers];
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      unpack(words[w], numbers + w * kPerWord16<From>, From{});
    }
#pragma unroll
    for (A& number : numbers) number *= factor;
    static_cast<uint4*>(args.scaled)[p] = pack(numbers, To{});
  }
  for (int64_t i = pieces * kNumbers + first; i < args.count; i += threads) {
    narrow(widen(gradient[i]) * factor, &scaled[i]);
  }
}

auto kernel_of(const ScaleArgs& args) {
  if (args.dtype == DType::kFloat64) return scale_kernel<double, double>;
  if (args.dtype == DType::kBFloat16) return scale_kernel<BFloat16, BFloat16>;
  if (args.dtype == DType::kFloat16) return scale_kernel<Float16, Float16>;
  if (args.scaled_type == DType::kBFloat16) return scale_kernel<float, BFloat16>;
  if (args.scaled_type == DType::kFloat16) return scale_kernel<float, Float16>;
  return scale_kernel<float, float>;
}

}  // namespace

void scale(const ScaleArgs& args, Stream stream) {
  // As many as a device runs at a time, or fewer: to look at a factor of 1, no more need to begin.
  const int64_t most = chip().multiprocessors * (2048 / kScaleThreads);
  const int64_t blocks = (args.count + kScaleThreads - 1) / kScaleThreads;
  launch(kernel_of(args), std::min(blocks, most), kScaleThreads, 0, stream, args);
}

}  // namespace masked_loss::cuda
