// SPDX-License-Identifier: BSD-3-Clause
// One row of a pair, N classes of it at a time: a chunk. Included inside a file's own namespace,
// after math.inl.h.

// The type of a teacher of any type but double: which one, its rows tell. Its numbers are widened
// when they are read.
struct AnyType {};

template <class T>
struct KeptAs {
  using Type = T;
};
template <>
struct KeptAs<AnyType> {
  using Type = float;
};

// As InverseTemperature computes it in double, which has few units on most chips.
ML_FN InverseTemperature<float> inverse_of(float temperature) {
  InverseTemperature<float> inverse{1.0};
  const float rounded = reciprocal(temperature);
  inverse.high = rounded - 2 * Limits<float>::epsilon() * rounded;
  inverse.low = fma(-inverse.high, temperature, 1.0f) * rounded;
  return inverse;
}
ML_FN InverseTemperature<double> inverse_of(double temperature) {
  return InverseTemperature<double>(temperature);
}

// Division by a temperature.
template <class A>
struct Cooling {
  A temperature;
  bool on;
  InverseTemperature<A> inverse{1.0};

  ML_FN explicit Cooling(A temperature) : temperature(temperature), on(temperature != A(1)) {
    if (on) inverse = inverse_of(temperature);
  }
  ML_FN A operator()(A x) const { return on ? cooled(x, inverse) : x; }
  ML_FN double wide(double x) const {
    return on ? x * (double(inverse.high) + double(inverse.low)) : x;
  }
  template <int N>
  ML_FN void all(A (&x)[N]) const {
    if (!on) return;
#pragma unroll
    for (A& each : x) each = cooled(each, inverse);
  }
};

// kCapped: there may be a softcap, which takes so many registers that kernels without one would
// spill.
template <class T, class A, int N, bool kCapped>
struct Side {
  using Kept = typename KeptAs<T>::Type;
  static constexpr int kWords = N * static_cast<int>(sizeof(Kept)) / 16;
  struct Chunk {
    uint4 words[kWords];
  };

  const char* x;
  DType dtype;
  A cap, temperature;

  ML_FN Side(const LogitRows& rows, int64_t batch, int64_t step, int64_t token)
      : x(static_cast<const char*>(rows.logits) +
          (batch * rows.batch_stride + step * rows.step_stride) * size_of(rows.dtype)),
        dtype(rows.dtype),
        cap(static_cast<A>(rows.softcap)),
        temperature(rows.temperatures ? static_cast<const A*>(rows.temperatures)[token]
                                      : static_cast<A>(rows.temperature)) {}

  ML_FN Cooling<A> cooling() const { return Cooling<A>(temperature); }
  ML_FN bool is_aligned() const { return reinterpret_cast<uintptr_t>(x) % 16 == 0; }

  // Chunk k, all N classes of it. kShifted: of a row that is not aligned, from words that begin
  // before it and end behind it.
  template <bool kShifted>
  ML_FN Chunk whole(int k) const {
    return with_type([&](auto type) {
      using S = decltype(type);
      constexpr int kFrom = N * static_cast<int>(sizeof(S)) / 16;
      const int misaligned = kShifted ? static_cast<int>(reinterpret_cast<uintptr_t>(x) % 16) : 0;
      const uint4* const from = reinterpret_cast<const uint4*>(x - misaligned) + int64_t{k} * kFrom;
      uint4 words[kFrom + kShifted];
#pragma unroll
      for (int w = 0; w < kFrom + kShifted; ++w) words[w] = from[w];
#pragma unroll
      for (int w = 0; kShifted && w < kFrom; ++w) {
        words[w] = between(words[w], words[w + 1], misaligned);
      }
      Chunk chunk;
      if constexpr (std::is_same_v<S, Kept>) {
        memcpy(&chunk, words, sizeof chunk);
      } else {
        A y[N];
#pragma unroll
        for (int w = 0; w < kFrom; ++w) unpack(words[w], y + w * kPerWord16<S>, S{});
        memcpy(&chunk, y, sizeof chunk);
      }
      return chunk;
    });
  }

  // Of any row, class by class, last one first; beyond `count` of them, what no softmax shows. In a
  // loop, since this is for a row's ends: registers have no index, so the classes move up.
  ML_FN Chunk part(int k, int count) const {
    return with_type([&](auto type) {
      using S = decltype(type);
      const S* const from = reinterpret_cast<const S*>(x) + int64_t{k} * N;
      Chunk chunk;
#pragma unroll
      for (uint4& word : chunk.words) word = minus_infinities<Kept>();
#pragma unroll 1
      for (int i = count - 1; i >= 0; --i) {
        if constexpr (std::is_same_v<S, Kept>) {
          push_front(from[i], chunk.words);
        } else {
          push_front(widen(from[i]), chunk.words);
        }
      }
      return chunk;
    });
  }

  ML_FN static void raw(const Chunk& chunk, A (&y)[N]) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      unpack(chunk.words[w], y + w * kPerWord16<Kept>, Kept{});
    }
  }

  // In a loop: what a softcap takes would fill the instruction cache if it stood there N times.
  template <class F>
  ML_FN static void one_by_one(A (&y)[N], const F& f) {
    A each[N];
    memcpy(each, y, sizeof each);
#pragma unroll 1
    for (int i = 0; i < N; ++i) each[i] = f(each[i]);
    memcpy(y, each, sizeof each);
  }

  // After softcap, before temperature.
  template <class Count>
  ML_FN void logits(const Chunk& chunk, Count count, A (&y)[N]) const {
    raw(chunk, y);
    if (kCapped && cap != A(0)) {
      one_by_one(y, [&](A each) { return softcap(each, cap); });
#pragma unroll
      for (int i = 0; i < N; ++i) y[i] = i < count ? y[i] : -Limits<A>::infinity();
    }
  }

 private:
  template <class F>
  ML_FN auto with_type(const F& f) const {
    if constexpr (!std::is_same_v<T, AnyType>) {
      return f(T{});
    } else {
      if (dtype == DType::kFloat32) return f(float{});
      if (dtype == DType::kBFloat16) return f(BFloat16{});
      return f(Float16{});
    }
  }
};
