// SPDX-License-Identifier: BSD-3-Clause
// What a backend is: one function for each kernel. Checks, allocations and devices are the
// operators' affair.
#pragma once

#include <cstdint>

#include "kernels/args.h"

namespace masked_loss {

// What kernels run on: a cudaStream_t, or cpu::Threads.
using Queue = void*;

struct Backend {
  // Weights and scales. Returns where the first target is out of range, or -1; CUDA asserts
  // on the device.
  int64_t (*weigh)(const WeighArgs& args, Queue queue);
  void (*cross_entropy)(const RowArgs& args, Queue queue);
  // What shards of the rows told, merged.
  void (*merge)(const MergeArgs& args, Queue queue);
  // The gradient anew where dloss is not 1, for which args.dlogits holds it already.
  void (*rescale)(const RowArgs& args, Queue queue);
  // Of pairs of rows: values, and gradients of the first.
  void (*divergence)(const DivergenceArgs& args, Queue queue);
  void (*load_values)(const ValuesArgs& args, Queue queue);
  void (*reduce)(const ReduceArgs& args, Queue queue);
  void (*mask_grad)(const MaskGradArgs& args, Queue queue);
  void (*values_grad)(const ValuesArgs& args, Queue queue);
  void (*scale)(const ScaleArgs& args, Queue queue);

  // Bytes that a kernel wants to find in args.scratch.
  int64_t (*weigh_scratch)(const WeighArgs& args);
  int64_t (*cross_entropy_scratch)(const RowArgs& args);
  int64_t (*reduce_scratch)(const ReduceArgs& args);

  int64_t cache_bytes;  // a larger output is written around the caches
};

}  // namespace masked_loss
