// SPDX-License-Identifier: BSD-3-Clause
// Vectors of 16 floats: AVX-512 F, BW, DQ, VL. Included inside namespace isa_avx512 and its target
// region, after scalar.inl.h and vec_math.inl.h.

struct Vec {
  using Scalar = float;
  static constexpr int kLanes = 16;
  static constexpr int kBlock = 8;  // vectors in flight; 32 registers hold them and exp's constants
  __m512 v;

  Vec() = default;
  ML_FN Vec(__m512 x) : v(x) {}
  ML_FN explicit Vec(float x) : v(_mm512_set1_ps(x)) {}

  ML_FN static __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }

  ML_FN static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  ML_FN static Vec load(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  ML_FN static Vec load(const BFloat16* p) {
    return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  ML_FN static Vec load(const BFloat16* p, int n) {
    return widened(_mm256_maskz_loadu_epi16(first(n), p));
  }
  ML_FN static Vec load(const Float16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  ML_FN static Vec load(const Float16* p, int n) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p));
  }

  ML_FN void store(float* p) const { _mm512_storeu_ps(p, v); }
  ML_FN void store(float* p, int n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  ML_FN void store(BFloat16* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bfloat16());
  }
  ML_FN void store(BFloat16* p, int n) const { _mm256_mask_storeu_epi16(p, first(n), bfloat16()); }
  ML_FN void store(Float16* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), float16());
  }
  ML_FN void store(Float16* p, int n) const { _mm256_mask_storeu_epi16(p, first(n), float16()); }

  // Two vectors at once, in an order of their own: bf16 is taken apart into its even and its odd
  // elements, which costs one shift and one mask instead of two conversions, and put together
  // again.
  template <class T>
  ML_FN static void load2(const T* p, Vec& a, Vec& b) {
    a = load(p), b = load(p + kLanes);
  }
  ML_FN static void load2(const BFloat16* p, Vec& even, Vec& odd) {
    const __m512i bits = _mm512_loadu_si512(p);
    even = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(-0x10000)));
  }
  template <class T>
  ML_FN static void store2(T* p, Vec a, Vec b) {
    a.store(p), b.store(p + kLanes);
  }
  ML_FN static void store2(BFloat16* p, Vec even, Vec odd) {
    _mm512_storeu_si512(p, interleaved(even, odd));
  }
  // Around the caches; p must be aligned to 64 bytes.
  ML_FN static void stream2(float* p, Vec a, Vec b) {
    _mm512_stream_ps(p, a.v), _mm512_stream_ps(p + kLanes, b.v);
  }
  ML_FN static void stream2(BFloat16* p, Vec even, Vec odd) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), interleaved(even, odd));
  }
  ML_FN static void stream2(Float16* p, Vec a, Vec b) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p),
                        _mm512_inserti64x4(_mm512_castsi256_si512(a.float16()), b.float16(), 1));
  }

 private:
  // To nearest even, in the upper half of each lane. A NaN that came from bf16, or is the default
  // one, has no low bits from which a carry could make it infinite.
  ML_FN static __m512i rounded(Vec a) {
    const __m512i bits = _mm512_castps_si512(a.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  }
  ML_FN static __m512i interleaved(Vec even, Vec odd) {
    return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(rounded(even), 16), rounded(odd));
  }

  ML_FN static Vec widened(__m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  // Any NaN stays one.
  ML_FN __m256i bfloat16() const {
    const __m512i bits =
        _mm512_mask_or_epi32(rounded(*this), _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q),
                             _mm512_castps_si512(v), _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
  }
  ML_FN __m256i float16() const {
    return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
};

ML_FN Vec operator+(Vec a, Vec b) { return _mm512_add_ps(a.v, b.v); }
ML_FN Vec operator-(Vec a, Vec b) { return _mm512_sub_ps(a.v, b.v); }
ML_FN Vec operator-(Vec a) { return -a.v; }
ML_FN Vec operator*(Vec a, Vec b) { return _mm512_mul_ps(a.v, b.v); }
ML_FN Vec max(Vec a, Vec b) { return _mm512_max_ps(a.v, b.v); }
ML_FN Vec min(Vec a, Vec b) { return _mm512_min_ps(a.v, b.v); }
ML_FN bool any_greater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ) != 0; }
ML_FN float lane_sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
ML_FN float lane_max(Vec a) { return _mm512_reduce_max_ps(a.v); }

ML_FN Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
ML_FN Vec operator/(Vec a, Vec b) { return _mm512_div_ps(a.v, b.v); }
ML_FN Vec abs(Vec a) { return _mm512_abs_ps(a.v); }
ML_FN Vec if_less(Vec a, Vec b, Vec yes, Vec no) {
  return _mm512_mask_mov_ps(no.v, _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), yes.v);
}
ML_FN Vec keep(Vec a, int n, float fill) {
  return _mm512_mask_mov_ps(_mm512_set1_ps(fill), Vec::first(n), a.v);
}
ML_FN Vec with_sign(Vec magnitude, Vec sign) {
  return _mm512_or_ps(magnitude.v, _mm512_and_ps(sign.v, _mm512_set1_ps(-0.0f)));
}

// e^x = 2^n 2^f, n the multiple of 1/32 nearest to x log2(e), of whose fraction a table in two
// registers knows the power, and 2^f = 1 + c1 f + c2 f^2 to 5e-8: minimax for |f| <= 1/64, and
// exp(0) is exactly 1. scalef takes the integer below n. What is no normal number is 0, by a mask:
// to underflow takes the processor hundreds of cycles, and -inf, which fills up a row's last
// vector, would be inf - inf. A NaN is not less.
alignas(64) constexpr float kPowers[32] = {
    1.0f,        1.02189715f,   1.04427378f, 1.0671404007f, 1.09050773f, 1.11438674f, 1.13878863f,
    1.16372486f, 1.18920712f,   1.21524736f, 1.24185781f,   1.26905096f, 1.29683955f, 1.32523664f,
    1.35425555f, 1.3839098820f, 1.41421356f, 1.44518081f,   1.47682615f, 1.50916443f, 1.54221083f,
    1.57598085f, 1.61049033f,   1.64575548f, 1.68179283f,   1.71861930f, 1.75625216f, 1.79470907f,
    1.83400809f, 1.87416764f,   1.91520656f, 1.95714412f};

ML_FN Vec exp(Vec x) {
  const __m512 log2e = _mm512_set1_ps(1.44269504f);
  const __mmask16 normal = _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ);
  // Added and taken away, 1.5 * 2^18 rounds to a multiple of 1/32 and leaves its number, modulo 32,
  // in the lowest bits.
  const __m512 magic = _mm512_set1_ps(393216.0f);
  const __m512 shifted = _mm512_fmadd_ps(x.v, log2e, magic);
  const __m512 n = _mm512_sub_ps(shifted, magic);
  const __m512 f = _mm512_fmsub_ps(x.v, log2e, n);
  const __m512 power = _mm512_permutex2var_ps(_mm512_load_ps(kPowers), _mm512_castps_si512(shifted),
                                              _mm512_load_ps(kPowers + 16));
  const __m512 slope =
      _mm512_fmadd_ps(_mm512_set1_ps(0.240226507f), f, _mm512_set1_ps(0.693157344f));
  return _mm512_maskz_scalef_ps(normal, _mm512_fmadd_ps(_mm512_mul_ps(power, f), slope, power), n);
}

ML_FN Vec tanh(Vec x) { return tanh_wide<float>(x); }

// For the vectors of doubles in vec_portable.inl.h.
ML_FN Lanes<double, 64> multiply_add(Lanes<double, 64> a, Lanes<double, 64> b,
                                     Lanes<double, 64> c) {
  return _mm512_fmadd_pd(a, b, c);
}

ML_FN void end_streams() { _mm_sfence(); }
