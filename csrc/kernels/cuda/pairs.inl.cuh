// SPDX-License-Identifier: BSD-3-Clause
// A divergence of pairs of rows, and its gradient, without ever holding a row of probabilities.
//
// A block works on one pair. A first look, for both log-sum-exps, reads it from memory; a second
// one takes the value, and the gradient too if it is forward KL's, which waits for nothing more;
// the others' takes a third look. These find what the first one has kept in shared memory, and
// beyond that what L2 still has: the second look begins with what was read last. How a row is split
// among its threads depends on nothing but its length and type, so that a token's result has the
// same bits in every batch, however its rows are aligned.
// Included inside a file's own namespace, after pair_rows.inl.cuh and pair_softmax.inl.cuh.

constexpr int kMaxThreads = 1024;

template <class Kind, class T, class U>
struct PairKernel : PairRows<T, U> {
  using Rows = PairRows<T, U>;
  using Rows::args, Rows::kept, Rows::whole, Rows::chunks, Rows::count_of, Rows::column;
  using Rows::for_each_again, Rows::for_each_backwards, Rows::kept_scores, Rows::store;
  using Rows::kCapped, Rows::kScoreWords, Rows::N, Rows::pair_at, Rows::rank, Rows::threads;
  using Rows::keep, Rows::keep_scores, Rows::load, Rows::load_again, Rows::load_whole;
  using typename Rows::A;
  using typename Rows::Chunk;
  using typename Rows::Field;
  using typename Rows::Pair;
  using typename Rows::Student;
  using typename Rows::Teacher;
  using typename Rows::Whole;
  using Softmax = PairSoftmax<A>;
  // A mixture's scores are dear: they are kept where their chunk of the teacher was.
  static constexpr bool kKeepsScores = Kind::kMixed;
  static constexpr int kBehindStudent =
      kKeepsScores && kScoreWords > Teacher::kWords ? kScoreWords : Teacher::kWords;
  static constexpr int kKeptBytes = 16 * (Student::kWords + kBehindStudent);  // of a chunk

  const A beta = static_cast<A>(args.beta);

  // Looks

  template <class Sums, class Count>
  ML_FN static void push(const Pair& r, const Chunk& chunk, Count count, Sums* student,
                         Sums* teacher) {
    A y[N];
    r.student.logits(chunk.student, count, y);
    student->push(y);
    r.teacher.logits(chunk.teacher, count, y);
    teacher->push(y);
  }

  ML_FN PairSums<A> look(const Pair& r) const {
    ThreadSum<A> student, teacher;
    int k = rank();
    for (; k + threads() < whole; k += 2 * threads()) {
      const int ahead = k + threads();
      const Chunk a = r.aligned ? load_whole(r, k) : load(r, k);
      const Chunk b = r.aligned ? load_whole(r, ahead) : load(r, ahead);
      keep(k, a);
      keep(ahead, b);
      push(r, a, Whole{}, &student, &teacher);
      push(r, b, Whole{}, &student, &teacher);
    }
    for (; k < chunks; k += threads()) {
      const Chunk chunk = load(r, k);
      keep(k, chunk);
      push(r, chunk, count_of(k), &student, &teacher);
    }
    PairSums<A> sums(student.logsumexp(), teacher.logsumexp());
    if (!student.fits() || !teacher.fits()) sums = look_exactly(r);
    return merge_team<kMaxThreads / kWarp>(sums, AlignPair{});
  }
  // What no ThreadSum holds.
  ML_FN PairSums<A> look_exactly(const Pair& r) const {
    LogSumExp<A> student, teacher;
#pragma unroll 1
    for (int k = rank(); k < chunks; k += threads()) {
      push(r, load_again(r, k), count_of(k), &student, &teacher);
    }
    return {student, teacher};
  }

  // kGradient: the gradient is written in passing.
  template <bool kGradient>
  ML_FN ValueSums value(const Pair& r, const Softmax& softmax) const {
    const A all = kGradient ? upstream(r) : A(0);
    A value(0), mean(0);
    for_each_backwards(r, [&](int k, auto count, const Chunk& chunk) {
      A y[N], z[N], apart[N], of_chunk(0);
      [[maybe_unused]] A mean_of_chunk(0);
      r.student.logits(chunk.student, count, y);
      r.teacher.logits(chunk.teacher, count, z);
      softmax.exponentials(y, z, apart);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const ClassPair<A> c = pair_of<Kind>(apart[i], y[i], z[i], softmax.of);
        const ClassPart<A> part = Kind::part(c, beta);
        of_chunk += part.value;
        if constexpr (Kind::kScored) mean_of_chunk += c.q * part.score;
        y[i] = part.score;
      }
      value += of_chunk;
      if constexpr (Kind::kScored) mean += mean_of_chunk;
      if constexpr (kKeepsScores) keep_scores(k, y);
      if constexpr (kGradient) write(r, k, count, chunk, all, y);
    });
    return merge_team<kMaxThreads / kWarp>(ValueSums{value, mean});
  }

  ML_FN void stats(const Pair& r, const Softmax& softmax, const PairSums<A>& sums) const {
    StatSums<A> all;
    for_each_again(r, [&](int k, auto count, const Chunk& chunk) {
      A y[N], z[N];
      r.student.logits(chunk.student, count, y);
      r.teacher.logits(chunk.teacher, count, z);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const int64_t j = int64_t{k} * N + i;
        all.entropy -= softmax.q(y[i]) * bounded_below(y[i] - softmax.student.top);
        all.teacher_entropy -= softmax.p(z[i]) * bounded_below(z[i] - softmax.teacher.top);
        if (j < args.cols) {
          all.largest.add({y[i], j});
          all.teacher_largest.add({z[i], j});
        }
      }
    });
    all = merge_team<kMaxThreads / kWarp>(all);
    if (rank() != 0) return;
    column(Field::kEntropy, r.token) = static_cast<A>(log(sums.sum) + all.entropy);
    column(Field::kTeacherEntropy, r.token) =
        static_cast<A>(log(sums.teacher_sum) + all.teacher_entropy);
    column(Field::kAgreement, r.token) = all.largest.index == all.teacher_largest.index;
  }

  ML_FN void gradient(const Pair& r, const Softmax& softmax, A mean) const {
    const A all = upstream(r);
    for_each_again(r, [&](int k, auto count, const Chunk& chunk) {
      A y[N], d[N], apart[N];
      r.student.logits(chunk.student, count, y);
      if (kKeepsScores && args.forward && k < kept) {
        kept_scores(k, d);
#pragma unroll
        for (int i = 0; i < N; ++i) d[i] = softmax.q(y[i]) * (d[i] - mean);
      } else {
        r.teacher.logits(chunk.teacher, count, d);
        softmax.exponentials(y, d, apart);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const ClassPair<A> c = pair_of<Kind>(apart[i], y[i], d[i], softmax.of);
          d[i] = Kind::part(c, beta).score;
          if constexpr (Kind::kScored) d[i] = c.q * (d[i] - mean);
        }
      }
      write(r, k, count, chunk, all, d);
    });
  }

  // The gradient of chunk k: d, all, and the slope of a softcap. Overwrites d.
  template <class Count>
  ML_FN void write(const Pair& r, int k, Count count, const Chunk& chunk, A all, A (&d)[N]) const {
#pragma unroll
    for (A& each : d) each *= all;
    if (kCapped && r.student.cap != A(0)) {
      A x[N];
      Student::raw(chunk.student, x);
      Student::one_by_one(x, [&](A each) { return softcap_slope(each, r.student.cap); });
#pragma unroll
      for (int i = 0; i < N; ++i) d[i] *= x[i];
    }
    store(r, k, count, d);
  }

  // A pair

  ML_FN void masked(const Pair& r) const {
    if (args.forward && rank() == 0) {
      const int64_t fields = args.stats ? Field::kCount : Field::kSaved;
      for (int64_t f = Field::kValue; f < fields; ++f) column(f, r.token) = A(0);
    }
    if (!r.dx) return;
    const A zeros[N] = {};
    for (int k = rank(); k < chunks; k += threads()) store(r, k, count_of(k), zeros);
  }

  // What all of the gradient is multiplied by.
  ML_FN A upstream(const Pair& r) const {
    const A* const dloss = static_cast<const A*>(args.dloss);
    const double scale =
        group_at(args.groups, group_of(args.groups, r.token))[GroupField::kScaleLoss];
    const A g = dloss ? dloss[args.dloss_per_token ? r.token : 0] : A(1);
    const double factor = Kind::factor(args.beta);
    return static_cast<A>(double(g) * column(Field::kWeight, r.token) * scale * factor /
                          r.student.temperature);
  }

  ML_FN void run(int64_t row) const {
    const Pair r = pair_at(row);
    if (column(Field::kWeight, r.token) == A(0)) return masked(r);
    if (args.forward) return forward(row, look(r));
    const LogSumExp<A> student(column(Field::kTop, r.token), column(Field::kSum, r.token));
    const LogSumExp<A> teacher(column(Field::kTeacherTop, r.token),
                               column(Field::kTeacherSum, r.token));
    gradient(r, Softmax({student, teacher}), column(Field::kMeanScore, r.token));
  }

  // What is known of the row is found again before each look, rather than kept in registers.
  ML_FN void forward(int64_t row, const PairSums<A>& sums) const {
    const Softmax softmax(sums);
    if (args.stats) stats(pair_at(opaque(row)), softmax, sums);  // dx may be the student
    const Pair r = pair_at(opaque(row));
    const bool together = !Kind::kScored && r.dx;
    const ValueSums values =
        together ? value<!Kind::kScored>(r, softmax) : value<false>(r, softmax);
    // A teacher's NaN reaches the scores, which are bounded, through the sum alone.
    const double nan_or_zero = 0 * softmax.of.shift;
    const A mean = static_cast<A>(values.mean + nan_or_zero);
    const Pair again = pair_at(opaque(row));
    if (rank() == 0) {
      column(Field::kValue, again.token) = static_cast<A>(values.value);
      column(Field::kMeanScore, again.token) = mean;
      column(Field::kTop, again.token) = sums.top;
      column(Field::kSum, again.token) = static_cast<A>(sums.sum);
      column(Field::kTeacherTop, again.token) = sums.teacher_top;
      column(Field::kTeacherSum, again.token) = static_cast<A>(sums.teacher_sum);
    }
    if (Kind::kScored && again.dx) gradient(again, softmax, mean);
  }
};

template <class Kind, class T, class U>
__global__ void __launch_bounds__(kMaxThreads)
    divergence_kernel(const DivergenceArgs args, const int kept) {
  using A = typename Accumulation<T>::Type;
  if (args.unless_one && *static_cast<const A*>(args.dloss) == A(1)) return;
  const PairKernel<Kind, T, U> pairs{{args, kept}};
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) pairs.run(row);
}

template <class Kind, class T, class U>
void launch_kernel(const DivergenceArgs& args, const PairPlan& plan, Stream stream) {
  using Kernel = PairKernel<Kind, T, U>;
  const int64_t chunks = (args.cols + Kernel::N - 1) / Kernel::N;
  // Whole warps of them, or all.
  const int64_t kept = std::min(plan.shared / Kernel::kKeptBytes / kWarp * kWarp, chunks);
  int64_t blocks = args.rows;
  if (args.unless_one) blocks = std::min(blocks, plan.blocks);  // there is hardly ever work
  launch(divergence_kernel<Kind, T, U>, blocks, plan.threads, kept * Kernel::kKeptBytes, stream,
         args, static_cast<int>(kept));
}

// Two kernels for each kind and student: of its own type without softcaps, and of whatever else. Of
// float16, which is hardly distilled any more, the second alone: a kernel takes seconds to compile.
template <class Kind, class T>
void launch_kind(const DivergenceArgs& args, const PairPlan& plan, Stream stream) {
  if constexpr (std::is_same_v<T, double>) {
    return launch_kernel<Kind, T, T>(args, plan, stream);
  } else {
    const bool capped = args.student.softcap != 0 || args.teacher.softcap != 0;
    if constexpr (!std::is_same_v<T, Float16>) {
      if (args.student.dtype == args.teacher.dtype && !capped) {
        return launch_kernel<Kind, T, T>(args, plan, stream);
      }
    }
    launch_kernel<Kind, T, AnyType>(args, plan, stream);
  }
}

template <class T>
void launch_pairs(const DivergenceArgs& args, const PairPlan& plan, Stream stream) {
  switch (args.kind) {
    case Divergence::kForwardKl:
      return launch_kind<ForwardKl, T>(args, plan, stream);
    case Divergence::kReverseKl:
      return launch_kind<ReverseKl, T>(args, plan, stream);
    case Divergence::kJsd:
      return launch_kind<JensenShannon, T>(args, plan, stream);
    case Divergence::kSkewForwardKl:
      return launch_kind<SkewForwardKl, T>(args, plan, stream);
    case Divergence::kSkewReverseKl:
      return launch_kind<SkewReverseKl, T>(args, plan, stream);
  }
}
