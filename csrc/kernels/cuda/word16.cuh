// SPDX-License-Identifier: BSD-3-Clause
// The aligned 16 bytes that one instruction moves, and the numbers in them.
#pragma once

#include <cstring>

#include "kernels/cuda/numbers.cuh"

namespace masked_loss::cuda {

template <class T>
constexpr int kPerWord16 = 16 / static_cast<int>(sizeof(T));

template <class T>
ML_FN uint4 minus_infinities();
template <>
ML_FN uint4 minus_infinities<double>() {
  return {0, 0xfff00000u, 0, 0xfff00000u};
}
template <>
ML_FN uint4 minus_infinities<float>() {
  return {0xff800000u, 0xff800000u, 0xff800000u, 0xff800000u};
}
template <>
ML_FN uint4 minus_infinities<BFloat16>() {
  return {0xff80ff80u, 0xff80ff80u, 0xff80ff80u, 0xff80ff80u};
}
template <>
ML_FN uint4 minus_infinities<Float16>() {
  return {0xfc00fc00u, 0xfc00fc00u, 0xfc00fc00u, 0xfc00fc00u};
}

ML_FN void unpack(const uint4& word, double* y, double) { memcpy(y, &word, 16); }
ML_FN void unpack(const uint4& word, float* y, float) { memcpy(y, &word, 16); }
ML_FN void unpack(const uint4& word, float* y, BFloat16) {
  const uint32_t bits[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    y[2 * i] = __uint_as_float(bits[i] << 16);
    y[2 * i + 1] = __uint_as_float(bits[i] & 0xffff0000u);
  }
}
ML_FN void unpack(const uint4& word, float* y, Float16) {
  const uint32_t bits[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    y[2 * i] = __half2float(__ushort_as_half(static_cast<unsigned short>(bits[i])));
    y[2 * i + 1] = __half2float(__ushort_as_half(static_cast<unsigned short>(bits[i] >> 16)));
  }
}

// The largest of the half numbers in some words; a NaN counts for nothing.
template <class Pair>
ML_FN float largest_of(const uint4 (&words)[4]) {
  Pair pairs[16];
  memcpy(pairs, words, sizeof pairs);
  Pair most = pairs[0];
#pragma unroll
  for (int i = 1; i < 16; ++i) most = __hmax2(most, pairs[i]);
  return fmaxf(__low2float(most), __high2float(most));
}
ML_FN float largest(const uint4 (&words)[4], BFloat16) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800  // Turing has no arithmetic of bfloat16
  float most = -HUGE_VALF;
#pragma unroll
  for (const uint4& word : words) {
    float y[8];
    unpack(word, y, BFloat16{});
#pragma unroll
    for (float x : y) most = fmaxf(most, x);
  }
  return most;
#else
  return largest_of<__nv_bfloat162>(words);
#endif
}
ML_FN float largest(const uint4 (&words)[4], Float16) { return largest_of<__half2>(words); }

// The largest of pairs of half numbers, each lane of its own, as words hold them.
template <class Pair, int kWords>
ML_FN uint32_t largest_pair_of(uint32_t most, const uint4 (&words)[kWords]) {
  Pair pairs[4 * kWords], all;
  memcpy(pairs, words, sizeof pairs);
  memcpy(&all, &most, sizeof all);
#pragma unroll
  for (int width = 2 * kWords; width > 0; width /= 2) {
#pragma unroll
    for (int i = 0; i < width; ++i) pairs[i] = __hmax2(pairs[i], pairs[i + width]);
  }
  all = __hmax2(all, pairs[0]);
  memcpy(&most, &all, sizeof most);
  return most;
}
template <int kWords>
ML_FN uint32_t largest_pair(uint32_t most, const uint4 (&words)[kWords], BFloat16) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800  // Turing has no arithmetic of bfloat16
  float even = __uint_as_float(most << 16), odd = __uint_as_float(most & 0xffff0000u);
#pragma unroll
  for (const uint4& word : words) {
    float y[8];
    unpack(word, y, BFloat16{});
#pragma unroll
    for (int i = 0; i < 8; i += 2) even = fmaxf(even, y[i]), odd = fmaxf(odd, y[i + 1]);
  }
  return __float_as_uint(even) >> 16 | __float_as_uint(odd);
#else
  return largest_pair_of<__nv_bfloat162>(most, words);
#endif
}
template <int kWords>
ML_FN uint32_t largest_pair(uint32_t most, const uint4 (&words)[kWords], Float16) {
  return largest_pair_of<__half2>(most, words);
}
ML_FN uint32_t lowest_pair(BFloat16) { return 0xf149f149u; }  // -9.95e29
ML_FN uint32_t lowest_pair(Float16) { return 0xfbfffbffu; }   // -65504
ML_FN uint32_t lowest_pair(float) { return 0; }               // are not packed
ML_FN float larger_of_pair(uint32_t pair, BFloat16) {
  return fmaxf(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}
ML_FN float larger_of_pair(uint32_t pair, Float16) {
  return fmaxf(__half2float(__ushort_as_half(static_cast<unsigned short>(pair))),
               __half2float(__ushort_as_half(static_cast<unsigned short>(pair >> 16))));
}

ML_FN uint4 pack(const double* y, double) {
  uint4 word;
  memcpy(&word, y, 16);
  return word;
}
ML_FN uint4 pack(const float* y, float) {
  uint4 word;
  memcpy(&word, y, 16);
  return word;
}
ML_FN uint4 pack(const float* y, BFloat16) {
  uint32_t bits[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(y[2 * i], y[2 * i + 1]);
    memcpy(&bits[i], &pair, 4);
  }
  return {bits[0], bits[1], bits[2], bits[3]};
}
ML_FN uint4 pack(const float* y, Float16) {
  uint32_t bits[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __half2 pair = __floats2half2_rn(y[2 * i], y[2 * i + 1]);
    memcpy(&bits[i], &pair, 4);
  }
  return {bits[0], bits[1], bits[2], bits[3]};
}

// 16 bytes from `bytes` (0 to 15) after the beginning of two neighbouring words.
ML_FN uint4 between(const uint4& a, const uint4& b, int bytes) {
  uint32_t w[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
  if (bytes & 8) {
#pragma unroll
    for (int i = 0; i < 6; ++i) w[i] = w[i + 2];
  }
  if (bytes & 4) {
#pragma unroll
    for (int i = 0; i < 5; ++i) w[i] = w[i + 1];
  }
  const unsigned bits = (bytes & 3) * 8;
  return {__funnelshift_r(w[0], w[1], bits), __funnelshift_r(w[1], w[2], bits),
          __funnelshift_r(w[2], w[3], bits), __funnelshift_r(w[3], w[4], bits)};
}

// Moves all numbers in some words up by one, and puts one first; the last is gone.
template <int kWords>
ML_FN void push_front(double first, uint4 (&words)[kWords]) {
  uint2 before;
  memcpy(&before, &first, sizeof before);
#pragma unroll
  for (uint4& w : words) {
    const uint4 old = w;
    w = {before.x, before.y, old.x, old.y};
    before = {old.z, old.w};
  }
}
template <int kWords>
ML_FN void push_front(float first, uint4 (&words)[kWords]) {
  uint32_t before;
  memcpy(&before, &first, sizeof before);
#pragma unroll
  for (uint4& w : words) {
    const uint4 old = w;
    w = {before, old.x, old.y, old.z};
    before = old.w;
  }
}
template <class Half, int kWords>
ML_FN void push_front(Half first, uint4 (&words)[kWords]) {
  uint32_t before = uint32_t{first.bits} << 16;
#pragma unroll
  for (uint4& w : words) {
    const uint4 old = w;
    w = {__funnelshift_r(before, old.x, 16), __funnelshift_r(old.x, old.y, 16),
         __funnelshift_r(old.y, old.z, 16), __funnelshift_r(old.z, old.w, 16)};
    before = old.w;
  }
}

// Elements [0, n) at p: `head` single ones, `words` aligned words, and the rest single again.
template <class T>
struct Words16 {
  int head, words;
  const uint4* first;

  ML_FN Words16(const T* p, int n) {
    const int misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(p) % 16);
    head = min(misaligned ? (16 - misaligned) / static_cast<int>(sizeof(T)) : 0, n);
    words = (n - head) / kPerWord16<T>;
    first = reinterpret_cast<const uint4*>(p + head);
  }
  ML_FN int tail() const { return head + words * kPerWord16<T>; }
};

}  // namespace masked_loss::cuda
