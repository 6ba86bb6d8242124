// SPDX-License-Identifier: BSD-3-Clause
// csrc/ops/device.cpp where every tensor is on the emulated device, and the module that Python
// loads.
//
// Together with csrc/ops/ops.cpp and csrc/ops/register.cpp it makes operators like the library's,
// in the namespace masked_loss_emulated, whose kernels are those of csrc/kernels/cuda on the
// emulator.
#include "ops/device.h"

#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include "kernels/cpu/backend.h"
#include "kernels/cuda/backend.h"
#include "kernels/cuda/rows.h"

namespace masked_loss {

namespace cuda {
Stream current_stream(int32_t) { return nullptr; }
void check(int error) {
  if (error) emulator::fail("a CUDA call failed");
}
}  // namespace cuda

namespace cpu {
const Kernels& kernels() {
  static const Kernels none{"emulated", {}};
  return none;
}
}  // namespace cpu

Device Device::of(const torch::stable::Tensor&) { return {true, 0}; }

int64_t Device::weigh(const WeighArgs& args) const { return cuda::weigh(args, nullptr); }
void Device::cross_entropy(const CrossEntropyArgs& args) const {
  cuda::cross_entropy(args, nullptr);
}
void Device::rescale(const CrossEntropyArgs& args) const { cuda::rescale(args, nullptr); }
void Device::load_values(const ValuesArgs& args) const { cuda::load_values(args, nullptr); }
void Device::reduce(const ReduceArgs& args) const { cuda::reduce(args, nullptr); }
void Device::mask_grad(const MaskGradArgs& args) const { cuda::mask_grad(args, nullptr); }
void Device::values_grad(const ValuesArgs& args) const { cuda::values_grad(args, nullptr); }

int64_t Device::scratch_bytes(const WeighArgs& args) const { return cuda::scratch_bytes(args); }
int64_t Device::scratch_bytes(const CrossEntropyArgs& args) const {
  return cuda::scratch_bytes(args);
}
int64_t Device::scratch_bytes(const ReduceArgs& args) const { return cuda::scratch_bytes(args); }

bool Device::prepare_output(void*, int64_t bytes, bool) const { return bytes > 4096; }

}  // namespace masked_loss

PYBIND11_MODULE(emulated_cuda, m) {
  using emulator::Settings;
  pybind11::class_<Settings>(m, "Settings")
      .def(pybind11::init<>())
      .def_readwrite("seed", &Settings::seed)
      .def_readwrite("multiprocessors", &Settings::multiprocessors)
      .def_readwrite("shared_per_block", &Settings::shared_per_block)
      .def_readwrite("l2_bytes", &Settings::l2_bytes)
      .def_readwrite("max_blocks", &Settings::max_blocks);
  m.def("configure", [](const Settings& settings) { emulator::settings = settings; });
  m.def("launches", [] { return emulator::launches; });
  m.def("parts_of_a_row", [](int64_t rows, int64_t cols) {
    masked_loss::CrossEntropyArgs args{};
    args.dtype = masked_loss::DType::kBFloat16;
    args.rows = rows;
    args.cols = cols;
    return masked_loss::cuda::plan_rows(args).parts;
  });
  m.def("least_shared_allowed", [] { return emulator::least_shared_allowed(); });
}
