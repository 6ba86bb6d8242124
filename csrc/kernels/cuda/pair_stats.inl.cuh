// SPDX-License-Identifier: BSD-3-Clause
// The statistics of pairs of rows: a kernel of their own, before the one that may overwrite the
// student by its gradient, so that no other has their registers.
// Included inside a file's own namespace, after pair_look.inl.cuh.

template <class T, class U>
struct PairStats : PairLook<T, U> {
  using Look = PairLook<T, U>;
  using Look::args, Look::chunks, Look::column, Look::count_of, Look::load_again, Look::look;
  using Look::pair_at, Look::rank, Look::softmax_of, Look::threads, Look::N;
  using typename Look::A;
  using typename Look::Chunk;
  using typename Look::Field;
  using typename Look::Pair;
  using Softmax = PairSoftmax<A>;

  ML_FN void run(int64_t row) const {
    const Pair r = pair_at(row);
    if (column(Field::kWeight, r.token) != A(0)) return stats(r, look(r));
    if (rank() != 0) return;
    for (int64_t f = Field::kSaved; f < Field::kCount; ++f) column(f, r.token) = A(0);
  }

  ML_FN void stats(const Pair& r, const PairSums<A>& sums) const {
    const Softmax softmax = softmax_of(r, sums);
    StatSums<A> all;
    for (int k = rank(); k < chunks; k += threads()) {
      const Chunk chunk = load_again(r, k);
      const int count = count_of(k);
      A y[N], z[N], below[N], teacher_below[N], l[N];
      r.student.logits(chunk.student, count, y);
      r.teacher.logits(chunk.teacher, count, z);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const int64_t j = int64_t{k} * N + i;
        below[i] = bounded_below(softmax.own(y[i] - sums.top));
        teacher_below[i] = bounded_below(softmax.others(z[i] - sums.teacher_top));
        if (j < args.cols) {
          all.largest.add({y[i], j});
          all.teacher_largest.add({z[i], j});
        }
      }
      softmax.template exponentials<false>(y, z, l);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        all.entropy -= y[i] * softmax.q * below[i];
        all.teacher_entropy -= z[i] * softmax.p * teacher_below[i];
      }
    }
    all = merge_team<kMaxThreads / kWarp>(all);
    if (rank() != 0) return;
    column(Field::kEntropy, r.token) = static_cast<A>(log(sums.sum) + all.entropy);
    column(Field::kTeacherEntropy, r.token) =
        static_cast<A>(log(sums.teacher_sum) + all.teacher_entropy);
    column(Field::kAgreement, r.token) = all.largest.index == all.teacher_largest.index;
  }
};

template <class T, class U>
__global__ void __launch_bounds__(kMaxThreads)
    divergence_stats_kernel(const DivergenceArgs args, const int kept) {
  const PairStats<T, U> pairs{{{args, kept}}};
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) pairs.run(row);
}
