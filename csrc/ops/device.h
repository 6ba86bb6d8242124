// SPDX-License-Identifier: BSD-3-Clause
// Where the kernels run: on the CPU's threads, or on a CUDA device's current stream.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "kernels/args.h"

namespace masked_loss {

class Device {
 public:
  static Device of(const torch::stable::Tensor& t);

  // Returns the first token whose target is out of range, or -1; CUDA asserts on the device.
  int64_t weigh(const WeighArgs& args) const;
  void cross_entropy(const CrossEntropyArgs& args) const;
  // The gradient anew where dloss is not 1, for which args.dlogits holds it already.
  void rescale(const CrossEntropyArgs& args) const;
  void load_values(const ValuesArgs& args) const;
  void reduce(const ReduceArgs& args) const;
  void mask_grad(const MaskGradArgs& args) const;
  void values_grad(const ValuesArgs& args) const;

  // Bytes that a kernel wants to find in args.scratch.
  int64_t scratch_bytes(const WeighArgs& args) const;
  int64_t scratch_bytes(const CrossEntropyArgs& args) const;
  int64_t scratch_bytes(const ReduceArgs& args) const;

  // Tells the system of a large output that is about to be written, if it may be fresh memory.
  // True: write around the caches what was not read there.
  bool prepare_output(void* data, int64_t bytes, bool fresh) const;

 private:
  Device(bool cuda, int32_t index) : cuda_(cuda), index_(index) {}

  bool cuda_;
  int32_t index_;
};

}  // namespace masked_loss
