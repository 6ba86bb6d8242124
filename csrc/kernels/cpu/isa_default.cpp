// SPDX-License-Identifier: BSD-3-Clause
// The CPU kernels compiled for any machine: on x86-64 with SSE2, on aarch64 with NEON.
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kernels/cpu/isa.h"

namespace masked_loss::cpu::isa_default {
namespace {  // internal linkage: no other instruction set may be linked to these
// clang-format off
#include "kernels/cpu/scalar.inl.h"
#include "kernels/cpu/vec_math.inl.h"
#if defined(__aarch64__)
#include "kernels/cpu/vec_neon.inl.h"
#endif
#include "kernels/cpu/vec_portable.inl.h"
void end_streams() {}
template <class T>
using VecOf = Portable<std::conditional_t<std::is_same_v<T, double>, double, float>, 16>;
#include "kernels/groups.inl.h"
#include "kernels/math.inl.h"
#include "kernels/losses.inl.h"
#include "kernels/shards.inl.h"
#include "kernels/cpu/fetch.inl.h"
#include "kernels/cpu/divergence.inl.h"
#include "kernels/cpu/log_probs.inl.h"
#include "kernels/cpu/rows.inl.h"
// clang-format on
}  // namespace
extern const Kernels kKernels;
constexpr Kernels kTable = make_kernels("default");  // constexpr: nothing runs at load
const Kernels kKernels = kTable;
}  // namespace masked_loss::cpu::isa_default
