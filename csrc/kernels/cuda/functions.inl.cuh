// SPDX-License-Identifier: BSD-3-Clause
// The elementary functions that math.inl.h asks for, but those that each file chooses: exp(float),
// exp2(float), and tanh(float), which is made of that (tanh.inl.cuh).
// Included, like math.inl.h, inside a file's own namespace.

ML_FN double exp(double x) { return ::exp(x); }
ML_FN float log(float x) { return ::logf(x); }
ML_FN double log(double x) { return ::log(x); }
ML_FN double tanh(double x) { return ::tanh(x); }
ML_FN float abs(float x) { return ::fabsf(x); }
ML_FN double abs(double x) { return ::fabs(x); }
// The number, where one of the two is NaN. A NaN still reaches every sum: exp(NaN) is added to it.
ML_FN float max(float a, float b) { return ::fmaxf(a, b); }
ML_FN double max(double a, double b) { return ::fmax(a, b); }
ML_FN float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
ML_FN double fma(double a, double b, double c) { return ::fma(a, b, c); }
ML_FN bool any_greater(float a, float b) { return a > b; }
ML_FN bool any_greater(double a, double b) { return a > b; }

template <class V>
struct Limits;
template <>
struct Limits<float> {
  ML_FN static constexpr float lowest() { return -3.402823466e38f; }
  ML_FN static constexpr float epsilon() { return 1.1920928955e-7f; }
  ML_FN static constexpr float infinity() { return HUGE_VALF; }
  ML_FN static constexpr float underflow() { return 128.0f; }
};
template <>
struct Limits<double> {
  ML_FN static constexpr double lowest() { return -1.7976931348623157e308; }
  ML_FN static constexpr double epsilon() { return 2.220446049250313e-16; }
  ML_FN static constexpr double infinity() { return HUGE_VAL; }
  ML_FN static constexpr double underflow() { return 1024.0; }
};
