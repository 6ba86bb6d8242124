// SPDX-License-Identifier: BSD-3-Clause
// The probabilities of a pair of rows, and what divergence.inl.h makes of them.
// Included inside a file's own namespace, after tanh.inl.cuh and the file's own Exponential.

ML_FN double if_less(double a, double b, double yes, double no) { return a < b ? yes : no; }
ML_FN double expm1_less(double x) { return ::expm1(x) - x; }
ML_FN float min(float a, float b) { return ::fminf(a, b); }
ML_FN double min(double a, double b) { return ::fmin(a, b); }
// To one rounding, without the cases of a division that are none here. Not named quotient: that of
// integers would be hidden, and a row's number rounded to float.
ML_FN float ratio(float a, float b) {
  const float inverse = reciprocal(b), q = a * inverse;
  return fma(fma(-q, b, a), inverse, q);
}
ML_FN double ratio(double a, double b) { return a / b; }
ML_FN float fast_log(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result * 0.6931471805599453f;
#else
  return ::logf(x);
#endif
}
// Near 1 as 2 atanh(s), s = (m - larger) / (m + larger), by a minimax polynomial, to 2e-8 for
// |s| <= 1/3; else lg2.approx is right to two roundings, and so is the reciprocal.
ML_FN float log_quotient(float m, float larger, float less) {
  const float s = -less * reciprocal(::fmaxf(m + larger, kTiny)), square = s * s;
  float p = 0.2688353657722473f;
  p = fma(p, square, 0.28231292963027954f);
  p = fma(p, square, 0.40007781982421875f);
  p = fma(p, square, 0.6666663885116577f);
  p = fma(p, square, 2.0f);
  const float far = fast_log(m * reciprocal(::fmaxf(larger, kTiny)));
  return if_less(m, 0.5f * larger, far, p * s);
}
ML_FN double log_quotient(double, double larger, double less) {
  return ::log1p(-less / ::fmax(larger, double{kTiny}));
}
ML_FN float log1p(float x) { return ::log1pf(x); }
ML_FN double log1p(double x) { return ::log1p(x); }

#include "kernels/divergence.inl.h"

// Both softmaxes, from both log-sum-exps.
template <class A>
struct PairSoftmax {
  Cooling<A> own, others;
  Exponential<A> student, teacher;
  // log p - log q is shift more than the difference of the logits, counted from these, each divided
  // by its temperature.
  Origins<A> from;
  A shift;
  bool from_tops;
  // Where both count from 0 and are divided by the same: scale times their difference.
  bool simple;
  A scale;
  A q, p;  // what makes probabilities of exponentials

  // Of sums as the table holds them, since another pass begins with these.
  ML_FN PairSoftmax(const PairSums<A>& sums, const Cooling<A>& own, const Cooling<A>& others)
      : own(own), others(others), student(sums.top, own), teacher(sums.teacher_top, others) {
    const A top = sums.top, teacher_top = sums.teacher_top;
    from = origins_of(top, teacher_top);
    from_tops = from.student != A(0) || from.teacher != A(0);
    if (!student.fits() || !teacher.fits()) {
      from_tops = true;
      from = {top, teacher_top};
    }
    simple = !from_tops && own.temperature == others.temperature;
    const A sum = static_cast<A>(sums.sum), teacher_sum = static_cast<A>(sums.teacher_sum);
    scale = own(A(1));
    const double tops = simple ? (double(top) - double(teacher_top)) * scale
                               : own.wide(double(top) - double(from.student)) -
                                     others.wide(double(teacher_top) - double(from.teacher));
    shift = static_cast<A>(log1p(ratio(sum - teacher_sum, teacher_sum)) + tops);
    q = ratio(from_tops ? A(1) : student.unit(), sum);
    p = ratio(from_tops ? A(1) : teacher.unit(), teacher_sum);
  }
  // From the logits of a chunk to their exponentials, in their place, and log p - log q.
  template <bool kSimple, int N>
  ML_FN void exponentials(A (&y)[N], A (&z)[N], A (&log_ratio)[N]) const {
    if constexpr (kSimple) {
#pragma unroll
      for (int i = 0; i < N; ++i) log_ratio[i] = fma(z[i] - y[i], scale, shift);
    } else {
      A a[N], b[N];
#pragma unroll
      for (int i = 0; i < N; ++i) a[i] = y[i] - from.student, b[i] = z[i] - from.teacher;
      own.all(a);
      others.all(b);
#pragma unroll
      for (int i = 0; i < N; ++i) log_ratio[i] = (b[i] - a[i]) + shift;
      if (from_tops) {
#pragma unroll
        for (int i = 0; i < N; ++i) y[i] = exp(a[i]), z[i] = exp(b[i]);
        return;
      }
    }
    student.all(y);
    teacher.all(z);
  }
};
