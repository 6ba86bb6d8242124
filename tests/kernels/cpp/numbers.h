// SPDX-License-Identifier: BSD-3-Clause
// The tests' numbers are double; a kernel's are of its type.
#pragma once

#include <vector>

#include "kernels/half.h"

namespace masked_loss {

using Numbers = std::vector<double>;

inline void set(double x, double* out) { *out = x; }
inline void set(double x, float* out) { *out = static_cast<float>(x); }
inline void set(double x, BFloat16* out) { *out = to_bfloat16(static_cast<float>(x)); }
inline void set(double x, Float16* out) { *out = to_float16(static_cast<float>(x)); }
inline double number(double x) { return x; }
inline double number(float x) { return x; }
inline double number(BFloat16 x) { return to_float(x); }
inline double number(Float16 x) { return to_float(x); }

template <class T>
std::vector<T> as(const Numbers& numbers) {
  std::vector<T> out(numbers.size());
  for (size_t i = 0; i < numbers.size(); ++i) set(numbers[i], &out[i]);
  return out;
}

}  // namespace masked_loss
