// SPDX-License-Identifier: BSD-3-Clause
// The LogSumExp of half rows, in base 2.
// Included inside a file's own namespace, after math.inl.h.

// exp(y - top) as 2^(y log2(e) - scaled), where scaled is top log2(e), rounded: one fma and one
// ex2, where exp(y - top) takes a subtraction and a product more. What the rounding of scaled makes
// of it, unit() makes up for at the end, once.
struct ScaledExp {
  static constexpr float kLog2E = 1.4426950408889634f;
  float top, scaled;

  ML_FN explicit ScaledExp(float top) : top(top), scaled(top * kLog2E) {}
  // Not where the product is no number.
  ML_FN bool fits() const { return abs(scaled) <= -Limits<float>::lowest(); }
  ML_FN float operator()(float y) const { return exp2(fma(y, kLog2E, -scaled)); }
  ML_FN float unit() const { return exp2(-fma(top, kLog2E, -scaled)); }
};

struct ScaledSum {
  static constexpr float kLowest = -2e38f;  // its product with log2(e) is finite
  ScaledExp e{kLowest};
  float sum = 0;

  template <int N>
  ML_FN void push(float (&y)[N]) {
    const float peak = peak_of(e.top, y);
    if (peak > e.top) raise(peak);
    add(y);
  }
  template <class T>
  ML_FN void push(const uint4 (&words)[4], T) {
    const float peak = max(largest(words, T{}), e.top);
    if (peak > e.top) raise(peak);
#pragma unroll
    for (const uint4& word : words) {
      float y[8];
      unpack(word, y, T{});
      add(y);
    }
  }
  // Not NaN, infinities, and numbers too large; nor none at all.
  ML_FN bool fits() const { return sum > 0 && sum <= -Limits<float>::lowest(); }
  ML_FN LogSumExp<float> logsumexp() const { return {e.top, sum * e.unit()}; }

 private:
  ML_FN void raise(float peak) {
    const ScaledExp raised(peak);
    sum = sum * exp2(e.scaled - raised.scaled);
    e = raised;
  }
  template <int N>
  ML_FN void add(float (&y)[N]) {
#pragma unroll
    for (float& each : y) each = e(each);
    sum = sum + tree_sum(y);
  }
};
