// SPDX-License-Identifier: BSD-3-Clause
// The exponentials of half rows of a pair, each divided by a temperature, and a thread's sum.
// Included inside a file's own namespace, after side.inl.cuh and scaled_sum.inl.cuh.

struct HalfExp : ScaledExp {
  ML_FN HalfExp(float top, const Cooling<float>& cooling) : ScaledExp(top, cooling(kLog2E)) {}
};

// T: of a row's numbers as a chunk has them, half or widened.
template <class T>
struct HalfSum : ScaledSum {
  // Its product with any scale is finite, and any first logit that matters is larger.
  static constexpr float kLowest = -1e30f;

  uint32_t most = lowest_pair(T{});  // the largest of all even numbers, and of all odd ones

  ML_FN explicit HalfSum(const Cooling<float>& cooling) : ScaledSum(kLowest, cooling(kLog2E)) {}

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
  ML_FN ScaledExp exponential() const { return e; }
};
