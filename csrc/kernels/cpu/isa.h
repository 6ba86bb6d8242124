// SPDX-License-Identifier: BSD-3-Clause
// What an instruction set's file needs from outside its target region: baseline code comes first,
// since it must run on any machine.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <limits>
#include <type_traits>

#include "kernels/cpu/backend.h"
#include "kernels/half.h"

#define ML_FN inline __attribute__((always_inline))

namespace masked_loss::cpu {

// A vector of GCC and Clang: lanes with arithmetic and comparisons.
template <class T, int kBytes>
struct LanesOf {
  typedef T Type __attribute__((vector_size(kBytes)));
};
template <class T, int kBytes>
using Lanes = typename LanesOf<T, kBytes>::Type;

inline int64_t index_at(const void* target, DType type, int64_t i) {
  return type == DType::kInt64 ? static_cast<const int64_t*>(target)[i]
                               : static_cast<const int32_t*>(target)[i];
}

// CUDA knows a faster one.
inline int64_t quotient(int64_t a, int64_t b) { return a / b; }

}  // namespace masked_loss::cpu
