// SPDX-License-Identifier: BSD-3-Clause
// One look at a row of which only the logsumexp is wanted. What a warp issues for 2 KB of a row
// decides how much of the memory's speed it gets, so whole iterations ask for no bounds.
// Included inside a file's own namespace, after scaled_sum.inl.cuh.

struct HalfRowSum : ScaledSum {
  ML_FN HalfRowSum() : ScaledSum(-2e38f, kLog2E) {}
  template <class T>
  ML_FN void push(const uint4 (&words)[4], T) {
    raise(max(largest(words, T{}), e.top));
#pragma unroll
    for (const uint4& word : words) {
      float y[8];
      unpack(word, y, T{});
      add(y);
    }
  }
};

struct FloatSum {
  LogSumExp<float> lse;

  ML_FN void push(const uint4 (&words)[4], float) {
    float y[16];
    memcpy(y, words, sizeof y);
    lse.push(y);
  }
  ML_FN LogSumExp<float> logsumexp() const { return lse; }
};

// A lane's share of a row of n logits at x, for a team of kThreads.
template <class T, int kThreads>
struct Look {
  using Sum = std::conditional_t<sizeof(T) == 2, HalfRowSum, FloatSum>;
  static constexpr int kLoads = 4, kStep = kLoads * kThreads;

  const T* x;
  int n, rank;
  uint4* cache;  // where the first `cached` words are kept
  int cached;
  Words16<T> in{x, n};
  Sum sum;

  // kWhole: all of its words are there. kCached: some of them are to be kept. kStream: no cache of
  // the device needs to keep them.
  template <bool kWhole, bool kCached, bool kStream>
  ML_FN void step(int i) {
    uint4 words[kLoads];
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      const int k = i + u * kThreads;
      if (kWhole || k < in.words) {
        words[u] = kStream ? __ldcs(in.first + k) : in.first[k];
      } else {
        words[u] = minus_infinities<T>();
      }
    }
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      const int k = i + u * kThreads;
      if (kCached && k < cached && (kWhole || k < in.words)) cache[k] = words[u];
    }
    sum.push(words, T{});
  }

  template <bool kStream>
  ML_FN void from(int i) {
    for (; i + kStep - kThreads < in.words; i += kStep) step<true, false, kStream>(i);
    if (i < in.words) step<false, false, kStream>(i);
  }

  // kAgain: the row will be read again, from the cache or else from L2.
  template <bool kAgain>
  ML_FN LogSumExp<float> run() {
    // Before the first word and behind the last one lies at most one logit for this lane.
    const int single = rank < in.head ? rank : in.tail() + rank - in.head;
    T odd{};
    if (single < n) odd = x[single];  // together with the row's first loads
    int i = rank;
    if (kAgain) {
      const int kept = min(cached, in.words);
      for (; i + kStep - kThreads < kept; i += kStep) step<true, true, true>(i);
      if (i < kept) {
        step<false, true, false>(i);
        i += kStep;
      }
    }
    from<!kAgain>(i);
    LogSumExp<float> lse = sum.logsumexp();
    if (sizeof(T) == 2 && !(lse.sum > 0 && lse.sum <= -Limits<float>::lowest())) lse = exactly();
    if (single < n) {
      const float y[1] = {widen(odd)};
      lse.push(y);
    }
    return lse;
  }

  // What no ScaledSum holds: NaN, infinities, and numbers whose product with log2(e) is none.
  ML_FN LogSumExp<float> exactly() const {
    LogSumExp<float> lse;
    for (int k = rank; k < in.words; k += kThreads) {
      float y[kPerWord16<T>];
      unpack(in.first[k], y, T{});
      lse.push(y);
    }
    return lse;
  }
};
