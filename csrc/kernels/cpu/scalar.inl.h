// SPDX-License-Identifier: BSD-3-Clause
// The functions of math.inl.h for single numbers: the arithmetic that is done once per row.
// Included inside an instruction set's namespace.

ML_FN float exp(float x) { return std::exp(x); }
ML_FN double exp(double x) { return std::exp(x); }
ML_FN float log(float x) { return std::log(x); }
ML_FN double log(double x) { return std::log(x); }
ML_FN float tanh(float x) { return std::tanh(x); }
ML_FN double tanh(double x) { return std::tanh(x); }
ML_FN float abs(float x) { return std::abs(x); }
ML_FN double abs(double x) { return std::abs(x); }
ML_FN float max(float a, float b) { return a > b ? a : b; }
ML_FN double max(double a, double b) { return a > b ? a : b; }
ML_FN bool any_greater(float a, float b) { return a > b; }
ML_FN bool any_greater(double a, double b) { return a > b; }

ML_FN float widen(float x) { return x; }
ML_FN double widen(double x) { return x; }
ML_FN float widen(BFloat16 x) { return to_float(x); }
ML_FN float widen(Float16 x) { return to_float(x); }

ML_FN void narrow(float x, float* out) { *out = x; }
ML_FN void narrow(double x, double* out) { *out = x; }
ML_FN void narrow(float x, BFloat16* out) { *out = to_bfloat16(x); }
ML_FN void narrow(float x, Float16* out) { *out = to_float16(x); }

template <class V>
struct Limits {
  static constexpr typename V::Scalar lowest() {
    return std::numeric_limits<typename V::Scalar>::lowest();
  }
  static constexpr typename V::Scalar infinity() {
    return std::numeric_limits<typename V::Scalar>::infinity();
  }
  static constexpr typename V::Scalar underflow() {
    return Limits<typename V::Scalar>::underflow();
  }
};
template <>
struct Limits<float> : std::numeric_limits<float> {
  static constexpr float underflow() { return 128; }
};
template <>
struct Limits<double> : std::numeric_limits<double> {
  static constexpr double underflow() { return 1024; }
};
