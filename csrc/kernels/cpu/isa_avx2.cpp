// SPDX-License-Identifier: BSD-3-Clause
// The CPU kernels compiled for AVX2.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels/cpu/isa.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else  // to the end of the file: templates are instantiated there
#pragma GCC target("avx2,fma,f16c")
#endif
namespace masked_loss::cpu::isa_avx2 {
namespace {  // internal linkage: no other instruction set may be linked to these
// clang-format off
#include "kernels/cpu/scalar.inl.h"
#include "kernels/cpu/vec_math.inl.h"
#include "kernels/cpu/vec_avx2.inl.h"
#include "kernels/cpu/vec_portable.inl.h"
template <class T>
using VecOf = std::conditional_t<std::is_same_v<T, double>, Portable<double, 32>, Vec>;
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
constexpr Kernels kTable = make_kernels("avx2");  // constexpr: nothing runs at load
const Kernels kKernels = kTable;
}  // namespace masked_loss::cpu::isa_avx2
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // x86-64
