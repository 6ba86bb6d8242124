// SPDX-License-Identifier: BSD-3-Clause
// The CUDA backend: what ops call. Everything is launched on a stream, and nothing waits for it.
#pragma once

#include <cstdint>

#include "kernels/args.h"
#include "kernels/backend.h"

namespace masked_loss::cuda {

using Stream = Queue;  // a cudaStream_t

// Defined beside whoever owns the streams (ops/backend_of.cpp; the emulator in tests): throws what
// a cudaError_t says.
void check(int error);

int64_t scratch_bytes(const WeighArgs& args);
int64_t scratch_bytes(const RowArgs& args);
int64_t scratch_bytes(const ReduceArgs& args);

int64_t weigh(const WeighArgs& args, Stream stream);
void cross_entropy(const RowArgs& args, Stream stream);
void merge(const MergeArgs& args, Stream stream);
void rescale(const RowArgs& args, Stream stream);
void divergence(const DivergenceArgs& args, Stream stream);
void load_values(const ValuesArgs& args, Stream stream);
void reduce(const ReduceArgs& args, Stream stream);
void mask_grad(const MaskGradArgs& args, Stream stream);
void values_grad(const ValuesArgs& args, Stream stream);
void scale(const ScaleArgs& args, Stream stream);

// All of these.
extern const Backend kBackend;

// Compute capabilities times 100, with commas, such as "800,900".
const char* architectures();

}  // namespace masked_loss::cuda
