// SPDX-License-Identifier: BSD-3-Clause
// A divergence of pairs of rows, and its gradient, without ever holding a row of probabilities.
//
// A block works on one pair. A first look, for both log-sum-exps, reads it from memory; a second
// one takes the value, and the gradient too if it is forward KL's, which waits for nothing more;
// the others' takes a third look. These find what the first one has kept in shared memory, and
// beyond that what L2 still has: the second look begins with what was read last. How a row is split
// among its threads depends on nothing but its length and type, so that a token's result has the
// same bits in every batch, however its rows are aligned.
// Included inside a file's own namespace, after pair_look.inl.cuh and pair_stats.inl.cuh.

template <class Kind, class T, class U>
struct PairKernel : PairLook<T, U> {
  using Look = PairLook<T, U>;
  using Look::args, Look::kept, Look::chunks, Look::count_of, Look::column;
  using Look::for_each_again, Look::keep_scores, Look::kept_scores, Look::load_again, Look::store;
  using Look::kCapped, Look::kScoreWords, Look::N, Look::pair_at, Look::rank, Look::threads;
  using Look::look, Look::save, Look::saved, Look::softmax_of;
  using typename Look::A;
  using typename Look::Chunk;
  using typename Look::Field;
  using typename Look::Pair;
  using typename Look::Student;
  using typename Look::Teacher;
  using Softmax = PairSoftmax<A>;
  using Values = std::conditional_t<Kind::kMixed, ValueSums, ValueSum>;
  static constexpr bool kForward = std::is_same_v<Kind, ForwardKl>;
  // A mixture's scores are dear: they are kept where their chunk of the teacher was.
  static constexpr bool kKeepsScores = Kind::kMixed;
  static constexpr int kBehindStudent =
      kKeepsScores && kScoreWords > Teacher::kWords ? kScoreWords : Teacher::kWords;

  const A beta = static_cast<A>(args.beta);

  // kGradient: forward KL's is written in passing; a mixture's scores are kept for it.
  template <bool kGradient>
  ML_FN Values value(const Pair& r, const PairSums<A>& sums) const {
    const Softmax softmax = softmax_of(r, sums);
    const A all = kGradient && kForward ? upstream(r) : A(0);
    return !kCapped && softmax.simple ? value_of<kGradient, true>(r, softmax, all)
                                      : value_of<kGradient, false>(r, softmax, all);
  }
  template <bool kGradient, bool kSimple>
  ML_FN Values value_of(const Pair& r, const Softmax& softmax, A all) const {
    if constexpr (Kind::kMixed) {
      return value_of_mixture<kGradient, kSimple>(r, softmax);
    } else {
      return value_of_kl<(kGradient && kForward), kSimple>(r, softmax, all);
    }
  }
  template <bool kGradient, bool kSimple>
  ML_FN Values value_of_kl(const Pair& r, const Softmax& softmax, A all) const {
    const A unit = kForward ? softmax.p : softmax.q;
    const A other_unit = ratio(kForward ? softmax.q : softmax.p, unit);
    [[maybe_unused]] const A up = all * softmax.p, up_of_q = all * softmax.q;
    A value(0), worst(0);
    this->template for_each_backwards<kGradient>(r, [&](int k, auto count, const Chunk& chunk) {
      A y[N], z[N], l[N], of_chunk(0);
      this->template classes<kSimple>(r, softmax, count, chunk, y, z, l);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const KlClass<A> c(kForward ? l[i] : -l[i]);
        of_chunk += kForward ? c.value(z[i], y[i], other_unit) : c.value(y[i], z[i], other_unit);
        if constexpr (kGradient) {
          worst = max(worst, c.log_ratio);
          y[i] = c.above(z[i], y[i], up, up_of_q);
        }
      }
      value += of_chunk;
      if constexpr (kGradient) write(r, k, count, chunk, y);
    });
    // Not NaN where b excludes a class of which a is too small to be more than 0.
    if (value != value) {
      if (!kGradient) worst = largest_log_ratio(r, softmax);
      if (worst > -Limits<A>::lowest()) value = worst;
    }
    return {double(value) * unit};
  }
  ML_FN A largest_log_ratio(const Pair& r, const Softmax& softmax) const {
    A largest(0);
#pragma unroll 1
    for (int k = rank(); k < chunks; k += threads()) {
      A y[N], z[N], l[N];
      this->template classes<false>(r, softmax, count_of(k), load_again(r, k), y, z, l);
#pragma unroll
      for (A each : l) largest = max(largest, kForward ? each : -each);
    }
    return largest;
  }
  template <bool kKeeps, bool kSimple>
  ML_FN Values value_of_mixture(const Pair& r, const Softmax& softmax) const {
    const SoftmaxPair<A> of{softmax.q, softmax.p, A(0)};
    A value(0), mean(0);
    this->template for_each_backwards<false>(r, [&](int k, auto count, const Chunk& chunk) {
      A y[N], z[N], l[N], of_chunk(0), mean_of_chunk(0);
      this->template classes<kSimple>(r, softmax, count, chunk, y, z, l);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const ClassPair<A> c = pair_of<Kind>(l[i], y[i], z[i], of);
        const ClassPart<A> part = Kind::part(c, beta);
        of_chunk += part.value;
        mean_of_chunk += c.q * part.score;
        y[i] = part.score;
      }
      value += of_chunk;
      mean += mean_of_chunk;
      if constexpr (kKeeps) keep_scores(k, y);
    });
    // A teacher's NaN reaches the scores, which are bounded, through the sum alone.
    return {value, mean + 0 * softmax.shift};
  }

  ML_FN void gradient(const Pair& r, A mean) const {
    const Softmax softmax = softmax_of(r, saved(r.token));
    const A up = upstream(r) * softmax.q;
    if (!kCapped && softmax.simple) return gradient_of<true>(r, softmax, mean, up);
    gradient_of<false>(r, softmax, mean, up);
  }
  template <bool kSimple>
  ML_FN void gradient_of(const Pair& r, const Softmax& softmax, A mean, A up) const {
    [[maybe_unused]] const SoftmaxPair<A> of{softmax.q, softmax.p, A(0)};
    for_each_again(r, [&](int k, auto count, const Chunk& chunk) {
      A y[N], d[N], l[N];
      this->template classes<kSimple>(r, softmax, count, chunk, y, d, l);
      if (kKeepsScores && args.forward && k < kept) {
        kept_scores(k, d);
#pragma unroll
        for (int i = 0; i < N; ++i) d[i] = (y[i] * up) * (d[i] - mean);
      } else {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          if constexpr (!Kind::kMixed) {
            d[i] = (y[i] * up) * (bounded_below(-l[i]) - mean);
          } else {
            const ClassPair<A> c = pair_of<Kind>(l[i], y[i], d[i], of);
            d[i] = (y[i] * up) * (Kind::part(c, beta).score - mean);
          }
        }
      }
      write(r, k, count, chunk, d);
    });
  }

  // The gradient of chunk k: d, and the slope of a softcap. Overwrites d.
  template <class Count>
  ML_FN void write(const Pair& r, int k, Count count, const Chunk& chunk, A (&d)[N]) const {
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

  ML_FN void save_masked(int64_t token) const {
    if (rank() != 0) return;
    for (int64_t f = Field::kValue; f < Field::kSaved; ++f) column(f, token) = A(0);
  }
  ML_FN void write_masked(const Pair& r) const {
    const A zeros[N] = {};
    for (int k = rank(); k < chunks; k += threads()) store(r, k, count_of(k), zeros);
  }

  // What all of the gradient is multiplied by.
  ML_FN A upstream(const Pair& r) const {
    const A* const dloss = static_cast<const A*>(args.dloss);
    const double scale =
        group_at(args.groups, group_of(args.groups, r.token))[GroupField::kScaleLoss];
    const A g = dloss ? dloss[args.dloss_per_token ? r.token : 0] : A(1);
    const double all = double(g) * column(Field::kWeight, r.token) * scale;
    return static_cast<A>(r.student.cooling().wide(all * Kind::factor(args.beta)));
  }

  // What is known of the row is found again before each look, rather than kept in registers.
  ML_FN void run(int64_t row) const {
    const Pair r = pair_at(row);
    if (column(Field::kWeight, r.token) == A(0)) {
      if (args.forward) save_masked(r.token);
      if (args.dlogits) write_masked(r);
      return;
    }
    A mean(0);
    if (kForward || args.forward) {
      const PairSums<A> sums = args.forward ? look(r) : saved(r.token);
      if (args.forward) save(r.token, sums);
      const Pair again = pair_at(opaque(row));
      const Values own =
          !kCapped || args.dlogits ? value<true>(again, sums) : value<false>(again, sums);
      if (args.forward) mean = save(again.token, own);
    } else {
      mean = column(Field::kMeanScore, r.token);
    }
    if (!kForward && args.dlogits) gradient(pair_at(opaque(row)), mean);
  }

  // Nothing but the value.
  ML_FN void run_value(int64_t row) const {
    const Pair r = pair_at(row);
    if (column(Field::kWeight, r.token) == A(0)) return save_masked(r.token);
    const PairSums<A> sums = look(r);
    save(r.token, sums);
    save(r.token, value<false>(r, sums));
  }

  // Returns the mean score.
  ML_FN A save(int64_t token, const Values& own) const {
    const Values values = merge_team<kMaxThreads / kWarp>(own);
    const A mean = static_cast<A>(values.mean());
    if (rank() == 0) {
      column(Field::kValue, token) = static_cast<A>(values.value);
      column(Field::kMeanScore, token) = mean;
    }
    return mean;
  }
};

template <class Kind, class T, class U>
__global__ void __launch_bounds__(kMaxThreads)
    divergence_kernel(const DivergenceArgs args, const int kept) {
  using A = typename Accumulation<T>::Type;
  if (args.unless_one && *static_cast<const A*>(args.dloss) == A(1)) return;
  const PairKernel<Kind, T, U> pairs{{{args, kept}}};
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) pairs.run(row);
}

// A value alone: nothing of a gradient takes registers.
template <class Kind, class T, class U>
__global__ void __launch_bounds__(kMaxThreads)
    divergence_value_kernel(const DivergenceArgs args, const int kept) {
  const PairKernel<Kind, T, U> pairs{{{args, kept}}};
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) pairs.run_value(row);
}

// words: of 16 bytes in shared memory, for a chunk that is kept.
template <class Kernel, int kWords>
void launch_rows(void (*kernel)(DivergenceArgs, int), const DivergenceArgs& args,
                 const PairPlan& plan, Stream stream) {
  constexpr int64_t kBytes = 16 * kWords;
  const int64_t chunks = (args.cols + Kernel::N - 1) / Kernel::N;
  // Whole warps of them, or all.
  const int64_t kept = std::min(plan.shared / kBytes / kWarp * kWarp, chunks);
  int64_t blocks = args.rows;
  if (args.unless_one) blocks = std::min(blocks, plan.blocks);  // there is hardly ever work
  launch(kernel, blocks, plan.threads, kept * kBytes, stream, args, static_cast<int>(kept));
}
template <class Kind, class T, class U>
void launch_kernel(const DivergenceArgs& args, const PairPlan& plan, Stream stream) {
  using Kernel = PairKernel<Kind, T, U>;
  constexpr int kOfRows = Kernel::Student::kWords + Kernel::Teacher::kWords;
  if (args.stats) launch_rows<Kernel, kOfRows>(divergence_stats_kernel<T, U>, args, plan, stream);
  if constexpr (!Kernel::kCapped) {
    if (args.forward && !args.dlogits) {
      return launch_rows<Kernel, kOfRows>(divergence_value_kernel<Kind, T, U>, args, plan, stream);
    }
  }
  constexpr int kWords = Kernel::Student::kWords + Kernel::kBehindStudent;
  launch_rows<Kernel, kWords>(divergence_kernel<Kind, T, U>, args, plan, stream);
}

// For each kind and student: of its own type without softcaps, and of whatever else.
template <class Kind, class T>
void launch_kind(const DivergenceArgs& args, const PairPlan& plan, Stream stream) {
  if constexpr (std::is_same_v<T, double>) {
    return launch_kernel<Kind, T, T>(args, plan, stream);
  } else {
    const bool capped = args.student.softcap != 0 || args.teacher.softcap != 0;
    if (args.student.dtype == args.teacher.dtype && !capped) {
      return launch_kernel<Kind, T, T>(args, plan, stream);
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
