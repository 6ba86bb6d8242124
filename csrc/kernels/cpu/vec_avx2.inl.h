// SPDX-License-Identifier: BSD-3-Clause
// Vectors of 8 floats: AVX2, FMA, F16C. Included inside namespace isa_avx2 and its target region,
// after scalar.inl.h and vec_math.inl.h.

struct Vec {
  using Scalar = float;
  static constexpr int kLanes = 8;
  static constexpr int kBlock = 4;  // vectors in flight; 16 registers hold them and exp's constants
  __m256 v;

  Vec() = default;
  ML_FN Vec(__m256 x) : v(x) {}
  ML_FN explicit Vec(float x) : v(_mm256_set1_ps(x)) {}

  ML_FN static Vec load(const float* p) { return _mm256_loadu_ps(p); }
  ML_FN static Vec load(const BFloat16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  ML_FN static Vec load(const Float16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  // AVX2 has no masks for 16 bits: a tail goes through a small buffer.
  template <class T>
  ML_FN static Vec load(const T* p, int n) {
    float buffer[kLanes] = {};
    for (int i = 0; i < n; ++i) buffer[i] = widen(p[i]);
    return _mm256_loadu_ps(buffer);
  }

  ML_FN void store(float* p) const { _mm256_storeu_ps(p, v); }
  ML_FN void store(BFloat16* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bfloat16());
  }
  ML_FN void store(Float16* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), float16()); }
  template <class T>
  ML_FN void store(T* p, int n) const {
    float buffer[kLanes];
    _mm256_storeu_ps(buffer, v);
    for (int i = 0; i < n; ++i) narrow(buffer[i], p + i);
  }

  // Two vectors at once, in an order of their own: bf16 is taken apart into its even and its odd
  // elements, which costs one shift and one mask instead of two conversions, and put together
  // again.
  template <class T>
  ML_FN static void load2(const T* p, Vec& a, Vec& b) {
    a = load(p), b = load(p + kLanes);
  }
  ML_FN static void load2(const BFloat16* p, Vec& even, Vec& odd) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    even = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
    odd = _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(-0x10000)));
  }
  template <class T>
  ML_FN static void store2(T* p, Vec a, Vec b) {
    a.store(p), b.store(p + kLanes);
  }
  ML_FN static void store2(BFloat16* p, Vec even, Vec odd) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), interleaved(even, odd));
  }
  // Around the caches; p must be aligned to 64 bytes.
  ML_FN static void stream2(float* p, Vec a, Vec b) {
    _mm256_stream_ps(p, a.v), _mm256_stream_ps(p + kLanes, b.v);
  }
  ML_FN static void stream2(BFloat16* p, Vec even, Vec odd) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), interleaved(even, odd));
  }
  ML_FN static void stream2(Float16* p, Vec a, Vec b) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm256_set_m128i(b.float16(), a.float16()));
  }

 private:
  // To nearest even, in the upper half of each lane. A NaN that came from bf16, or is the default
  // one, has no low bits from which a carry could make it infinite.
  ML_FN static __m256i rounded(Vec a) {
    const __m256i bits = _mm256_castps_si256(a.v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  }
  ML_FN static __m256i interleaved(Vec even, Vec odd) {
    return _mm256_blend_epi16(_mm256_srli_epi32(rounded(even), 16), rounded(odd), 0xaa);
  }

  // Any NaN stays one.
  ML_FN __m128i bfloat16() const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded(*this), quiet, nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  }
  ML_FN __m128i float16() const {
    return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
};

ML_FN Vec operator+(Vec a, Vec b) { return _mm256_add_ps(a.v, b.v); }
ML_FN Vec operator-(Vec a, Vec b) { return _mm256_sub_ps(a.v, b.v); }
ML_FN Vec operator-(Vec a) { return -a.v; }
ML_FN Vec operator*(Vec a, Vec b) { return _mm256_mul_ps(a.v, b.v); }
ML_FN Vec operator/(Vec a, Vec b) { return _mm256_div_ps(a.v, b.v); }
ML_FN Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
ML_FN Vec max(Vec a, Vec b) { return _mm256_max_ps(a.v, b.v); }
ML_FN Vec min(Vec a, Vec b) { return _mm256_min_ps(a.v, b.v); }
ML_FN bool any_greater(Vec a, Vec b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)) != 0;
}
ML_FN Vec abs(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v); }
ML_FN Vec if_less(Vec a, Vec b, Vec yes, Vec no) { return a.v < b.v ? yes.v : no.v; }
ML_FN Vec keep(Vec a, int n, float fill) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i kept = _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane);
  return _mm256_blendv_ps(_mm256_set1_ps(fill), a.v, _mm256_castsi256_ps(kept));
}
ML_FN Vec with_sign(Vec magnitude, Vec sign) {
  return _mm256_or_ps(magnitude.v, _mm256_and_ps(sign.v, _mm256_set1_ps(-0.0f)));
}
ML_FN float lane_sum(Vec a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
ML_FN float lane_max(Vec a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

// e^x = 2^n 2^f, n the integer nearest to x log2(e), put into the exponent's bits. What is no
// normal number is 0, by a mask; a NaN compares as not less and passes.
ML_FN Vec exp(Vec x) {
  const __m256 log2e = _mm256_set1_ps(1.44269504f);
  const __m256 n =
      _mm256_round_ps(_mm256_mul_ps(x.v, log2e), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256 fraction = exp2_fraction(Vec(_mm256_fmsub_ps(x.v, log2e, n))).v;
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  const __m256 y = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(fraction), exponent));
  return _mm256_andnot_ps(_mm256_cmp_ps(x.v, _mm256_set1_ps(-87.0f), _CMP_LT_OQ), y);
}

ML_FN Vec tanh(Vec x) { return tanh_wide<float>(x); }

// For the vectors of doubles in vec_portable.inl.h.
ML_FN Lanes<double, 32> multiply_add(Lanes<double, 32> a, Lanes<double, 32> b,
                                     Lanes<double, 32> c) {
  return _mm256_fmadd_pd(a, b, c);
}

ML_FN void end_streams() { _mm_sfence(); }
