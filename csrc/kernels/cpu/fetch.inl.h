// SPDX-License-Identifier: BSD-3-Clause
// How the CPU moves along a row: vectors and the part of one at the end, runs of additions that are
// short enough, and memory that is fetched before it is needed.

// How far ahead of its use a row is fetched.
constexpr int64_t kPrefetchBytes = 16384;

// A full vector, or the first n lanes of one.
struct Full {};
struct Part {
  int n;
};
template <class V, class T>
ML_FN V load(const T* p, Full) {
  return V::load(p);
}
template <class V, class T>
ML_FN V load(const T* p, Part part) {
  return V::load(p, part.n);
}
template <class V, class T>
ML_FN void store(V v, T* p, Full) {
  v.store(p);
}
template <class V, class T>
ML_FN void store(V v, T* p, Part part) {
  v.store(p, part.n);
}
template <class V>
ML_FN V keep(V v, Full, typename V::Scalar) {
  return v;
}
template <class V>
ML_FN V keep(V v, Part part, typename V::Scalar fill) {
  return keep(v, part.n, fill);
}

// f(j, Full or Part) over [begin, end).
template <class V, class F>
ML_FN void for_each_vector(int64_t begin, int64_t end, const F& f) {
  for (; begin + V::kLanes <= end; begin += V::kLanes) f(begin, Full{});
  if (begin < end) f(begin, Part{static_cast<int>(end - begin)});
}

// f(begin, end) over runs of [begin, end): a lane that adds up more terms than this in a row loses
// digits.
template <class V, class F>
ML_FN void for_each_run(int64_t begin, int64_t end, int64_t terms, const F& f) {
  const int64_t size = terms * V::kLanes;
  for (; begin < end; begin += size) f(begin, std::min(begin + size, end));
}

// sums[i] += sum_j of the i-th of the vectors that f(j, Full or Part, terms) makes of [0, cols),
// lanes that are not there left out.
template <class V, int N, class F>
ML_FN void add_up(int64_t cols, double (&sums)[N], const F& f) {
  for_each_run<V>(0, cols, 64, [&](int64_t first, int64_t last) {
    V lanes[N];
    for (V& lane : lanes) lane = V(0);
    for_each_run<V>(first, last, 8, [&](int64_t begin, int64_t end) {
      V few[N];
      for (V& lane : few) lane = V(0);
      for_each_vector<V>(begin, end, [&](int64_t j, auto count) {
        V terms[N];
        f(j, count, terms);
        for (int i = 0; i < N; ++i) few[i] = few[i] + keep(terms[i], count, 0);
      });
      for (int i = 0; i < N; ++i) lanes[i] = lanes[i] + few[i];
    });
    for (int i = 0; i < N; ++i) sums[i] += lane_sum(lanes[i]);
  });
}

// Both cache lines of two vectors, or the one of two half vectors, into the second level: the first
// one has too few requests in flight, and reading would wait for them.
template <class V, class T>
ML_FN void prefetch(const T* p) {
  __builtin_prefetch(p, 0, 2);
  if constexpr (2 * V::kLanes * sizeof(T) > 64) __builtin_prefetch(p + V::kLanes, 0, 2);
}

// f(to, fetched) works on [j, to) of the row x and meanwhile fetches what lies from `fetched` on:
// kPrefetchBytes further in x, and where x ends, the row `next`.
template <class T, class F>
void fetch_ahead(const T* x, const T* next, int64_t cols, const int64_t& j, int64_t end,
                 const F& f) {
  constexpr int64_t kElements = kPrefetchBytes / sizeof(T);
  const int64_t last = std::max<int64_t>(0, cols - kElements);
  f(std::min(last, end), x + j + kElements);
  f(end, next + std::max<int64_t>(0, j - last));
}

// Writing around the caches goes by whole cache lines.
template <class T>
int64_t elements_to_line(const T* p) {
  const uintptr_t past = reinterpret_cast<uintptr_t>(p) % 64;
  return past ? static_cast<int64_t>((64 - past) / sizeof(T)) : 0;
}

template <class V, class T>
void clear(T* dx, int64_t count, bool stream) {
  int64_t j = stream ? std::min(count, elements_to_line(dx)) : count;
  std::memset(dx, 0, j * sizeof(T));
  for (; j + 2 * V::kLanes <= count; j += 2 * V::kLanes) V::stream2(dx + j, V(0), V(0));
  std::memset(dx + j, 0, (count - j) * sizeof(T));
}
