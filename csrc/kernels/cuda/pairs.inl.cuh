// SPDX-License-Identifier: BSD-3-Clause
// A divergence of pairs of rows, and its gradient, without ever holding a row of probabilities.
//
// A block works on one pair. A first look, for both log-sum-exps, reads it from memory; a second
// one takes the value, and the gradient too if it is forward KL's, which waits for nothing more;
// the others' takes a third look. These find what the first one has kept in shared memory, and
// beyond that what L2 still has: the second look begins with what was read last. How a row is split
// among its threads depends on nothing but its length and type, so that a token's result has the
// same bits in every batch, however its rows are aligned. Included inside a file's own namespace,
// after side.inl.cuh.

ML_FN double if_less(double a, double b, double yes, double no) { return a < b ? yes : no; }
ML_FN double expm1_less(double x) { return ::expm1(x) - x; }
ML_FN float min(float a, float b) { return ::fminf(a, b); }
ML_FN double min(double a, double b) { return ::fmin(a, b); }
// To one rounding, without the cases of a division that are none here.
ML_FN float quotient(float a, float b) {
  const float inverse = reciprocal(b), q = a * inverse;
  return fma(fma(-q, b, a), inverse, q);
}
ML_FN float log_quotient(float, float larger, float less) {
  return ::log1pf(-quotient(less, ::fmaxf(larger, kTiny)));
}
ML_FN double log_quotient(double, double larger, double less) {
  return ::log1p(-less / ::fmax(larger, double{kTiny}));
}

#include "kernels/divergence.inl.h"

// What threads add up

// Both log-sum-exps. What threads have summed up is merged in double: a sum of which one class is
// almost all would show every rounding in the gradient of that class.
template <class A>
struct PairSums {
  A top = Limits<A>::lowest(), teacher_top = Limits<A>::lowest();
  double sum = 0, teacher_sum = 0;

  ML_FN PairSums() {}
  ML_FN PairSums(const LogSumExp<A>& student, const LogSumExp<A>& teacher)
      : top(student.top), teacher_top(teacher.top), sum(student.sum), teacher_sum(teacher.sum) {}
  // Of the same tops.
  ML_FN void add(const PairSums& other) { sum += other.sum, teacher_sum += other.teacher_sum; }
};

// Lanes agree on the largest tops first: each is rescaled, and rounded, once.
struct AlignPair {
  template <int kLanes, class A>
  ML_FN void lanes(PairSums<A>* sums) const {
    A top = sums->top, teacher_top = sums->teacher_top;
#pragma unroll
    for (int mask = kLanes / 2; mask > 0; mask /= 2) {
      top = max(top, from_lane_xor(top, mask));
      teacher_top = max(teacher_top, from_lane_xor(teacher_top, mask));
    }
    sums->sum *= exp(sums->top - top);
    sums->teacher_sum *= exp(sums->teacher_top - teacher_top);
    sums->top = top, sums->teacher_top = teacher_top;
  }
};

struct ValueSums {
  double value = 0, mean = 0;
  ML_FN void add(const ValueSums& other) { value += other.value, mean += other.mean; }
};

// The first of the largest numbers; a NaN is larger than any.
template <class A>
struct Largest {
  A value = -Limits<A>::infinity();
  int64_t index = INT64_MAX;
  ML_FN void add(const Largest& other) {
    const bool nan = value != value, other_nan = other.value != other.value;
    const bool equal = nan == other_nan && (nan || value == other.value);
    const bool wins = equal ? other.index < index : !nan && (other_nan || other.value > value);
    if (wins) *this = other;
  }
};
template <class A>
struct StatSums {
  double entropy = 0, teacher_entropy = 0;
  Largest<A> largest, teacher_largest;
  ML_FN void add(const StatSums& other) {
    entropy += other.entropy, teacher_entropy += other.teacher_entropy;
    largest.add(other.largest);
    teacher_largest.add(other.teacher_largest);
  }
};

constexpr int kMaxThreads = 1024;

template <class Kind, class T, class U, bool kCapped>
struct PairKernel {
  using A = typename Accumulation<T>::Type;
  using Field = DivergenceField;
  // Classes of a chunk, which is always the same thread's. Aligned ones are moved 16 bytes at a
  // time.
  static constexpr int N = std::is_same_v<U, AnyType> ? 8 : kPerWord16<T>;
  using Student = Side<T, A, N, kCapped>;
  using Teacher = Side<U, A, N, kCapped>;
  // A mixture's scores are dear: they are kept where their chunk of the teacher was.
  static constexpr bool kKeepsScores = Kind::kMixed;
  static constexpr int kScoreWords = N * static_cast<int>(sizeof(A)) / 16;
  static constexpr int kBehindStudent =
      kKeepsScores && kScoreWords > Teacher::kWords ? kScoreWords : Teacher::kWords;
  static constexpr int kKeptBytes = 16 * (Student::kWords + kBehindStudent);  // of a chunk

  struct Chunk {
    typename Student::Chunk student;
    typename Teacher::Chunk teacher;
  };

  struct Pair {
    int64_t token;
    Student student;
    Teacher teacher;
    T* dx;
    bool aligned;
    bool in_place;  // then only a chunk's own thread reads its bytes, which it overwrites
  };

  // Of a pair, from both log-sum-exps.
  struct Softmax {
    Exponential<A> student, teacher;
    bool from_tops;  // differences of logits are counted from the largest ones
    SoftmaxPair<A> of;

    // Of sums as the table holds them, since another pass begins with these.
    ML_FN explicit Softmax(const PairSums<A>& sums) : student(sums.top), teacher(sums.teacher_top) {
      Origins<A> from = origins_of(student.top, teacher.top);
      from_tops = from.student != A(0) || from.teacher != A(0);
      if (!student.fits() || !teacher.fits()) {
        from_tops = true;
        from = {student.top, teacher.top};
      }
      const A sum = static_cast<A>(sums.sum), teacher_sum = static_cast<A>(sums.teacher_sum);
      const double tops = double(student.top - from.student) - double(teacher.top - from.teacher);
      of.shift = static_cast<A>(log(double(sum) / double(teacher_sum)) + tops);
      of.q = (from_tops ? A(1) : student.unit()) / sum;
      of.p = (from_tops ? A(1) : teacher.unit()) / teacher_sum;
    }
    // From the logits of a chunk to their differences and exponentials, in their place.
    ML_FN void exponentials(A (&y)[N], A (&z)[N], A (&apart)[N]) const {
      if (from_tops) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          y[i] = y[i] - student.top, z[i] = z[i] - teacher.top;
          apart[i] = z[i] - y[i];
          y[i] = exp(y[i]), z[i] = exp(z[i]);
        }
      } else {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          apart[i] = z[i] - y[i];
          y[i] = student(y[i]), z[i] = teacher(z[i]);
        }
      }
    }
    // The student's probability alone.
    ML_FN A q(A y) const { return (from_tops ? exp(y - student.top) : student(y)) * of.q; }
    ML_FN A p(A z) const { return (from_tops ? exp(z - teacher.top) : teacher(z)) * of.p; }
  };

  const DivergenceArgs& args;
  const int kept;  // the first chunks of a pair, in shared memory
  const A beta = static_cast<A>(args.beta);
  const int whole = static_cast<int>(args.cols / N), rest = static_cast<int>(args.cols % N);
  const int chunks = whole + (rest != 0);

  ML_FN static int rank() { return static_cast<int>(threadIdx.x); }
  ML_FN static int threads() { return static_cast<int>(blockDim.x); }

  ML_FN A& column(int64_t which, int64_t token) const {
    return static_cast<A*>(args.table)[which * args.rows + token];
  }

  // Chunks

  ML_FN int count_of(int k) const { return k < whole ? N : rest; }
  struct Whole {  // such a count, of an aligned row
    ML_FN operator int() const { return N; }
  };
  template <class Count>
  static constexpr bool is_whole = std::is_same_v<Count, Whole>;

  ML_FN static Chunk load_whole(const Pair& r, int k) {
    return {r.student.template whole<false>(k), r.teacher.template whole<false>(k)};
  }
  ML_FN Chunk load(const Pair& r, int k) const {
    if (r.aligned && k < whole) return load_whole(r, k);
    // Words that reach beyond the chunk lie within the row.
    if (!r.in_place && 0 < k && k < whole - 1) {
      return {r.student.template whole<true>(k), r.teacher.template whole<true>(k)};
    }
    const int count = count_of(k);
    return {r.student.part(k, count), r.teacher.part(k, count)};
  }

  // Word w of what is kept of chunk k.
  ML_FN uint4& kept_word(int w, int k) const { return shared_memory[w * kept + k]; }

  ML_FN void keep(int k, const Chunk& chunk) const {
    if (k >= kept) return;
#pragma unroll
    for (int w = 0; w < Student::kWords; ++w) kept_word(w, k) = chunk.student.words[w];
#pragma unroll
    for (int w = 0; w < Teacher::kWords; ++w) {
      kept_word(Student::kWords + w, k) = chunk.teacher.words[w];
    }
  }
  ML_FN Chunk load_again(const Pair& r, int k) const {
    return k < kept ? kept_chunk(k) : load(r, k);
  }
  ML_FN Chunk kept_chunk(int k) const {
    Chunk chunk;
#pragma unroll
    for (int w = 0; w < Student::kWords; ++w) chunk.student.words[w] = kept_word(w, k);
#pragma unroll
    for (int w = 0; w < Teacher::kWords; ++w) {
      chunk.teacher.words[w] = kept_word(Student::kWords + w, k);
    }
    return chunk;
  }

  ML_FN void keep_scores(int k, const A (&scores)[N]) const {
    if (k >= kept) return;
    uint4 words[kScoreWords];
    memcpy(words, scores, sizeof words);
#pragma unroll
    for (int w = 0; w < kScoreWords; ++w) kept_word(Student::kWords + w, k) = words[w];
  }
  ML_FN void kept_scores(int k, A (&scores)[N]) const {
    uint4 words[kScoreWords];
#pragma unroll
    for (int w = 0; w < kScoreWords; ++w) words[w] = kept_word(Student::kWords + w, k);
    memcpy(scores, words, sizeof words);
  }

  // f(k, count, chunk) for this thread's chunks. Nothing is asked about most of them: a loop of
  // their own has the whole ones of aligned rows.
  template <class F>
  ML_FN void for_each_again(const Pair& r, const F& f) const {
    int k = rank();
    for (; !kCapped && r.aligned && k < whole; k += threads()) {
      f(k, Whole{}, k < kept ? kept_chunk(k) : load_whole(r, k));
    }
    for (; k < chunks; k += threads()) f(k, count_of(k), load_again(r, k));
  }
  template <class F>
  ML_FN void for_each_backwards(const Pair& r, const F& f) const {
    int k = rank() < chunks ? rank() + (chunks - 1 - rank()) / threads() * threads() : -1;
    for (; k >= (!kCapped && r.aligned ? whole : 0); k -= threads()) {
      f(k, count_of(k), load_again(r, k));
    }
    for (; !kCapped && k >= 0; k -= threads()) {
      f(k, Whole{}, k < kept ? kept_chunk(k) : load_whole(r, k));
    }
  }

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

  template <class Count>
  ML_FN void store(const Pair& r, int k, Count count, const A (&d)[N]) const {
    T* const to = r.dx + int64_t{k} * N;
    const int misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(to) % 16);
    const int lane = rank() % kWarp;
    const bool all_lanes = k - lane + kWarp <= whole;  // have a chunk
    int begin = 0, end = count;                        // what is stored class by class
    if (is_whole<Count> || (misaligned == 0 && k < whole)) {
      begin = end;
#pragma unroll
      for (int w = 0; w < Student::kWords; ++w) {
        store_word(reinterpret_cast<uint4*>(to) + w, pack(d + w * kPerWord16<T>, T{}));
      }
    } else if (!r.in_place && all_lanes) {
      // A lane's last word ends in the next lane's chunk.
      uint4 words[Student::kWords + 1];
#pragma unroll
      for (int w = 0; w < Student::kWords; ++w) words[w] = pack(d + w * kPerWord16<T>, T{});
      words[Student::kWords] = from_lane(words[0], (lane + 1) % kWarp);
      const int head = (16 - misaligned) / static_cast<int>(sizeof(T));
#pragma unroll
      for (int w = 0; w < Student::kWords; ++w) {
        if (w == Student::kWords - 1 && lane == kWarp - 1) continue;
        store_word(reinterpret_cast<uint4*>(to + head) + w,
                   between(words[w], words[w + 1], 16 - misaligned));
      }
      if (lane == kWarp - 1) begin = N - kPerWord16<T> + head;
      if (lane == 0) end = head;
      if (0 < lane && lane < kWarp - 1) end = 0;
    }
    if (begin == end) return;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (begin <= i && i < end) narrow(d[i], to + i);
    }
  }
  ML_FN void store_word(uint4* at, const uint4& word) const {
    if (args.stream) {
      __stcs(at, word);
    } else {
      *at = word;
    }
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

  ML_FN Pair pair_at(int64_t row) const {
    const int64_t batch = quotient(row, args.steps), step = row - batch * args.steps;
    const int64_t token = token_of(args, row, step);
    Pair r{token, {args.student, batch, step, token}, {args.teacher, batch, step, token}, nullptr,
           false, args.dlogits == args.student.logits};
    if (args.dlogits) {
      r.dx = static_cast<T*>(args.dlogits) + batch * args.grad_batch_stride +
             step * args.grad_step_stride;
    }
    r.aligned = r.student.is_aligned() && r.teacher.is_aligned() &&
                reinterpret_cast<uintptr_t>(r.dx) % 16 == 0;
    return r;
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

template <class Kind, class T, class U, bool kCapped>
__global__ void __launch_bounds__(kMaxThreads)
    divergence_kernel(const DivergenceArgs args, const int kept) {
  using A = typename Accumulation<T>::Type;
  if (args.unless_one && *static_cast<const A*>(args.dloss) == A(1)) return;
  const PairKernel<Kind, T, U, kCapped> pairs{args, kept};
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) pairs.run(row);
}

template <class Kind, class T, class U, bool kCapped>
void launch_kernel(const DivergenceArgs& args, const PairPlan& plan, Stream stream) {
  using Kernel = PairKernel<Kind, T, U, kCapped>;
  const int64_t chunks = (args.cols + Kernel::N - 1) / Kernel::N;
  // Whole warps of them, or all.
  const int64_t kept = std::min(plan.shared / Kernel::kKeptBytes / kWarp * kWarp, chunks);
  int64_t blocks = args.rows;
  if (args.unless_one) blocks = std::min(blocks, plan.blocks);  // there is hardly ever work
  launch(divergence_kernel<Kind, T, U, kCapped>, blocks, plan.threads, kept * Kernel::kKeptBytes,
         stream, args, static_cast<int>(kept));
}

// Two kernels for each kind and student: of its own type without softcaps, and of whatever else. Of
// float16, which is hardly distilled any more, the second alone: a kernel takes seconds to compile.
template <class Kind, class T>
void launch_kind(const DivergenceArgs& args, const PairPlan& plan, Stream stream) {
  if constexpr (std::is_same_v<T, double>) {
    return launch_kernel<Kind, T, T, true>(args, plan, stream);
  } else {
    const bool capped = args.student.softcap != 0 || args.teacher.softcap != 0;
    if constexpr (!std::is_same_v<T, Float16>) {
      if (args.student.dtype == args.teacher.dtype && !capped) {
        return launch_kernel<Kind, T, T, false>(args, plan, stream);
      }
    }
    launch_kernel<Kind, T, AnyType, true>(args, plan, stream);
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
