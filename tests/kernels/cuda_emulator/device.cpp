// SPDX-License-Identifier: BSD-3-Clause
// csrc/ops/backend_of.cpp where every tensor is on the emulated device, and the module that Python
// loads.
//
// Together with the rest of csrc/ops it makes operators like the library's, in the namespace
// masked_loss_emulated, whose kernels are those of csrc/kernels/cuda on the emulator.
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include "kernels/cpu/backend.h"
#include "kernels/cuda/backend.h"
#include "kernels/cuda/rows.h"
#include "ops/backend_of.h"

namespace masked_loss {

namespace cuda {
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

namespace {

const Backend& emulated() {
  static const Backend backend = [] {
    Backend copy = cuda::kBackend;
    copy.cache_bytes = 4096;
    return copy;
  }();
  return backend;
}

}  // namespace

Device::Device(const torch::stable::Tensor&) : kernels(emulated()), index_(0) {}
Queue Device::queue() const { return nullptr; }
void ask_for_large_pages(const torch::stable::Tensor&) {}

}  // namespace masked_loss

PYBIND11_MODULE(emulated_cuda, m) {
  using emulator::Settings;
  pybind11::class_<Settings>(m, "Settings")
      .def(pybind11::init<>())
      .def_readwrite("seed", &Settings::seed)
      .def_readwrite("multiprocessors", &Settings::multiprocessors)
      .def_readwrite("shared_per_block", &Settings::shared_per_block)
      .def_readwrite("l2_bytes", &Settings::l2_bytes)
      .def_readwrite("max_blocks", &Settings::max_blocks)
      .def_readwrite("ptx_version", &Settings::ptx_version)
      .def_readwrite("clusters", &Settings::clusters)
      .def_readwrite("record", &Settings::record)
      .def_readwrite("math_errors", &Settings::math_errors)
      .def_readwrite("missing_barrier", &Settings::missing_barrier);
  m.def("configure", [](const Settings& settings) { emulator::settings = settings; });
  m.def("make_fault", [](const std::string& what, uintptr_t numbers, int64_t n) {
    emulator::make_fault(what.c_str(), reinterpret_cast<float*>(numbers), n);
  });
  m.def("launches", [] { return emulator::launches; });
  // (where the kernel begins in this file, grid, block, shared memory, parameters) of each launch
  // since the last call
  m.def("recorded", [] {
    pybind11::list found;
    for (const emulator::Launch& launch : emulator::recorded) {
      Dl_info info{};
      dladdr(launch.kernel, &info);
      found.append(pybind11::make_tuple(
          static_cast<const char*>(launch.kernel) - static_cast<const char*>(info.dli_fbase),
          launch.grid, launch.block, launch.shared, pybind11::bytes(launch.parameters)));
    }
    emulator::recorded.clear();
    return found;
  });
  m.def("parts_of_a_row", [](int64_t rows, int64_t cols, bool fused) {
    masked_loss::RowArgs args{};
    args.forward = fused;
    args.dlogits = fused ? &args : nullptr;
    args.dtype = masked_loss::DType::kBFloat16;
    args.rows = rows;
    args.cols = cols;
    return masked_loss::cuda::plan_rows(args).parts;
  });
  m.def("least_shared_allowed", [] { return emulator::least_shared_allowed(); });
}
