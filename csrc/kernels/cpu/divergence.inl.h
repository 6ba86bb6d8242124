// SPDX-License-Identifier: BSD-3-Clause
// A divergence of pairs of rows, and its gradient, without ever holding a row of probabilities.
//
// A pair is read once from memory, by a look for the largest numbers; the others find it in the
// cache. The second leaves the exponentials there, the third takes the value from them and leaves
// the scores, from which the last one writes the gradient. Rows of half types, or with a softcap or
// a temperature, are brought to what is computed with by the first look. A masked row is never
// read; its gradient is set to zero.

template <int kBytes>
ML_FN Portable<double, kBytes> expm1_less(Portable<double, kBytes> x) {
  for (int i = 0; i < x.kLanes; ++i) x.v[i] = std::expm1(x.v[i]) - x.v[i];
  return x;
}

// m is doubled until it is near, and there log(w) = 2 atanh(s), s = (w - 1) / (w + 1), by a minimax
// polynomial, to 2e-8 for |s| <= 1/3.
template <class V>
ML_FN V log_quotient(V m, V larger, V less) {
  const V half = larger * V(0.5f);
  V above = V(0) - less, doublings(0);
  for (int i = 0; i < 128 && any_greater(half, m); ++i) {
    const V twice = m + m;
    doublings = if_less(m, half, doublings + V(1), doublings);
    above = if_less(m, half, twice - larger, above);
    m = if_less(m, half, twice, m);
  }
  const V s = above / max(m + larger, V(kTiny)), square = s * s;
  V p = V(0.2688353657722473f);
  p = fma(p, square, V(0.28231292963027954f));
  p = fma(p, square, V(0.40007781982421875f));
  p = fma(p, square, V(0.6666663885116577f));
  p = fma(p, square, V(2.0f));
  return fma(doublings, V(-0.69314718f), p * s);
}
template <int kBytes>
ML_FN Portable<double, kBytes> log_quotient(Portable<double, kBytes>,
                                            Portable<double, kBytes> larger,
                                            Portable<double, kBytes> less) {
  for (int i = 0; i < less.kLanes; ++i) {
    less.v[i] = std::log1p(-less.v[i] / max(larger.v[i], double{kTiny}));
  }
  return less;
}

#include "kernels/divergence.inl.h"

template <class A>
struct PairKernel {
  using V = VecOf<A>;
  using Field = DivergenceField;

  const DivergenceArgs& args;
  A* const scratch;  // kScratchRows rows

  // A row as it is computed with, and its exponentials.
  struct Side {
    const A* y;
    A* exps;     // exp(y - top), in the scratch
    A top;       // the largest
    double sum;  // of exps
  };
  struct Pair {
    Side student, teacher;
    int64_t row, token;
    SoftmaxPair<V> softmax;
  };

  template <class Kind>
  void run(int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t token = token_of(args, row, row % args.steps);
      if (column(Field::kWeight, token) == 0) {
        masked(row, token);
        continue;
      }
      Pair r{side_of(args.student, row, token, scratch),
             side_of(args.teacher, row, token, scratch + 2 * args.cols),
             row,
             token,
             {}};
      set_softmax(&r);
      const A mean = score<Kind>(r);
      if (args.forward && args.stats) stats(r);
      if (args.dlogits) {
        with_gradient_type(
            [&](auto type) { write<Kind>(r, mean, dlogits_of<decltype(type)>(row)); });
      }
    }
    if (args.stream) end_streams();
  }

 private:
  // Rows

  A& column(int64_t which, int64_t token) const {
    return static_cast<A*>(args.table)[which * args.rows + token];
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

  // Looks

  // In A, after softcap and temperature: where the row is, or in `copy`, which is two rows.
  Side side_of(const LogitRows& rows, int64_t row, int64_t token, A* copy) const {
    Side side{copy, copy + args.cols, A(0), 0};
    with_input_type(rows.dtype, [&](auto type) {
      using T = decltype(type);
      const T* const x = logits_of<T>(rows, row);
      const A t = temperature(rows, token), cap = static_cast<A>(rows.softcap);
      if constexpr (std::is_same_v<T, A>) {
        if (cap == 0 && t == 1) {
          side.y = x;
          return exponentials(&side, [&](int64_t j, auto count) {
            __builtin_prefetch(x + j + kPrefetchBytes / sizeof(A), 0, 2);
            return load<V>(x + j, count);
          });
        }
      }
      exponentials(&side, [&](int64_t j, auto count) {
        V y = load<V>(x + j, count);
        if (cap != 0) y = softcap(y, V(cap));
        if (t != 1) y = y / V(t);
        store(y, copy + j, count);
        return y;
      });
    });
    return side;
  }

  // Of the row that f(j, Full or Part) gives and leaves at side->y. The top is the largest of all:
  // far above another one, an exponential would be rounded by more than lets p - q cancel.
  template <class F>
  ML_FN void exponentials(Side* side, const F& f) const {
    side->top = largest(f);
    const V top(side->top);
    const A* const y = side->y;
    A* const exps = side->exps;
    double sum[1] = {0};
    add_up<V>(args.cols, sum, [&](int64_t j, auto count, V(&terms)[1]) {
      terms[0] = exp(load<V>(y + j, count) - top);
      store(terms[0], exps + j, count);
    });
    side->sum = sum[0];
  }

  // -inf and NaN are no tops. Four at a time: one would wait for the one before it.
  template <class F>
  ML_FN A largest(const F& f) const {
    const A lowest = Limits<A>::lowest();
    V tops[4] = {V(lowest), V(lowest), V(lowest), V(lowest)};
    int64_t j = 0;
    for (; j + 4 * V::kLanes <= args.cols; j += 4 * V::kLanes) {
      for (int i = 0; i < 4; ++i) tops[i] = max(f(j + i * V::kLanes, Full{}), tops[i]);
    }
    for_each_vector<V>(j, args.cols, [&](int64_t i, auto count) {
      tops[0] = max(keep(f(i, count), count, lowest), tops[0]);
    });
    return lane_max(max(max(tops[0], tops[1]), max(tops[2], tops[3])));
  }

  void set_softmax(Pair* r) const {
    const Side &student = r->student, &teacher = r->teacher;
    r->softmax.q = {V(student.top), V(static_cast<A>(1 / student.sum))};
    r->softmax.p = {V(teacher.top), V(static_cast<A>(1 / teacher.sum))};
    r->softmax.shift = V(static_cast<A>((std::log(student.sum) + student.top) -
                                        (std::log(teacher.sum) + teacher.top)));
    if (!args.forward) return;
    column(Field::kTop, r->token) = student.top;
    column(Field::kSum, r->token) = static_cast<A>(student.sum);
    column(Field::kTeacherTop, r->token) = teacher.top;
    column(Field::kTeacherSum, r->token) = static_cast<A>(teacher.sum);
  }

  // The value, and the mean of the scores. What the gradient is written from, scores or forward
  // KL's slopes, takes the place of the teacher's exponentials.
  template <class Kind>
  A score(const Pair& r) const {
    // Of its own, or each vector would fetch them anew.
    const SoftmaxPair<V> softmax = r.softmax;
    const A *const y = r.student.y, *const z = r.teacher.y, *const e_y = r.student.exps;
    A* const e_z = r.teacher.exps;
    const V beta(static_cast<A>(args.beta));
    double sums[Kind::kScored ? 2 : 1] = {0};
    add_up<V>(args.cols, sums, [&](int64_t j, auto count, auto& terms) {
      const ClassPair<V> c =
          pair_of<Kind>(load<V>(y + j, count), load<V>(z + j, count), load<V>(e_y + j, count),
                        load<V>(e_z + j, count), softmax);
      const ClassPart<V> part = Kind::part(c, beta);
      terms[0] = part.value;
      if constexpr (Kind::kScored) terms[1] = c.q * part.score;
      store(part.score, e_z + j, count);
    });
    // A teacher's NaN reaches the scores, which are bounded, through the sum alone.
    const double nan_or_zero = 0 * lane_max(softmax.shift);
    const A mean = static_cast<A>((Kind::kScored ? sums[std::size(sums) - 1] : 0) + nan_or_zero);
    if (args.forward) {
      column(Field::kValue, r.token) = static_cast<A>(sums[0]);
      column(Field::kMeanScore, r.token) = mean;
    }
    return mean;
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
    column(Field::kEntropy, r.token) =
        entropy_of(r.student.y, r.softmax.q, column(Field::kSum, r.token));
    column(Field::kTeacherEntropy, r.token) =
        entropy_of(r.teacher.y, r.softmax.p, column(Field::kTeacherSum, r.token));
    column(Field::kAgreement, r.token) =
        first_of_largest(r.student.y) == first_of_largest(r.teacher.y);
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

  // The gradient of the logits, around the caches where that is asked for and the type is their
  // own: pairs of half types have an order of their own.
  template <class Kind, class T>
  void write(const Pair& r, A mean, T* dx) const {
    const T* const x = logits_of<T>(args.student, r.row);
    const A *const e_y = r.student.exps, *const scores = r.teacher.exps;
    double all = upstream(r.token) / temperature(args.student, r.token);
    if constexpr (Kind::kScored) all *= Kind::factor(args.beta) / r.student.sum;
    const bool capped = args.student.softcap != 0;
    const V scale(static_cast<A>(all)), shift(mean), cap(static_cast<A>(args.student.softcap));
    const auto at = [&](int64_t j, auto count) {
      V d = load<V>(scores + j, count);
      if constexpr (Kind::kScored) d = load<V>(e_y + j, count) * (d - shift);
      d = d * scale;
      return capped ? d * softcap_slope(load<V>(x + j, count), cap) : d;
    };
    const auto put = [&](int64_t j, auto count) { store(at(j, count), dx + j, count); };
    int64_t j = 0;
    if constexpr (std::is_same_v<T, A>) {
      if (args.stream) {
        j = std::min(args.cols, elements_to_line(dx));
        for_each_vector<V>(0, j, put);
        for (; j + 2 * V::kLanes <= args.cols; j += 2 * V::kLanes) {
          V::stream2(dx + j, at(j, Full{}), at(j + V::kLanes, Full{}));
        }
      }
    }
    for_each_vector<V>(j, args.cols, put);
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
