// SPDX-License-Identifier: BSD-3-Clause
// Vectors of one lane: float on a machine without wider ones, and double everywhere.
// Included inside an instruction set's namespace. The scalar functions below also serve the
// per-row arithmetic of every instruction set.

ML_FN float exp(float x) { return std::exp(x); }
ML_FN double exp(double x) { return std::exp(x); }
ML_FN float log(float x) { return std::log(x); }
ML_FN double log(double x) { return std::log(x); }
ML_FN float tanh(float x) { return std::tanh(x); }
ML_FN double tanh(double x) { return std::tanh(x); }
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
};
template <>
struct Limits<float> : std::numeric_limits<float> {};
template <>
struct Limits<double> : std::numeric_limits<double> {};

template <class A>
struct Lane {
  using Scalar = A;
  static constexpr int kLanes = 1;
  static constexpr int kBlock = 16;  // summed as a tree: a long chain of additions loses digits
  A v;

  Lane() = default;
  explicit Lane(A x) : v(x) {}
  template <class T>
  ML_FN static Lane load(const T* p) {
    return Lane(static_cast<A>(widen(*p)));
  }
  template <class T>
  ML_FN static Lane load(const T* p, int n) {
    return n > 0 ? load(p) : Lane(0);
  }
  template <class T>
  ML_FN void store(T* p) const {
    narrow(v, p);
  }
  template <class T>
  ML_FN void store(T* p, int n) const {
    if (n > 0) narrow(v, p);
  }
  template <class T>
  ML_FN static void load2(const T* p, Lane& a, Lane& b) {
    a = load(p), b = load(p + 1);
  }
  template <class T>
  ML_FN static void store2(T* p, Lane a, Lane b) {
    a.store(p), b.store(p + 1);
  }
  template <class T>
  ML_FN static void stream2(T* p, Lane a, Lane b) {
    store2(p, a, b);
  }
};
template <class A>
ML_FN Lane<A> operator+(Lane<A> a, Lane<A> b) {
  return Lane<A>(a.v + b.v);
}
template <class A>
ML_FN Lane<A> operator-(Lane<A> a, Lane<A> b) {
  return Lane<A>(a.v - b.v);
}
template <class A>
ML_FN Lane<A> operator*(Lane<A> a, Lane<A> b) {
  return Lane<A>(a.v * b.v);
}
template <class A>
ML_FN Lane<A> max(Lane<A> a, Lane<A> b) {
  return Lane<A>(max(a.v, b.v));
}
template <class A>
ML_FN bool any_greater(Lane<A> a, Lane<A> b) {
  return a.v > b.v;
}
template <class A>
ML_FN Lane<A> exp(Lane<A> a) {
  return Lane<A>(exp(a.v));
}
template <class A>
ML_FN Lane<A> tanh(Lane<A> a) {
  return Lane<A>(tanh(a.v));
}
template <class A>
ML_FN Lane<A> keep(Lane<A> a, int n, A fill) {
  return n > 0 ? a : Lane<A>(fill);
}
template <class A>
ML_FN A lane_sum(Lane<A> a) {
  return a.v;
}
template <class A>
ML_FN A lane_max(Lane<A> a) {
  return a.v;
}
