// SPDX-License-Identifier: BSD-3-Clause
// The probabilities of a pair of rows, and what divergence.inl.h makes of them.
// Included inside a file's own namespace, after pair_sums.inl.cuh, tanh.inl.cuh and the file's own
// Exponential.

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
ML_FN float log_quotient(float, float larger, float less) {
  return ::log1pf(-ratio(less, ::fmaxf(larger, kTiny)));
}
ML_FN double log_quotient(double, double larger, double less) {
  return ::log1p(-less / ::fmax(larger, double{kTiny}));
}

#include "kernels/divergence.inl.h"

// Both softmaxes, from both log-sum-exps.
template <class A>
struct PairSoftmax {
  Exponential<A> student, teacher;
  bool from_tops;  // differences of logits are counted from the largest ones
  SoftmaxPair<A> of;

  // Of sums as the table holds them, since another pass begins with these.
  ML_FN explicit PairSoftmax(const PairSums<A>& sums)
      : student(sums.top), teacher(sums.teacher_top) {
    Origins<A> from = origins_of(student.top, teacher.top);
    from_tops = from.student != A(0) || from.teacher != A(0);
    if (!student.fits() || !teacher.fits()) {
      from_tops = true;
      from = {student.top, teacher.top};
    }
    const A sum = static_cast<A>(sums.sum), teacher_sum = static_cast<A>(sums.teacher_sum);
    const double tops = double(student.top - from.student) - double(teacher.top - from.teacher);
    of.shift = static_cast<A>(log(double(sum) / double(teacher_sum)) + tops);
    of.q = (from_tops ? A(1) : student.unit()) / sum;
    of.p = (from_tops ? A(1) : teacher.unit()) / teacher_sum;
  }
  // From the logits of a chunk to their differences and exponentials, in their place.
  template <int N>
  ML_FN void exponentials(A (&y)[N], A (&z)[N], A (&apart)[N]) const {
    if (from_tops) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        y[i] = y[i] - student.top, z[i] = z[i] - teacher.top;
        apart[i] = z[i] - y[i];
        y[i] = exp(y[i]), z[i] = exp(z[i]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        apart[i] = z[i] - y[i];
        y[i] = student(y[i]), z[i] = teacher(z[i]);
      }
    }
  }
  // The student's probability alone.
  ML_FN A q(A y) const { return (from_tops ? exp(y - student.top) : student(y)) * of.q; }
  ML_FN A p(A z) const { return (from_tops ? exp(z - teacher.top) : teacher(z)) * of.p; }
};
