// SPDX-License-Identifier: BSD-3-Clause
// The CPU kernels compiled for any machine: vectors of one float.
#include "kernels/cpu/isa.h"

namespace masked_loss::cpu::isa_default {
namespace {  // internal linkage: no other instruction set may be linked to these
// clang-format off
#include "kernels/cpu/vec_lane.inl.h"
using Vec = Lane<float>;
void end_streams() {}
template <class T>
using VecOf = std::conditional_t<std::is_same_v<T, double>, Lane<double>, Vec>;
#include "kernels/math.inl.h"
#include "kernels/cpu/cross_entropy.inl.h"
// clang-format on
}  // namespace
extern const Kernels kKernels;
constexpr Kernels kTable = make_kernels("default");  // constexpr: nothing runs at load
const Kernels kKernels = kTable;
}  // namespace masked_loss::cpu::isa_default
