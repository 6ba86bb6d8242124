// SPDX-License-Identifier: BSD-3-Clause
// The elementary functions that math.inl.h asks for, but exp(float): each file says which it needs.
// Included, like math.inl.h, inside a file's own namespace.

ML_FN double exp(double x) { return ::exp(x); }
ML_FN float log(float x) { return ::logf(x); }
ML_FN double log(double x) { return ::log(x); }
ML_FN float tanh(float x) { return ::tanhf(x); }
ML_FN double tanh(double x) { return ::tanh(x); }
// The number, where one of the two is NaN. A NaN still reaches every sum: exp(NaN) is added to it.
ML_FN float max(float a, float b) { return ::fmaxf(a, b); }
ML_FN double max(double a, double b) { return ::fmax(a, b); }
ML_FN bool any_greater(float a, float b) { return a > b; }
ML_FN bool any_greater(double a, double b) { return a > b; }

template <class V>
struct Limits;
template <>
struct Limits<float> {
  ML_FN static constexpr float lowest() { return -3.402823466e38f; }
};
template <>
struct Limits<double> {
  ML_FN static constexpr double lowest() { return -1.7976931348623157e308; }
};
