// SPDX-License-Identifier: BSD-3-Clause
// The CUDA backend: what ops call. Everything is launched on a stream, and nothing waits for it.
#pragma once

#include <cstdint>

#include "kernels/args.h"

namespace masked_loss::cuda {

using Stream = void*;  // a cudaStream_t

// Defined beside whoever owns the streams (device.cpp; the emulator in tests).
Stream current_stream(int32_t device);
void check(int error);  // throws what a cudaError_t says

// Bytes of scratch memory that a kernel wants to find in args.scratch.
int64_t scratch_bytes(const WeighArgs& args);
int64_t scratch_bytes(const CrossEntropyArgs& args);
int64_t scratch_bytes(const ReduceArgs& args);

// Weights and scales. A target out of range is asserted on the device; the result is always -1.
int64_t weigh(const WeighArgs& args, Stream stream);
void cross_entropy(const CrossEntropyArgs& args, Stream stream);
// The gradient anew where dloss is not 1, for which args.dlogits holds it already.
void rescale(const CrossEntropyArgs& args, Stream stream);
void load_values(const ValuesArgs& args, Stream stream);
void reduce(const ReduceArgs& args, Stream stream);
void mask_grad(const MaskGradArgs& args, Stream stream);
void values_grad(const ValuesArgs& args, Stream stream);

}  // namespace masked_loss::cuda
