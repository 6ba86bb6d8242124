// SPDX-License-Identifier: BSD-3-Clause
// The exponentials of half rows, in base 2, and a thread's sum of them.
// Included inside a file's own namespace, after math.inl.h.

constexpr float kLog2E = 1.4426950408889634f;

// exp((x - top) / temperature) as 2^(x scale - scaled), scale = log2(e) / temperature and scaled =
// top scale, rounded: one fma and one ex2, whatever the temperature. What the rounding of scaled
// makes of it, unit() makes up for at the end, once.
struct ScaledExp {
  float top, scale, scaled;

  ML_FN ScaledExp(float top, float scale) : top(top), scale(scale), scaled(top * scale) {}
  ML_FN void raise(float to) { top = to, scaled = to * scale; }
  // Not where the product is no number.
  ML_FN bool fits() const { return abs(scaled) <= -Limits<float>::lowest(); }
  template <int N>
  ML_FN void all(float (&x)[N]) const {
#pragma unroll
    for (float& each : x) each = exp2(fma(each, scale, -scaled));
  }
  ML_FN float of(float difference) const { return exp2(difference * scale); }
  ML_FN float unit() const { return exp2(-fma(top, scale, -scaled)); }
};

struct ScaledSum {
  ScaledExp e;
  float sum = 0;

  // lowest: a top whose product with scale is finite.
  ML_FN ScaledSum(float lowest, float scale) : e(lowest, scale) {}
  ML_FN void raise(float peak) {
    if (!(peak > e.top)) return;
    const float before = e.scaled;
    e.raise(peak);
    sum = sum * exp2(before - e.scaled);
  }
  template <int N>
  ML_FN void add(float (&x)[N]) {
    e.all(x);
    sum = sum + tree_sum(x);
  }
  // Not NaN, infinities, and numbers too large; nor none at all.
  ML_FN bool fits() const { return sum > 0 && sum <= -Limits<float>::lowest(); }
  ML_FN LogSumExp<float> logsumexp() const { return {e.top, sum * e.unit()}; }
};
