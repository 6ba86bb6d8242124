// SPDX-License-Identifier: BSD-3-Clause
// Storage of half types on a machine without them: conversions that round to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

namespace masked_loss {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

namespace half {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

}  // namespace half

inline float to_float(BFloat16 x) { return half::float_of(uint32_t{x.bits} << 16); }

inline BFloat16 to_bfloat16(float x) {
  const uint32_t bits = half::bits_of(x);
  if (x != x) return {static_cast<uint16_t>((bits >> 16) | 0x40)};  // rounding could carry to inf
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

inline float to_float(Float16 x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00) return half::float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // 2^112 moves the exponent's bias from 15 to 127, and makes subnormal numbers right on the way.
  const float scaled = half::float_of(magnitude << 13) * half::float_of((127 + 112) << 23);
  return half::float_of(half::bits_of(scaled) | sign);
}

inline Float16 to_float16(float x) {
  const uint32_t bits = half::bits_of(x);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00)};
  if (magnitude >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (magnitude < 0x38800000) {  // subnormal: adding 0.5 leaves the rounded value in the low bits
    const float shifted = half::float_of(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (half::bits_of(shifted) - half::bits_of(0.5f)))};
  }
  const uint32_t rounded = magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1);
  return {static_cast<uint16_t>(sign | (rounded >> 13))};
}

}  // namespace masked_loss
