// SPDX-License-Identifier: BSD-3-Clause
// A divergence of pairs of rows, and its gradient, without ever holding a row of probabilities.
//
// A pair is read once from memory: its second look, which takes the value, and its third one, which
// writes the gradient, find it in the cache. Rows of half types, or with a softcap or a
// temperature, are brought to what is computed with once, into memory that stays in the cache. A
// masked row is never read; its gradient is set to zero.

// e^x - 1 - x: to 1e-8 for |x| < 1/4.
template <class V>
ML_FN V expm1_less(V x) {
  V g = V(1.0f / 5040);
  g = fma(g, x, V(1.0f / 720));
  g = fma(g, x, V(1.0f / 120));
  g = fma(g, x, V(1.0f / 24));
  g = fma(g, x, V(1.0f / 6));
  g = fma(g, x, V(0.5f));
  return g * (x * x);
}
template <int kBytes>
ML_FN Portable<double, kBytes> expm1_less(Portable<double, kBytes> x) {
  for (int i = 0; i < x.kLanes; ++i) x.v[i] = std::expm1(x.v[i]) - x.v[i];
  return x;
}

// 1 + x is doubled until it is near 1, and there log(w) = 2 atanh(s), s = (w - 1) / (w + 1).
template <class V>
ML_FN V log1p(V x) {
  const V half_root(0.70710678f);
  V w = V(1) + x, rest = x, doublings(0);
  while (any_greater(half_root, w)) {
    doublings = if_less(w, half_root, doublings + V(1), doublings);
    rest = if_less(w, half_root, w + w - V(1), rest);
    w = if_less(w, half_root, w + w, w);
  }
  const V s = rest / (rest + V(2)), square = s * s;
  V p = V(2.0f / 9);
  p = fma(p, square, V(2.0f / 7));
  p = fma(p, square, V(2.0f / 5));
  p = fma(p, square, V(2.0f / 3));
  p = fma(p, square, V(2.0f));
  return fma(doublings, V(-0.69314718f), p * s);
}
template <int kBytes>
ML_FN Portable<double, kBytes> log1p(Portable<double, kBytes> x) {
  for (int i = 0; i < x.kLanes; ++i) x.v[i] = std::log1p(x.v[i]);
  return x;
}

#include "kernels/divergence.inl.h"

template <class A>
struct PairKernel {
  using V = VecOf<A>;
  using Field = DivergenceField;

  const DivergenceArgs& args;
  A* const scratch;  // kScratchRows rows

  struct Pair {
    const A *y, *z;
    int64_t row, token;
    SoftmaxPair<V> softmax;
  };

  template <class Kind>
  void run(int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t token = token_of(row);
      if (column(Field::kWeight, token) == 0) {
        masked(row, token);
        continue;
      }
      Pair r{row_of(args.student, row, token, scratch),
             row_of(args.teacher, row, token, scratch + args.cols),
             row,
             token,
             {}};
      if (args.forward) {
        const LogSumExp<A> student = log_sum(r.y), teacher = log_sum(r.z);
        column(Field::kTop, token) = student.top, column(Field::kSum, token) = student.sum;
        column(Field::kTeacherTop, token) = teacher.top;
        column(Field::kTeacherSum, token) = teacher.sum;
      }
      set_softmax(&r);
      if (args.forward) {
        value<Kind>(r);
        if (args.stats) stats(r);
      } else {
        gradient<Kind>(r);
      }
    }
    if (args.stream) end_streams();
  }

 private:
  // Rows

  A& column(int64_t which, int64_t token) const {
    return static_cast<A*>(args.table)[which * args.rows + token];
  }

  // With shift the last row of a sequence is none's, and gets the first token, which is masked.
  int64_t token_of(int64_t row) const {
    if (!args.shift) return row;
    const int64_t step = row % args.steps;
    return step == args.steps - 1 ? row - step : row + 1;
  }

  void masked(int64_t row, int64_t token) const {
    if (args.forward) {
      const int64_t fields = args.stats ? Field::kCount : Field::kSaved;
      for (int64_t f = Field::kValue; f < fields; ++f) column(f, token) = 0;
    }
    if (args.dlogits) {
      with_gradient_type(
          [&](auto type) { clear<V>(dlogits_of<decltype(type)>(row), args.cols, args.stream); });
    }
  }

  // Doubles are computed with doubles only.
  template <class F>
  static void with_input_type(DType dtype, const F& f) {
    if constexpr (std::is_same_v<A, double>) {
      f(double{});
    } else {
      if (dtype == DType::kFloat32) return f(float{});
      if (dtype == DType::kBFloat16) return f(BFloat16{});
      f(Float16{});
    }
  }

  // The gradient has the type of the student's logits.
  template <class F>
  void with_gradient_type(const F& f) const {
    with_input_type(args.student.dtype, f);
  }

  int64_t offset(int64_t row, int64_t batch_stride, int64_t step_stride) const {
    return (row / args.steps) * batch_stride + (row % args.steps) * step_stride;
  }

  template <class T>
  const T* logits_of(const LogitRows& rows, int64_t row) const {
    return static_cast<const T*>(rows.logits) + offset(row, rows.batch_stride, rows.step_stride);
  }

  template <class T>
  T* dlogits_of(int64_t row) const {
    return static_cast<T*>(args.dlogits) +
           offset(row, args.grad_batch_stride, args.grad_step_stride);
  }

  A temperature(const LogitRows& rows, int64_t token) const {
    return rows.temperatures ? static_cast<const A*>(rows.temperatures)[token]
                             : static_cast<A>(rows.temperature);
  }

  // The row in A, after softcap and temperature: where it is, or in `copy`.
  const A* row_of(const LogitRows& rows, int64_t row, int64_t token, A* copy) const {
    const A* found = nullptr;
    with_input_type(rows.dtype, [&](auto type) {
      using T = decltype(type);
      const T* const x = logits_of<T>(rows, row);
      const A t = temperature(rows, token), cap = static_cast<A>(rows.softcap);
      if constexpr (std::is_same_v<T, A>) {
        if (cap == 0 && t == 1) return static_cast<void>(found = x);
      }
      for_each_vector<V>(0, args.cols, [&](int64_t j, auto count) {
        V y = load<V>(x + j, count);
        if (cap != 0) y = softcap(y, V(cap));
        if (t != 1) y = y / V(t);
        store(y, copy + j, count);
      });
      found = copy;
    });
    return found;
  }

  // Looks

  LogSumExp<A> log_sum(const A* y) const {
    constexpr int kBlock = V::kBlock;
    constexpr int64_t kStep = kBlock * V::kLanes;
    const V nothing(-std::numeric_limits<A>::infinity());
    LogSumExp<A> all;
    for_each_run<V>(0, args.cols, 1024, [&](int64_t j, int64_t end) {
      LogSumExp<V> lanes;
      for (; j + kStep <= end; j += kStep) {
        V block[kBlock];
        for (int i = 0; i < kBlock; ++i) block[i] = V::load(y + j + i * V::kLanes);
        lanes.push(block);
      }
      for_each_vector<V>(j, end, [&](int64_t i, auto count) {
        const V one[1] = {keep(load<V>(y + i, count), count, lane_max(nothing))};
        lanes.push(one);
      });
      const A top = lane_max(lanes.top);
      lanes.raise(V(top));
      merge(&all, LogSumExp<A>(top, lane_sum(lanes.sum)));
    });
    return all;
  }

  void set_softmax(Pair* r) const {
    const auto at = [&](int64_t field) { return column(field, r->token); };
    r->softmax.q = {V(at(Field::kTop)), V(1 / at(Field::kSum))};
    r->softmax.p = {V(at(Field::kTeacherTop)), V(1 / at(Field::kTeacherSum))};
    const double student = std::log(double(at(Field::kSum))) + at(Field::kTop);
    const double teacher = std::log(double(at(Field::kTeacherSum))) + at(Field::kTeacherTop);
    r->softmax.shift = V(static_cast<A>(student - teacher));
  }

  template <class Kind, class Count>
  ML_FN ClassPair<V> pair_at(const Pair& r, int64_t j, Count count) const {
    return pair_of<Kind>(load<V>(r.y + j, count), load<V>(r.z + j, count), r.softmax);
  }

  // And the gradient, where it is wanted: forward KL's at once, that of the others from the
  // probabilities and scores of this look, which stay in the cache.
  template <class Kind>
  void value(const Pair& r) const {
    with_gradient_type([&](auto type) {
      using T = decltype(type);
      const Writer<T> writer = writer_of<Kind, T>(r);
      const V beta(static_cast<A>(args.beta));
      A *const qs = scratch + 2 * args.cols, *const scores = scratch + 3 * args.cols;
      double sums[2] = {0, 0};
      add_up<V>(args.cols, sums, [&](int64_t j, auto count, V(&terms)[2]) {
        const ClassPair<V> c = pair_at<Kind>(r, j, count);
        const ClassPart<V> part = Kind::part(c, beta);
        terms[0] = part.value, terms[1] = c.q * part.score;
        if (!writer.dx) return;
        if constexpr (Kind::kScored) {
          store(c.q, qs + j, count), store(part.score, scores + j, count);
        } else {
          writer.put(j, count, Kind::slope(c));
        }
      });
      // A teacher's NaN reaches a mixture through the sums alone.
      const double nan_or_zero = 0 * lane_max(r.softmax.shift);
      column(Field::kValue, r.token) = static_cast<A>(sums[0] + nan_or_zero);
      column(Field::kMeanScore, r.token) = static_cast<A>(sums[1] + nan_or_zero);
      if constexpr (Kind::kScored) {
        if (!writer.dx) return;
        const V mean(column(Field::kMeanScore, r.token));
        for_each_vector<V>(0, args.cols, [&](int64_t j, auto count) {
          writer.put(j, count, load<V>(qs + j, count) * (load<V>(scores + j, count) - mean));
        });
      }
    });
  }

  void stats(const Pair& r) const {
    const auto entropy_of = [&](const A* y, const Softmax<V>& softmax, A sum) {
      double spread[1] = {0};
      add_up<V>(args.cols, spread, [&](int64_t j, auto count, V(&terms)[1]) {
        const V x = load<V>(y + j, count);
        const V away = bounded_below(x - softmax.top);
        terms[0] = V(0) - exp(away) * softmax.inverse * away;
      });
      return static_cast<A>(std::log(double(sum)) + spread[0]);
    };
    column(Field::kEntropy, r.token) = entropy_of(r.y, r.softmax.q, column(Field::kSum, r.token));
    column(Field::kTeacherEntropy, r.token) =
        entropy_of(r.z, r.softmax.p, column(Field::kTeacherSum, r.token));
    column(Field::kAgreement, r.token) = first_of_largest(r.y) == first_of_largest(r.z);
  }

  // The first NaN, where there is one, as PyTorch's argmax.
  int64_t first_of_largest(const A* y) const {
    int64_t best = 0;
    for (int64_t j = 0; j < args.cols; ++j) {
      if (y[j] != y[j]) return j;
      if (y[j] > y[best]) best = j;
    }
    return best;
  }

  // Gradient

  template <class Kind>
  void gradient(const Pair& r) const {
    with_gradient_type([&](auto type) {
      const auto writer = writer_of<Kind, decltype(type)>(r);
      const V beta(static_cast<A>(args.beta)), mean(column(Field::kMeanScore, r.token));
      for_each_vector<V>(0, args.cols, [&](int64_t j, auto count) {
        const ClassPair<V> c = pair_at<Kind>(r, j, count);
        if constexpr (Kind::kScored) {
          writer.put(j, count, c.q * (Kind::part(c, beta).score - mean));
        } else {
          writer.put(j, count, Kind::slope(c));
        }
      });
    });
  }

  // From dD/dy to the gradient of the logits, vector by vector.
  template <class T>
  struct Writer {
    T* dx;
    const T* x;
    V scale, cap;
    bool capped, around;  // around the caches, in aligned pairs
    mutable V held;

    template <class Count>
    ML_FN V finish(V d, int64_t j, Count count) const {
      d = d * scale;
      return capped ? d * tanh_slope(tanh_rest(load<V>(x + j, count) / cap)) : d;
    }
    ML_FN void put(int64_t j, Full, V d) const {
      d = finish(d, j, Full{});
      if (!around) return store(d, dx + j, Full{});
      if (j % (2 * V::kLanes) == 0) {
        held = d;
        if (j + 2 * V::kLanes > cols) store(d, dx + j, Full{});
      } else {
        V::stream2(dx + j - V::kLanes, held, d);
      }
    }
    ML_FN void put(int64_t j, Part part, V d) const { store(finish(d, j, part), dx + j, part); }
    int64_t cols;
  };

  template <class Kind, class T>
  Writer<T> writer_of(const Pair& r) const {
    if (!args.dlogits) return {};
    T* const dx = dlogits_of<T>(r.row);
    const A t = temperature(args.student, r.token), cap = static_cast<A>(args.student.softcap);
    const bool aligned = reinterpret_cast<uintptr_t>(dx) % 64 == 0;
    // Pairs of half types have an order of their own.
    const bool around = args.stream && aligned && std::is_same_v<T, A> &&
                        static_cast<const void*>(dx) != static_cast<const void*>(r.y);
    return {dx,
            logits_of<T>(args.student, r.row),
            V(static_cast<A>(upstream(r.token) * factor_of<Kind>() / t)),
            V(cap),
            cap != 0,
            around,
            V(0),
            args.cols};
  }

  template <class Kind>
  double factor_of() const {
    if constexpr (Kind::kScored) return Kind::factor(args.beta);
    return 1;
  }

  double upstream(int64_t token) const {
    const A* const dloss = static_cast<const A*>(args.dloss);
    const double* group = group_at(args.groups, group_of(args.groups, token));
    const double g = dloss ? dloss[args.dloss_per_token ? token : 0] : A(1);
    return g * column(Field::kWeight, token) * group[GroupField::kScaleLoss];
  }
};

template <class A>
void run_pairs(const DivergenceArgs& args, int64_t begin, int64_t end, A* scratch) {
  const PairKernel<A> pairs{args, scratch};
  switch (args.kind) {
    case Divergence::kForwardKl:
      return pairs.template run<ForwardKl>(begin, end);
    case Divergence::kReverseKl:
      return pairs.template run<ReverseKl>(begin, end);
    case Divergence::kJsd:
      return pairs.template run<JensenShannon>(begin, end);
    case Divergence::kSkewForwardKl:
      return pairs.template run<SkewForwardKl>(begin, end);
    case Divergence::kSkewReverseKl:
      return pairs.template run<SkewReverseKl>(begin, end);
  }
}

void divergence_rows(const DivergenceArgs& args, int64_t begin, int64_t end, void* scratch) {
  if (args.wide) return run_pairs(args, begin, end, static_cast<double*>(scratch));
  run_pairs(args, begin, end, static_cast<float*>(scratch));
}
