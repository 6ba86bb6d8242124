// SPDX-License-Identifier: BSD-3-Clause
// The exponentials of a row of float or double, and a thread's sum of them. pair_half.inl.cuh has
// them faster.
// Included inside a file's own namespace, after pair_sums.inl.cuh.

template <class A>
struct FullExp {
  A top;
  Cooling<A> cooling;

  ML_FN FullExp(A top, const Cooling<A>& cooling) : top(top), cooling(cooling) {}
  ML_FN bool fits() const { return true; }
  template <int N>
  ML_FN void all(A (&x)[N]) const {
#pragma unroll
    for (A& each : x) each = each - top;
    cooling.all(x);
#pragma unroll
    for (A& each : x) each = exp(each);
  }
  ML_FN A of(A difference) const { return exp(cooling(difference)); }
  ML_FN A unit() const { return A(1); }
};

template <class A>
struct FullSum : CooledSum<A> {
  ML_FN explicit FullSum(const Cooling<A>& cooling) : CooledSum<A>(cooling) {}
  template <int kWords>
  ML_FN void push_words(const uint4 (&words)[kWords]) {
    A x[kWords * kPerWord16<A>];
    memcpy(x, words, sizeof x);
    this->push(x);
  }
  ML_FN FullExp<A> exponential() const { return {this->top, this->cooling}; }
  ML_FN bool fits() const { return true; }
  ML_FN LogSumExp<A> logsumexp() const { return *this; }
};
