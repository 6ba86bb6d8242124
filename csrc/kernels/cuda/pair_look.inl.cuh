// SPDX-License-Identifier: BSD-3-Clause
// The first look at a pair of rows, which reads it from memory, for both log-sum-exps.
// Included inside a file's own namespace, after pair_rows.inl.cuh and pair_softmax.inl.cuh.

constexpr int kMaxThreads = 1024;

template <class T, class U>
struct PairLook : PairRows<T, U> {
  using Rows = PairRows<T, U>;
  using Rows::args, Rows::kept, Rows::whole, Rows::chunks, Rows::count_of, Rows::column;
  using Rows::kCapped, Rows::N, Rows::rank, Rows::threads;
  using Rows::keep, Rows::load, Rows::load_again, Rows::load_whole;
  using typename Rows::A;
  using typename Rows::Chunk;
  using typename Rows::Field;
  using typename Rows::Pair;
  using typename Rows::Student;
  using typename Rows::Teacher;
  using Softmax = PairSoftmax<A>;

  // Both chunks of one side, or one.
  template <int kChunks, class Side, class Sum>
  ML_FN static void push(const Side& side, const typename Side::Chunk (&chunk)[kChunks], int count,
                         Sum* sum) {
    if constexpr (kCapped) {
      A y[kChunks * N];
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        A one[N];
        side.logits(chunk[i], count, one);
        memcpy(y + i * N, one, sizeof one);
      }
      sum->push(y);
    } else {
      uint4 words[kChunks * Side::kWords];
      memcpy(words, chunk, sizeof words);
      sum->push_words(words);
    }
  }

  ML_FN PairSums<A> look(const Pair& r) const {
    ThreadSum<A, typename Student::Kept> student(r.student.cooling());
    ThreadSum<A, typename Teacher::Kept> teacher(r.teacher.cooling());
    const auto push_two = [&](const Chunk& a, const Chunk& b) {
      push<2>(r.student, {a.student, b.student}, N, &student);
      push<2>(r.teacher, {a.teacher, b.teacher}, N, &teacher);
    };
    int k = rank();
    for (; !kCapped && r.aligned && k + threads() < whole; k += 2 * threads()) {
      const Chunk a = load_whole(r, k), b = load_whole(r, k + threads());
      keep(k, a);
      keep(k + threads(), b);
      push_two(a, b);
    }
    for (; k + threads() < whole; k += 2 * threads()) {
      const Chunk a = load(r, k), b = load(r, k + threads());
      keep(k, a);
      keep(k + threads(), b);
      push_two(a, b);
    }
    for (; k < chunks; k += threads()) {
      const Chunk chunk = load(r, k);
      keep(k, chunk);
      push<1>(r.student, {chunk.student}, count_of(k), &student);
      push<1>(r.teacher, {chunk.teacher}, count_of(k), &teacher);
    }
    PairSums<A> sums(student.logsumexp(), teacher.logsumexp());
    if (!student.fits() || !teacher.fits()) sums = look_exactly(r);
    return merge_block<kMaxThreads / kWarp>(sums, student.exponential(), teacher.exponential());
  }
  // What no ThreadSum holds.
  ML_FN PairSums<A> look_exactly(const Pair& r) const {
    CooledSum<A> student(r.student.cooling()), teacher(r.teacher.cooling());
#pragma unroll 1
    for (int k = rank(); k < chunks; k += threads()) {
      const Chunk chunk = load_again(r, k);
      A x[N];
      r.student.logits(chunk.student, count_of(k), x);
      student.push(x);
      r.teacher.logits(chunk.teacher, count_of(k), x);
      teacher.push(x);
    }
    return {student, teacher};
  }

  ML_FN static Softmax softmax_of(const Pair& r, const PairSums<A>& sums) {
    return {sums, r.student.cooling(), r.teacher.cooling()};
  }

  // To exponentials of a chunk, and log p - log q.
  template <bool kSimple, class Count>
  ML_FN static void classes(const Pair& r, const Softmax& softmax, Count count, const Chunk& chunk,
                            A (&y)[N], A (&z)[N], A (&log_ratio)[N]) {
    r.student.logits(chunk.student, count, y);
    r.teacher.logits(chunk.teacher, count, z);
    softmax.template exponentials<kSimple>(y, z, log_ratio);
  }

  // The table's sums are read behind the barrier of merge_team().
  ML_FN void save(int64_t token, const PairSums<A>& sums) const {
    if (rank() != 0) return;
    column(Field::kTop, token) = sums.top;
    column(Field::kSum, token) = static_cast<A>(sums.sum);
    column(Field::kTeacherTop, token) = sums.teacher_top;
    column(Field::kTeacherSum, token) = static_cast<A>(sums.teacher_sum);
  }
  ML_FN PairSums<A> saved(int64_t token) const {
    return {{column(Field::kTop, token), column(Field::kSum, token)},
            {column(Field::kTeacherTop, token), column(Field::kTeacherSum, token)}};
  }
};
