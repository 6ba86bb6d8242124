// SPDX-License-Identifier: BSD-3-Clause
// A divergence of pairs of rows, and its gradient, without ever holding a row of probabilities.
//
// A pair is read once from memory, block by block: a block's largest logits are known before its
// exponentials are taken, and all of it lies in the first cache meanwhile. What is left of the
// pair are the exponentials, each relative to the largest logit up to its block, and the
// differences of the logits, from which a second look takes the value and leaves the scores. The
// gradient of forward KL is its scores; the others' waits for their mean. A masked row is never
// read; its gradient is set to zero.

template <int kBytes>
ML_FN Portable<double, kBytes> expm1_less(Portable<double, kBytes> x) {
  for (int i = 0; i < x.kLanes; ++i) x.v[i] = std::expm1(x.v[i]) - x.v[i];
  return x;
}

template <class V>
ML_FN V ratio(V a, V b) {
  return a / b;
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

#include "kernels/cpu/pair_side.inl.h"
#include "kernels/divergence.inl.h"

template <class A>
struct PairKernel {
  using V = VecOf<A>;
  using Field = DivergenceField;

  const DivergenceArgs& args;
  A* const scratch;  // pair_scratch(cols) numbers

  // bf16 is loaded and stored two vectors at a time, in an order of its own, where both rows are.
  const bool in_pairs = args.student.dtype == args.teacher.dtype;

  struct Pair {
    int64_t row, token;
    PairSide<A> student, teacher;
    A* apart;  // the teacher's logits less the student's, from their origins; then the scores
  };

  template <class Kind>
  void run(int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t token = token_of(args, row, row % args.steps);
      if (column(Field::kWeight, token) == 0) {
        masked(row, token);
        continue;
      }
      const Pair r = look(row, token);
      if (args.forward && args.stats) stats(r);
      score<Kind>(r);
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

  // The gradient has the type of the student's logits.
  template <class F>
  void with_gradient_type(const F& f) const {
    with_logit_type<A>(args.student.dtype, f);
  }

  template <class T>
  T* dlogits_of(int64_t row) const {
    return static_cast<T*>(args.dlogits) + (row / args.steps) * args.grad_batch_stride +
           (row % args.steps) * args.grad_step_stride;
  }

  // Looks

  Pair look(int64_t row, int64_t token) const {
    const int64_t cols = args.cols, batch = row / args.steps, step = row % args.steps;
    A* const tops = scratch + 3 * cols;
    Pair r{row,
           token,
           {args.student, cols, batch, step, token, scratch, tops},
           {args.teacher, cols, batch, step, token, scratch + cols, tops + pair_blocks(cols)},
           scratch + 2 * cols};
    for_each_block(cols, [&](const Block& block) { look_at_block(&r, block); });
    PairSide<A>&student = r.student, &teacher = r.teacher;
    student.log_sum = std::log(student.sum);
    teacher.log_sum = std::log(teacher.sum);
    if (args.forward) {
      column(Field::kTop, token) = student.top;
      column(Field::kSum, token) = static_cast<A>(student.sum);
      column(Field::kTeacherTop, token) = teacher.top;
      column(Field::kTeacherSum, token) = static_cast<A>(teacher.sum);
    }
    return r;
  }

  void look_at_block(Pair* r, const Block& block) const {
    A copy[kPairBlock], teacher_copy[kPairBlock];
    const auto student = r->student.logits(block, in_pairs, copy);
    const auto teacher = r->teacher.logits(block, in_pairs, teacher_copy);
    r->student.raise(block, student.top);
    r->teacher.raise(block, teacher.top);
    const Origins<A> from = origins(*r, block);
    const V of_student(from.student), of_teacher(from.teacher);
    A* const apart = r->apart + block.begin;
    r->student.exponentials(block, student, [](int64_t, auto, V) {});
    r->teacher.exponentials(block, teacher, [&](int64_t j, auto count, V z) {
      const V y = load<V>(student.y + j, count);
      store((z - of_teacher) - (y - of_student), apart + j, count);
    });
  }

  Origins<A> origins(const Pair& r, const Block& block) const {
    return origins_of(r.student.tops[block.index], r.teacher.tops[block.index]);
  }
  // The student's log-sum-exp less the teacher's, from the block's origins.
  A shift(const Pair& r, const Block& block) const {
    const Origins<A> from = origins(r, block);
    const double of_student = double{r.student.top} - double{from.student};
    const double of_teacher = double{r.teacher.top} - double{from.teacher};
    return static_cast<A>((r.student.log_sum + of_student) - (r.teacher.log_sum + of_teacher));
  }

  void stats(const Pair& r) const {
    const int64_t choice = r.student.entropy(&column(Field::kEntropy, r.token));
    const int64_t other = r.teacher.entropy(&column(Field::kTeacherEntropy, r.token));
    column(Field::kAgreement, r.token) = choice == other;
  }

  // one(j, Full or Part) and two(j), which takes two vectors, over [begin, end): the first vectors
  // end at `head`.
  template <class One, class Two>
  ML_FN static void for_each_two(int64_t begin, int64_t head, int64_t end, const One& one,
                                 const Two& two) {
    for_each_vector<V>(begin, head, one);
    int64_t j = head;
    for (; j + 2 * V::kLanes <= end; j += 2 * V::kLanes) two(j);
    for_each_vector<V>(j, end, one);
  }

  // The value, and the gradient by way of the scores.
  template <class Kind>
  void score(const Pair& r) const {
    double sums[2] = {0, 0};
    for_each_block_backwards(args.cols, [&](const Block& block) {
      if (Kind::kScored || !args.dlogits) {
        return score_block<Kind>(r, block, Scores{r.apart + block.begin}, sums);
      }
      with_gradient_type([&](auto type) {
        score_block<Kind>(r, block, Gradient<Kind, decltype(type)>(*this, r, block), sums);
      });
    });
    // A teacher's NaN reaches the scores, which are bounded, through the sum alone.
    const A mean = static_cast<A>(sums[1] + 0 * r.teacher.log_sum);
    if (args.forward) {
      column(Field::kValue, r.token) = static_cast<A>(sums[0]);
      column(Field::kMeanScore, r.token) = mean;
    }
    if (!Kind::kScored || !args.dlogits) return;
    with_gradient_type([&](auto type) {
      for_each_block(args.cols, [&](const Block& block) {
        write_block(r, block, mean, Gradient<Kind, decltype(type)>(*this, r, block));
      });
    });
  }

  template <class Kind, class Out>
  void score_block(const Pair& r, const Block& block, const Out& out, double (&sums)[2]) const {
    // Of its own, or each vector would fetch them anew.
    const SoftmaxPair<V> softmax{V(static_cast<A>(r.student.scale(block))),
                                 V(static_cast<A>(r.teacher.scale(block))), V(shift(r, block))};
    const A* const e_y = r.student.exps + block.begin;
    const A* const e_z = r.teacher.exps + block.begin;
    const A* const apart = r.apart + block.begin;
    const V beta(static_cast<A>(args.beta));
    V value(0), mean(0), values[2], means[2];
    const auto at = [&](int64_t j, auto count, int i) {
      const ClassPair<V> c = pair_of<Kind>(load<V>(apart + j, count), load<V>(e_y + j, count),
                                           load<V>(e_z + j, count), softmax);
      const ClassPart<V> part = Kind::part(c, beta);
      values[i] = values[i] + keep(part.value, count, 0);
      if (Kind::kScored) means[i] = means[i] + keep(c.q * part.score, count, 0);
      return part.score;
    };
    // Runs, as in add_up().
    for (int64_t begin = 0, head = out.head; begin < block.length();) {
      const int64_t end = std::min(head + 16 * V::kLanes, block.length());
      for (int i = 0; i < 2; ++i) values[i] = means[i] = V(0);
      for_each_two(
          begin, head, end, [&](int64_t j, auto count) { out.put(j, count, at(j, count, 0)); },
          [&](int64_t j) {
            const V first = at(j, Full{}, 0);
            out.put(j, first, at(j + V::kLanes, Full{}, 1));
          });
      value = value + (values[0] + values[1]), mean = mean + (means[0] + means[1]);
      begin = head = end;
    }
    sums[0] += lane_sum(value);
    sums[1] += lane_sum(mean);
  }

  template <class Out>
  void write_block(const Pair& r, const Block& block, A mean, const Out& out) const {
    const A* const e_y = r.student.exps + block.begin;
    const A* const scores = r.apart + block.begin;
    const V shift(mean);
    const auto at = [&](int64_t j, auto count) {
      return load<V>(e_y + j, count) * (load<V>(scores + j, count) - shift);
    };
    for_each_two(
        0, out.head, block.length(),
        [&](int64_t j, auto count) { out.put(j, count, at(j, count)); },
        [&](int64_t j) { out.put(j, at(j, Full{}), at(j + V::kLanes, Full{})); });
  }

  // Where a block's numbers go, one or two vectors of them: to the scores,
  struct Scores {
    A* to;
    static constexpr int64_t head = 0;

    template <class Count>
    ML_FN void put(int64_t j, Count count, V score) const {
      store(score, to + j, count);
    }
    ML_FN void put(int64_t j, V a, V b) const { put(j, Full{}, a), put(j + V::kLanes, Full{}, b); }
  };

  // or to the gradient of the logits, around the caches where that is asked for.
  template <class Kind, class T>
  struct Gradient {
    const T* const x;
    T* const dx;
    const V cap;
    V scale;
    bool capped, together, stream;
    int64_t head = 0;  // of two vectors, the first that can be written together

    Gradient(const PairKernel& kernel, const Pair& r, const Block& block)
        : x(static_cast<const T*>(r.student.x) + block.begin),
          dx(kernel.template dlogits_of<T>(r.row) + block.begin),
          cap(r.student.cap),
          capped(r.student.cap != 0) {
      constexpr bool kInOrder = std::is_same_v<T, A>;
      double all =
          Kind::factor(kernel.args.beta) * kernel.upstream(r.token) / r.student.temperature;
      if constexpr (Kind::kScored) all *= r.student.scale(block);
      scale = V(static_cast<A>(all));
      together = kInOrder || kernel.in_pairs;
      const int64_t to_line = elements_to_line(dx);
      stream = kernel.args.stream && together && !capped && (kInOrder || to_line == 0);
      if (stream) head = std::min(to_line, block.length());
    }

    template <class Count>
    ML_FN void put(int64_t j, Count count, V d) const {
      d = d * scale;
      if (capped) d = d * softcap_slope(load<V>(x + j, count), cap);
      store(d, dx + j, count);
    }
    ML_FN void put(int64_t j, V a, V b) const {
      if (stream) return V::stream2(dx + j, a * scale, b * scale);
      put_in_cache(j, a, b);
    }
    void put_in_cache(int64_t j, V a, V b) const {
      if (!together) return put(j, Full{}, a), put(j + V::kLanes, Full{}, b);
      a = a * scale, b = b * scale;
      if (capped) {
        V of_a, of_b;
        V::load2(x + j, of_a, of_b);
        a = a * softcap_slope(of_a, cap), b = b * softcap_slope(of_b, cap);
      }
      V::store2(dx + j, a, b);
    }
  };

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
