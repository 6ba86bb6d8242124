// SPDX-License-Identifier: BSD-3-Clause
// Vectors of kBytes on the vector extensions of GCC and Clang: of floats on a machine without wider
// ones (SSE2 on x86-64, NEON on aarch64), of doubles on every machine. Included inside an
// instruction set's namespace and target region, after scalar.inl.h and vec_math.inl.h.

// The first three functions are what a processor may have in hardware: its instruction set's file
// declares them for its own lanes before.

// a * b + c, here with two roundings.
template <class Numbers>
ML_FN Numbers multiply_add(Numbers a, Numbers b, Numbers c) {
  return a * b + c;
}
// to_float() and to_float16() of half.h for each lane.
template <class Half>
ML_FN auto widened_float16(Half half) {
  using Numbers = Lanes<float, 2 * sizeof(Half)>;
  using Bits = Lanes<int32_t, 2 * sizeof(Half)>;
  const Bits bits = __builtin_convertvector(half, Bits);
  const Bits magnitude = bits & 0x7fff;
  const Bits scaled = reinterpret_cast<Bits>(reinterpret_cast<Numbers>(magnitude << 13) * 0x1p112f);
  const Bits infinite = (magnitude > 0x7bff) & 0x7f800000;
  return reinterpret_cast<Numbers>(scaled | infinite | (bits & 0x8000) << 16);
}
template <class Numbers>
ML_FN auto narrowed_float16(Numbers x) {
  using Bits = Lanes<int32_t, sizeof(Numbers)>;
  using Half = Lanes<uint16_t, sizeof(Numbers) / 2>;
  const Bits bits = reinterpret_cast<Bits>(x);
  const Bits magnitude = bits & 0x7fffffff;
  const Bits normal = (magnitude - (112 << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  const Bits subnormal = reinterpret_cast<Bits>(reinterpret_cast<Numbers>(magnitude) + 0.5f) -
                         (126 << 23);  // the bits of 0.5
  const Bits infinite = ((magnitude > 0x7f800000) & 0x200) | 0x7c00;
  const Bits finite = magnitude < 0x38800000 ? subnormal : normal;
  const Bits y = magnitude < 0x477ff000 ? finite : infinite;
  return __builtin_convertvector(y | (bits >> 16 & 0x8000), Half);
}

template <class A, int kBytes>
struct Portable {
  using Scalar = A;
  using Numbers = Lanes<A, kBytes>;
  using Bits = Lanes<std::conditional_t<sizeof(A) == 8, int64_t, int32_t>, kBytes>;
  static constexpr int kLanes = kBytes / sizeof(A);
  // Vectors in flight. They do not fit into 16 registers, but to read one of them again costs less
  // than to ask twice as often whether the maximum grew.
  static constexpr int kBlock = 8;
  Numbers v;

  Portable() = default;
  ML_FN Portable(Numbers x) : v(x) {}
  ML_FN explicit Portable(A x) : v(x - Numbers{}) {}
  ML_FN static Portable of_bits(Bits bits) { return reinterpret_cast<Numbers>(bits); }
  ML_FN Bits bits() const { return reinterpret_cast<Bits>(v); }
  ML_FN Bits less(Portable other) const { return reinterpret_cast<Bits>(v < other.v); }

  ML_FN static Portable load(const A* p) { return read<Numbers>(p); }
  ML_FN static Portable load(const BFloat16* p) {
    const auto half = read<Lanes<uint16_t, kBytes / 2>>(p);
    return of_bits(__builtin_convertvector(half, Bits) << 16);
  }
  ML_FN static Portable load(const Float16* p) {
    return widened_float16(read<Lanes<uint16_t, kBytes / 2>>(p));
  }
  template <class T>
  ML_FN static Portable load(const T* p, int n) {
    A buffer[kLanes] = {};
    for (int i = 0; i < n; ++i) buffer[i] = widen(p[i]);
    return load(buffer);
  }

  ML_FN void store(A* p) const { write(v, p); }
  ML_FN void store(BFloat16* p) const {
    // Any NaN stays one.
    const Bits high = (v == v ? rounded(*this) : bits() | 0x400000) >> 16;
    write(__builtin_convertvector(high, Lanes<uint16_t, kBytes / 2>), p);
  }
  ML_FN void store(Float16* p) const { write(narrowed_float16(v), p); }
  template <class T>
  ML_FN void store(T* p, int n) const {
    A buffer[kLanes];
    store(buffer);
    for (int i = 0; i < n; ++i) narrow(buffer[i], p + i);
  }

  // Two vectors at once, in an order of their own: bf16 as the even and the odd elements, which
  // costs less than to widen and to narrow them.
  template <class T>
  ML_FN static void load2(const T* p, Portable& a, Portable& b) {
    a = load(p), b = load(p + kLanes);
  }
  ML_FN static void load2(const BFloat16* p, Portable& even, Portable& odd) {
    const Bits both = read<Bits>(p);
    even = of_bits(both << 16), odd = of_bits(both & -0x10000);
  }
  template <class T>
  ML_FN static void store2(T* p, Portable a, Portable b) {
    a.store(p), b.store(p + kLanes);
  }
  ML_FN static void store2(BFloat16* p, Portable even, Portable odd) {
    write((rounded(even) >> 16 & 0xffff) | (rounded(odd) & -0x10000), p);
  }
  template <class T>
  ML_FN static void stream2(T* p, Portable a, Portable b) {
    store2(p, a, b);
  }

 private:
  template <class V, class T>
  ML_FN static V read(const T* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  template <class V, class T>
  ML_FN static void write(V v, T* p) {
    std::memcpy(p, &v, sizeof v);
  }
  // To nearest even, in the upper half of each lane. A NaN that came from bf16, or is the default
  // one, has no low bits from which a carry could make it infinite.
  ML_FN static Bits rounded(Portable a) { return a.bits() + (a.bits() >> 16 & 1) + 0x7fff; }
};

template <class A, int kBytes>
ML_FN Portable<A, kBytes> operator+(Portable<A, kBytes> a, Portable<A, kBytes> b) {
  return a.v + b.v;
}
template <class A, int kBytes>
ML_FN Portable<A, kBytes> operator-(Portable<A, kBytes> a, Portable<A, kBytes> b) {
  return a.v - b.v;
}
template <class A, int kBytes>
ML_FN Portable<A, kBytes> operator-(Portable<A, kBytes> a) {
  return -a.v;
}
template <class A, int kBytes>
ML_FN Portable<A, kBytes> operator*(Portable<A, kBytes> a, Portable<A, kBytes> b) {
  return a.v * b.v;
}
template <class A, int kBytes>
ML_FN Portable<A, kBytes> operator/(Portable<A, kBytes> a, Portable<A, kBytes> b) {
  return a.v / b.v;
}
template <class A, int kBytes>
ML_FN Portable<A, kBytes> fma(Portable<A, kBytes> a, Portable<A, kBytes> b, Portable<A, kBytes> c) {
  return multiply_add(a.v, b.v, c.v);
}
template <class A, int kBytes>
ML_FN Portable<A, kBytes> max(Portable<A, kBytes> a, Portable<A, kBytes> b) {
  return a.v > b.v ? a.v : b.v;
}
// GCC makes one instruction of max() only where it sees no constant.
template <class A, int kBytes>
ML_FN Portable<A, kBytes> not_constant(Portable<A, kBytes> a) {
#if defined(__x86_64__)
  asm("" : "+x"(a.v));
#endif
  return a;
}
template <class A, int kBytes>
ML_FN Portable<A, kBytes> min(Portable<A, kBytes> a, Portable<A, kBytes> b) {
  return a.v < b.v ? a.v : b.v;
}
template <class A, int kBytes>
ML_FN bool any_greater(Portable<A, kBytes> a, Portable<A, kBytes> b) {
  const auto greater = reinterpret_cast<Lanes<int64_t, kBytes>>(a.v > b.v);
  int64_t any = 0;
  for (int i = 0; i < kBytes / 8; ++i) any |= greater[i];
  return any != 0;
}
template <class A, int kBytes>
ML_FN Portable<A, kBytes> abs(Portable<A, kBytes> a) {
  return Portable<A, kBytes>::of_bits(a.bits() & ~Portable<A, kBytes>(-0.0f).bits());
}
template <class A, int kBytes>
ML_FN Portable<A, kBytes> with_sign(Portable<A, kBytes> magnitude, Portable<A, kBytes> sign) {
  return Portable<A, kBytes>::of_bits(magnitude.bits() |
                                      (sign.bits() & Portable<A, kBytes>(-0.0f).bits()));
}
template <class A, int kBytes>
ML_FN Portable<A, kBytes> if_less(Portable<A, kBytes> a, Portable<A, kBytes> b,
                                  Portable<A, kBytes> yes, Portable<A, kBytes> no) {
  return a.v < b.v ? yes.v : no.v;
}
template <class A, int kBytes>
ML_FN Portable<A, kBytes> keep(Portable<A, kBytes> a, int n, A fill) {
  for (int i = 0; i < a.kLanes; ++i) a.v[i] = i < n ? a.v[i] : fill;
  return a;
}
template <class A, int kBytes>
ML_FN A lane_sum(Portable<A, kBytes> a) {
  A lane[a.kLanes];
  a.store(lane);
  for (int width = a.kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] = lane[i] + lane[i + width];
  }
  return lane[0];
}
template <class A, int kBytes>
ML_FN A lane_max(Portable<A, kBytes> a) {
  A top = a.v[0];
  for (int i = 1; i < a.kLanes; ++i) top = max(top, a.v[i]);
  return top;
}

// e^x = 2^n e^r, n the integer nearest to x log2(e). Added and taken away, kMagic rounds to an
// integer and leaves n + bias in the lowest bits, which are shifted to the exponent's place.
template <class A>
struct Exponential;
template <>
struct Exponential<float> {
  static constexpr float kLowest = -87.0f, kMagic = 12582912.0f + 127;  // 1.5 * 2^23 + bias
  static constexpr float kLog2High = 0x1.62e4p-1f, kLog2Low = 0x1.7f7d1cp-20f;
  static constexpr float kCoefficients[] = {1.3814320255173206e-3f, 8.3688510594046349e-3f,
                                            4.1668401087138657e-2f, 1.6666519524157744e-1f,
                                            4.9999993373085665e-1f};
};
template <>
struct Exponential<double> {
  static constexpr double kLowest = -0x1.628b76e3a7b61p+9;     // -1023 / log2(e)
  static constexpr double kMagic = 6755399441055744.0 + 1023;  // 1.5 * 2^52 + bias
  static constexpr double kOdd[] = {0x1.7a60d80b05de8p-6, 0x1.433a1344ffc1ep+4,
                                    0x1.7a772598a054ap+10};
  static constexpr double kEven[] = {0x1.d25b13344a68fp+7, 0x1.11014d9b457cbp+12};
};

// log(2) is taken away in two parts, of which n times the first is exact: |r| <= log(2) / 2. A
// minimax polynomial for the relative error, 3e-9 before rounding, its first two coefficients fixed
// to 1. What would be smaller than any normal number is 0, by a mask; a NaN is not less.
template <int kBytes>
ML_FN Portable<float, kBytes> exp(Portable<float, kBytes> x) {
  using V = Portable<float, kBytes>;
  using E = Exponential<float>;
  const V shifted = fma(x, V(1.44269504f), V(E::kMagic));
  const V n = shifted - V(E::kMagic);
  const V r = fma(n, V(-E::kLog2Low), fma(n, V(-E::kLog2High), x));
  V p(E::kCoefficients[0]);
  for (size_t i = 1; i < std::size(E::kCoefficients); ++i) p = fma(p, r, V(E::kCoefficients[i]));
  p = fma(fma(p, r, V(1)), r, V(1));
  const V y = p * V::of_bits(shifted.bits() << 23);
  return V::of_bits(y.bits() & ~x.less(V(E::kLowest)));
}

// With f = x log2(e) - n, |f| <= 1/2: 2^f = (q + p) / (q - p), p an odd and q an even polynomial,
// since p / q = tanh(f log(2) / 2). Minimax to 2e-17 for the relative error: half the operations of
// a polynomial that is as good. The rounding of x log2(e), like that of any difference of logits,
// is a relative error of |x| eps. Where x is kLowest or less, 2^n has no bits: 0.
template <int kBytes>
ML_FN Portable<double, kBytes> exp(Portable<double, kBytes> x) {
  using V = Portable<double, kBytes>;
  using E = Exponential<double>;
  const V log2e(1.4426950408889634);
  x = max(not_constant(V(E::kLowest)), x);
  const V shifted = fma(x, log2e, V(E::kMagic));
  const V f = fma(x, log2e, V(E::kMagic) - shifted);
  const V square = f * f;
  const V p = f * fma(fma(V(E::kOdd[0]), square, V(E::kOdd[1])), square, V(E::kOdd[2]));
  const V q = fma(square + V(E::kEven[0]), square, V(E::kEven[1]));
  return V::of_bits(shifted.bits() << 52) * ((q + p) / (q - p));
}

template <class A, int kBytes>
ML_FN Portable<A, kBytes> tanh(Portable<A, kBytes> x) {
  return tanh_wide<A>(x);
}
