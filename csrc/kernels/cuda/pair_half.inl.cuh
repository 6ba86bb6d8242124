// SPDX-License-Identifier: BSD-3-Clause
// The exponentials of a row of half numbers, in base 2, and a thread's sum of them.
// Included inside a file's own namespace, after side.inl.cuh.

// exp((x - top) / temperature) as 2^(x scale - scaled): one fma and one ex2, whatever the
// temperature. What the rounding of scaled makes of it, unit() makes up for at the end, once.
struct HalfExp {
  float top, scale, scaled;

  ML_FN HalfExp(float top, const Cooling<float>& cooling)
      : top(top), scale(cooling(1.4426950408889634f)), scaled(top * scale) {}
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

// T: of a row's numbers as a chunk has them, half or widened.
template <class T>
struct HalfSum {
  // Its product with any scale is finite, and any first logit that matters is larger.
  static constexpr float kLowest = -1e30f;

  HalfExp e;
  float sum = 0;
  uint32_t most = lowest_pair(T{});  // the largest of all even numbers, and of all odd ones

  ML_FN explicit HalfSum(const Cooling<float>& cooling) : e(kLowest, cooling) {}

  // Whole eights, in whose order they are added up.
  template <int kWords>
  ML_FN void push_words(const uint4 (&words)[kWords]) {
    if constexpr (std::is_same_v<T, float>) {
      float x[4 * kWords];
      memcpy(x, words, sizeof x);
      push(x);
    } else {
      const uint32_t now = largest_pair(most, words, T{});
      if (now != most) {
        most = now;
        raise(larger_of_pair(now, T{}));
      }
#pragma unroll
      for (const uint4& word : words) {
        float x[8];
        unpack(word, x, T{});
        add(x);
      }
    }
  }
  template <int N>
  ML_FN void push(const float (&x)[N]) {
    raise(peak_of(e.top, x));
    static_assert(N % 8 == 0, "whole eights");
#pragma unroll
    for (int i = 0; i < N; i += 8) {
      float eight[8];
      memcpy(eight, x + i, sizeof eight);
      add(eight);
    }
  }
  ML_FN HalfExp exponential() const { return e; }
  // Not NaN, infinities, and numbers too large; nor none at all.
  ML_FN bool fits() const { return sum > 0 && sum <= -Limits<float>::lowest(); }
  ML_FN LogSumExp<float> logsumexp() const { return {e.top, sum * e.unit()}; }

 private:
  ML_FN void raise(float peak) {
    if (!(peak > e.top)) return;
    const float before = e.scaled;
    e.raise(peak);
    sum = sum * exp2(before - e.scaled);
  }
  ML_FN void add(float (&x)[8]) {
    e.all(x);
    sum = sum + tree_sum(x);
  }
};
