// SPDX-License-Identifier: BSD-3-Clause
// One row of a pair of rows: its logits after softcap and temperature, and their exponentials.
//
// Block by block, so that a block's largest logit is known before its exponentials are taken, and
// all of it lies in the first cache meanwhile.

// Columns of a row.
struct Block {
  int64_t index, begin, end;
  int64_t length() const { return end - begin; }
};

inline Block block_at(int64_t i, int64_t cols) {
  return {i, i * kPairBlock, std::min((i + 1) * kPairBlock, cols)};
}
template <class F>
void for_each_block(int64_t cols, const F& f) {
  for (int64_t i = 0; i < pair_blocks(cols); ++i) f(block_at(i, cols));
}
// After a look in order: the caches still have the last blocks.
template <class F>
void for_each_block_backwards(int64_t cols, const F& f) {
  for (int64_t i = pair_blocks(cols); i-- > 0;) f(block_at(i, cols));
}

// f(T{}) for the type of logits. Doubles are computed with doubles only.
template <class A, class F>
void with_logit_type(DType dtype, const F& f) {
  if constexpr (std::is_same_v<A, double>) {
    f(double{});
  } else {
    if (dtype == DType::kFloat32) return f(float{});
    if (dtype == DType::kBFloat16) return f(BFloat16{});
    f(Float16{});
  }
}

template <class A>
struct PairSide {
  using V = VecOf<A>;

  const void* x;
  DType dtype;
  int64_t cols;
  A cap, temperature;
  A* exps;  // exp(y - tops[block])
  A* tops;  // the largest y of this and the former blocks
  A top = Limits<A>::lowest();
  double sum = 0;  // of exp(y - top)
  double log_sum;

  PairSide(const LogitRows& rows, int64_t cols, int64_t batch, int64_t step, int64_t token, A* exps,
           A* tops)
      : dtype(rows.dtype),
        cols(cols),
        cap(static_cast<A>(rows.softcap)),
        temperature(rows.temperatures ? static_cast<const A*>(rows.temperatures)[token]
                                      : static_cast<A>(rows.temperature)),
        exps(exps),
        tops(tops) {
    with_logit_type<A>(dtype, [&](auto type) {
      x = static_cast<const decltype(type)*>(rows.logits) + batch * rows.batch_stride +
          step * rows.step_stride;
    });
  }

  // What makes a probability of one of the block's exponentials.
  double scale(const Block& block) const {
    return std::exp(double{tops[block.index]} - double{top}) / sum;
  }

  // A block of a row: in A, after softcap and temperature, where the row is or in `copy`.
  struct Logits {
    const A* y;
    A top;
    const char* ahead;  // to be fetched meanwhile
    int64_t bytes;      // of a logit
  };

  // in_pairs: bf16 is loaded two vectors at a time, in an order of its own.
  Logits logits(const Block& block, bool in_pairs, A* copy) const {
    Logits found{copy, Limits<A>::lowest(), nullptr, 0};
    with_logit_type<A>(dtype, [&](auto type) {
      using T = decltype(type);
      const T* const raw = static_cast<const T*>(x) + block.begin;
      const A c = cap, t = temperature;  // of their own: what is written may not change them
      found.ahead = reinterpret_cast<const char*>(raw) + kPrefetchBytes;
      found.bytes = sizeof(T);
      const int64_t length = block.length();
      if constexpr (std::is_same_v<T, A>) {
        if (c == 0 && t == 1) {
          found.y = raw, found.top = largest(raw, length);
          return;
        }
      }
      V tops[2] = {V(found.top), V(found.top)};
      const auto put = [&](V y, int64_t j, auto count, V& top) {
        if (c != 0) y = softcap(y, V(c));
        if (t != 1) y = y / V(t);
        store(y, copy + j, count);
        top = max(keep(y, count, Limits<A>::lowest()), top);
      };
      int64_t j = 0;
      for (; in_pairs && j + 2 * V::kLanes <= length; j += 2 * V::kLanes) {
        V a, b;
        V::load2(raw + j, a, b);
        put(a, j, Full{}, tops[0]), put(b, j + V::kLanes, Full{}, tops[1]);
      }
      for_each_vector<V>(j, length, [&](int64_t i, auto count) {
        put(load<V>(raw + i, count), i, count, tops[0]);
      });
      found.top = lane_max(max(tops[0], tops[1]));
    });
    return found;
  }

  // -inf and NaN are no tops. Four at a time: one would wait for the one before it.
  static A largest(const A* y, int64_t length) {
    const A lowest = Limits<A>::lowest();
    V tops[4] = {V(lowest), V(lowest), V(lowest), V(lowest)};
    int64_t j = 0;
    for (; j + 4 * V::kLanes <= length; j += 4 * V::kLanes) {
      for (int i = 0; i < 4; ++i) tops[i] = max(V::load(y + j + i * V::kLanes), tops[i]);
    }
    for_each_vector<V>(j, length, [&](int64_t i, auto count) {
      tops[0] = max(keep(load<V>(y + i, count), count, lowest), tops[0]);
    });
    return lane_max(max(max(tops[0], tops[1]), max(tops[2], tops[3])));
  }

  // Of a block whose top is raised. also(j, Full or Part, y) meanwhile.
  template <class F>
  ML_FN void exponentials(const Block& block, const Logits& logits, const F& also) {
    const int64_t length = block.length();
    const A* const y = logits.y;
    const V top(tops[block.index]);
    A* const to = exps + block.begin;
    const auto at = [&](int64_t j, auto count) {
      const V logit = load<V>(y + j, count), e = exp(logit - top);
      store(e, to + j, count);
      also(j, count, logit);
      return e;
    };
    V total(0);
    int64_t j = 0;
    for (; j + 4 * V::kLanes <= length; j += 4 * V::kLanes) {
      for (int i = 0; i < 4; i += 2) {
        __builtin_prefetch(logits.ahead + (j + i * V::kLanes) * logits.bytes, 0, 2);
      }
      V e[4];
      for (int i = 0; i < 4; ++i) e[i] = at(j + i * V::kLanes, Full{});
      total = total + tree_sum(e);
    }
    for_each_vector<V>(
        j, length, [&](int64_t i, auto count) { total = total + keep(at(i, count), count, 0); });
    sum += lane_sum(total);
  }

  // An exponential is relative to no less than the largest logit of its block: far above another
  // one it would be rounded by more than lets p - q cancel.
  void raise(const Block& block, A to) {
    if (to > top) {
      sum *= std::exp(double{top} - double{to});
      top = to;
    }
    tops[block.index] = top;
  }

  // Also returns the first of the row's largest logits, or its first NaN, as PyTorch's argmax.
  int64_t entropy(A* result) const {
    double spread[1] = {0};
    A highest = -Limits<A>::infinity();
    int64_t best = 0;
    for_each_block(cols, [&](const Block& block) {
      A copy[kPairBlock];
      const A* const y = logits(block, false, copy).y;
      add_up<V>(block.length(), spread, [&](int64_t j, auto count, V(&terms)[1]) {
        const V away = bounded_below(load<V>(y + j, count) - V(top));
        terms[0] = -exp(away) * V(static_cast<A>(1 / sum)) * away;
      });
      for (int64_t j = 0; j < block.length() && highest == highest; ++j) {
        if (!(y[j] <= highest)) highest = y[j], best = block.begin + j;
      }
    });
    *result = static_cast<A>(log_sum + spread[0]);
    return best;
  }
};
