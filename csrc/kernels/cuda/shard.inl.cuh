// SPDX-License-Identifier: BSD-3-Clause
// Rows that are a shard of the classes: what one look at them tells of each token. Kernels of their
// own, with a team for a whole row, however many there are: its bits do not depend on the batch.
// Included inside a file's own namespace, after row.inl.cuh.

template <class T, class Loss, int kWarps>
struct ShardReader : RowReader<T, Loss, kWarps> {
  using Reader = RowReader<T, Loss, kWarps>;
  using Reader::all_sums, Reader::args, Reader::find_target, Reader::kThreads, Reader::logit;
  using Reader::look, Reader::rank, Reader::row_at;
  using typename Reader::A;
  using typename Reader::Row;
  using typename Reader::Sums;

  ML_FN void run(int64_t row) const {
    Row r = row_at(row, 0);
    if (r.weight == A(0)) return;
    if constexpr (!Loss::kManyTargets) {
      find_target(&r, 0, false);
      if (is_here(r, r.target)) r.own = A(widen(r.x[r.target]));
    }
    const Sums sums = look(r, nullptr);
    ShardSums all(all_sums(sums));
    if (args.stats && !Loss::kManyTargets) all.best = best(r, all.beaten);
    if (rank() == 0) write_shard(r.token, all);
    for (int64_t k = rank(); k < args.ids; k += kThreads) {
      const int64_t j = r.token.id(k) - args.first;
      if (is_here(r, j)) write_id(r.token, k, logit(r, A(widen(r.x[j]))));
    }
    team_barrier<kWarps>();  // the next row's states go where this one's may still be read
  }

  ML_FN static bool is_here(const Row& r, int64_t column) { return 0 <= column && column < r.n; }

  // As ShardSums has it. The row is read again, where no look has compared with a target.
  ML_FN double best(const Row& r, bool beaten) const {
    if (is_here(r, r.target)) return beaten ? static_cast<double>(NAN) : r.own;
    Largest largest;
    for (int j = rank(); j < r.n; j += kThreads) largest.add({widen(r.x[j])});
    return merge_team<kWarps>(largest).x;
  }

  struct Largest {
    double x;
    ML_FN Largest() : x(-Limits<double>::infinity()) {}
    ML_FN Largest(double x) : x(x) {}
    ML_FN void add(const Largest& other) {  // a NaN stays
      if (!(x != x || x > other.x)) x = other.x;
    }
  };
};

constexpr int kShardWarps = 4;

template <class T, class Loss>
__global__ void __launch_bounds__(kShardWarps* kWarp)
    shard_kernel(const RowArgs args, const Plan plan) {
  const ShardReader<T, Loss, kShardWarps> reader{args, plan};
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) reader.run(row);
}

template <class T, class Loss>
void launch_shard_of(const RowArgs& args, const Plan& plan, Stream stream) {
  launch(shard_kernel<T, Loss>, args.rows, kShardWarps * kWarp, 0, stream, args, plan);
}
template <class T>
void launch_shard(const RowArgs& args, const Plan& plan, Stream stream) {
  if (args.loss == RowLoss::kLogProbs) {
    return args.stats ? launch_shard_of<T, LogProbs<true>>(args, plan, stream)
                      : launch_shard_of<T, LogProbs<false>>(args, plan, stream);
  }
  plan.capped    ? launch_shard_of<T, SoftcappedCrossEntropy>(args, plan, stream)
  : plan.general ? launch_shard_of<T, CrossEntropy<true>>(args, plan, stream)
                 : launch_shard_of<T, CrossEntropy<false>>(args, plan, stream);
}
