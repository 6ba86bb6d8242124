// SPDX-License-Identifier: BSD-3-Clause
// The kernels of a tensor's device, and what they run on.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "kernels/backend.h"

namespace masked_loss {

// As long as it lives, the tensor's device is the current one.
class Device {
 public:
  explicit Device(const torch::stable::Tensor& t);
  // A CUDA device's current stream, or torch's threads on the CPU.
  Queue queue() const;

  const Backend& kernels;

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  int32_t index_;
};

// Tells the system of memory that is about to be written for the first time.
void ask_for_large_pages(const torch::stable::Tensor& t);

}  // namespace masked_loss
