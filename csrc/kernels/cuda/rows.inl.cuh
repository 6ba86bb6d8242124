// SPDX-License-Identifier: BSD-3-Clause
// Cross entropy of rows of logits, and its gradient, without ever holding a row of probabilities.
//
// A team (one warp, or a whole block) works on a row, or on a part of it where rows are few, or so
// long that a cluster of blocks shares each. It reads the row once from memory; for the gradient it
// looks at it again, in shared memory as far as that reaches, beyond that in L2. A masked row is
// never read; its gradient is set to zero.
// Included inside a file's own namespace, after row.inl.cuh.

template <class T, class Loss, int kWarps>
struct RowKernel : RowReader<T, Loss, kWarps> {
  using Reader = RowReader<T, Loss, kWarps>;
  using Reader::args, Reader::plan, Reader::capped, Reader::cooling, Reader::soft;
  using Reader::cap, Reader::column, Reader::cool, Reader::general, Reader::is_uniform;
  using Reader::find_target, Reader::look, Reader::finish, Reader::mass_of, Reader::logit;
  using Reader::kThreads, Reader::kPerLoad, Reader::rank, Reader::row_at, Reader::soft_target_at;
  using Reader::uniform;
  using typename Reader::A;
  using typename Reader::Align;
  using typename Reader::C;
  using typename Reader::Row;
  using typename Reader::Sums;
  // Elsewhere what waits for a cluster would take registers for nothing.
  static constexpr bool kInClusters = kHasClusters && !general && kWarps == kClusterWarps;
  // 16-byte loads in flight: expf wants registers, and a shifted word takes two.
  static constexpr int kGradLoads = general || sizeof(T) > 2 ? 2 : 4;
  static constexpr int kShiftedLoads = sizeof(T) == 2 ? 1 : 2;

  struct Partial {
    Sums sums;
    A own;
  };
  static_assert(sizeof(Partial) <= kPartialBytes, "scratch memory is allocated by it");

  ML_FN Partial* partials_of(int64_t row) const {
    return static_cast<Partial*>(args.scratch) + row * plan.parts;
  }
  ML_FN Sums sums_of_parts(int64_t row) const {
    const Partial* const partials = partials_of(row);
    Sums sums;
    for (int64_t i = rank(); i < plan.parts; i += kThreads) merge(&sums, partials[i].sums);
    return merge_team<kWarps>(sums, Align{});
  }

  // The gradient

  // Its coefficients, and the derivative at the target.
  struct GradOfRow : RowGrad<A> {
    A top, target;
  };

  ML_FN GradOfRow grad_of(const Row& r, A top, A sum, A mass) const {
    const LogSumExp<C> lse{C(top), C(sum)};
    C scale = C(r.weight) * C(r.token.upstream(0));
    if (cooling) scale = scale / C(r.token.temperature());
    const auto g = Loss::grad(r.token, scale, lse, C(mass));
    // Added up in A, as the row's mass was: of one class alone nothing must be left.
    const bool here = 0 <= r.target && r.target < r.n;
    const A q = r.hard + (here && soft ? soft_target_at(r, r.target, uniform) : A(0));
    const C target = Loss::target_grad(C(logit(r, r.own)), lse.top, C(q), g);
    return {{A(g.alpha), A(g.beta), A(g.gamma)}, top, A(target)};
  }

  template <int N>
  ML_FN void differentiate(const Row& r, const GradOfRow& g, int at, A (&x)[N]) const {
    A y[N], slope[N];
#pragma unroll
    for (int i = 0; i < N; ++i) y[i] = x[i];
    if (capped) cap.apply(y, slope);
    cool(r, y);
    const auto terms = [&](auto loss, const auto& q) {
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = gradient_term<decltype(loss), A>(y[i], g.top, g, q(i));
    };
    const auto share = [&](int i) { return soft_target_at(r, column(at, i), uniform); };
    if constexpr (Loss::kManyTargets) {
      terms(Loss(), [](int) { return A(0); });
    } else if (!soft) {
      terms(CrossEntropy<false>(), [](int) { return A(0); });
    } else if (is_uniform(r)) {
      terms(CrossEntropy<true>(), [&](int) { return uniform; });
    } else {
      terms(CrossEntropy<true>(), share);
    }
    constexpr int kWord = N < kPerLoad ? N : kPerLoad;
#pragma unroll
    for (int word = 0; word < N; word += kWord) {
      const int first = column(at, word);
      if (static_cast<unsigned>(r.target - first) >= static_cast<unsigned>(kWord)) continue;
#pragma unroll
      for (int i = 0; i < kWord; ++i) {
        if (first + i == r.target) x[word + i] = g.target;
      }
    }
    if (capped) {
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = x[i] * slope[i];
    }
  }

  ML_FN void store(uint4* p, const uint4& word) const {
    if (args.stream) {
      __stcs(p, word);
    } else {
      *p = word;
    }
  }

  // Words [begin, end) of dx from the words of x that lie `apart` from them, kept or not.
  // kShifted: between two of those. Every thread writes only what it has read: dx may be x.
  template <bool kShifted, int kUnroll>
  ML_FN void differentiate_words(const Row& r, const GradOfRow& g, const Words16<T>& in,
                                 const Words16<T>& out, int begin, int end, int apart,
                                 int shift_bytes, const uint4* cache) const {
    uint4* const to = reinterpret_cast<uint4*>(r.dx + out.head);
    // Or it would be found again at each word.
    const uint4* const from = general ? opaque(in.first) : in.first;
    const auto kept = [&](int k) { return k < plan.cached ? cache[k] : __ldcs(from + k); };
    const auto load = [&](int k) {
      const uint4 word = kept(k + apart);
      if constexpr (!kShifted) return word;
      return between(word, kept(k + apart + 1), shift_bytes);
    };
    const auto write = [&](const auto& words, int k) {  // words k, k + kThreads and so on
      constexpr int kWords = sizeof words / sizeof *words;
      A x[kWords * kPerLoad];
#pragma unroll
      for (int u = 0; u < kWords; ++u) unpack(words[u], x + u * kPerLoad, T{});
      differentiate(r, g, out.head + k * kPerLoad, x);
#pragma unroll
      for (int u = 0; u < kWords; ++u) store(to + k + u * kThreads, pack(x + u * kPerLoad, T{}));
    };
    int i = begin + rank();
    if constexpr (general) {
      for (; kUnroll > 1 && i + (kUnroll - 1) * kThreads < end; i += kUnroll * kThreads) {
        uint4 words[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) words[u] = load(i + u * kThreads);
        write(words, i);
      }
      for (; i < end; i += kThreads) {
        const uint4 words[1] = {load(i)};
        write(words, i);
      }
    } else {
      for (; i < end; i += kUnroll * kThreads) {
        uint4 words[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          if (i + u * kThreads < end) words[u] = load(i + u * kThreads);
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          const uint4 one[1] = {words[u]};
          if (i + u * kThreads < end) write(one, i + u * kThreads);
        }
      }
    }
  }

  ML_FN void grad(const Row& r, const GradOfRow& g, const uint4* cache) const {
    const Words16<T> in(r.x, r.n), out(r.dx, r.n);
    // Word k of dx begins with element out.head + k * kPerLoad, and that is `shift` elements after
    // the beginning of word k + apart of x.
    const int apart = out.head < in.head ? -1 : 0;
    const int shift = out.head - in.head - apart * kPerLoad;
    const int begin = min(-apart, out.words);
    const int end = max_of(begin, min(out.words, in.words - apart - (shift != 0)));
    if (shift == 0) {
      differentiate_words<false, kGradLoads>(r, g, in, out, 0, end, 0, 0, cache);
    } else {
      differentiate_words<true, kShiftedLoads>(r, g, in, out, begin, end, apart,
                                               shift * static_cast<int>(sizeof(T)), cache);
    }
    const int head = out.head + begin * kPerLoad, tail = out.head + end * kPerLoad;
    for (int j = rank(); j < head + r.n - tail; j += kThreads) {
      const int at = j < head ? j : tail + j - head;
      A x[1] = {A(widen(r.x[at]))};
      differentiate(r, g, at, x);
      narrow(x[0], r.dx + at);
    }
  }

  ML_FN static int max_of(int a, int b) { return a > b ? a : b; }

  ML_FN void clear(const Row& r) const {
    const Words16<T> out(r.dx, r.n);
    uint4* const to = reinterpret_cast<uint4*>(r.dx + out.head);
    for (int k = rank(); k < out.words; k += kThreads) store(to + k, uint4{0, 0, 0, 0});
    const int single = rank() < out.head ? rank() : out.tail() + rank() - out.head;
    if (single < r.n) narrow(A(0), r.dx + single);
  }

  ML_FN void masked(const Row& r, int64_t part) const {
    if (plan.phase == Phase::kPartial) return;
    if (args.forward && part == 0 && rank() == 0) Loss::finish_masked(r.token);
    for (int64_t k = rank(); Loss::kManyTargets && args.forward && k < args.ids; k += kThreads) {
      r.token.log_prob(k) = 0;
    }
    if (r.dx) clear(r);
  }

  // Rows of log-probabilities: whole rows, whatever their number, so that their bits do not depend
  // on the batch.
  ML_FN void score_ids(int64_t row) const {
    const Row r = row_at(row, 0);
    if (r.weight == A(0)) return masked(r, 0);
    const Sums sums = look(r, nullptr);
    if (rank() == 0) Loss::finish(r.token, sums);
    const double log_sum = log(static_cast<double>(sums.sum));
    for_each_id(r, [&](int64_t k, int64_t column) {
      const A y = column < 0 ? A(0) : logit(r, A(widen(r.x[column])));
      const double log_prob = Loss::log_prob(y, sums.top, log_sum);
      r.token.log_prob(k) = column < 0 ? A(0) : static_cast<A>(log_prob);
    });
    team_barrier<kWarps>();  // the next row's states go where this one's may still be read
  }

  // A row of which only the loss is wanted.
  ML_FN void score_target(int64_t row) const {
    Row r = row_at(row, 0);
    if (r.weight == A(0)) return masked(r, 0);
    find_target(&r, 0, true);
    const Sums sums = look(r, nullptr);
    if (rank() == 0) finish(r, sums);
    team_barrier<kWarps>();  // the next row's states go where this one's may still be read
  }

  // An id's thread writes its class after all other classes are written.
  ML_FN void differentiate_ids(int64_t row) const {
    const Row r = row_at(row, 0);
    if (r.weight == A(0)) return masked(r, 0);
    const RowGrad<double> g = Loss::grad(r.token);
    const A top = r.token.column(LogProbField::kTop);
    A* const derivatives = static_cast<A*>(args.scratch) + r.token.index * args.ids;
    for_each_id(r, [&](int64_t k, int64_t column) {
      if (column < 0) return;
      const A x = A(widen(r.x[column])), slope = slope_at(x);
      const double own = total_of(r, k) / r.token.temperature();
      const double d = Loss::target_grad(logit(r, x), top, g, own);
      derivatives[k] = static_cast<A>(slope * d);
    });
    team_barrier<kWarps>();  // dx may be x
    grad(r, {{A(g.alpha), A(g.beta), A(0)}, top, A(0)}, nullptr);
    team_barrier<kWarps>();
    for_each_id(r, [&](int64_t k, int64_t column) {
      if (column >= 0) narrow(derivatives[k], r.dx + column);
    });
  }

  // f(k, the id's column, or less than 0 where it is ignored or in another shard), shared out to
  // the team.
  template <class F>
  ML_FN void for_each_id(const Row& r, const F& f) const {
    for (int64_t k = rank(); k < args.ids; k += kThreads) {
      const int64_t id = r.token.id(k);
      const int64_t column = id - args.first;
      f(k, id != args.ignore_index && column < args.cols ? column : -1);
    }
  }

  ML_FN A slope_at(A x) const {
    A y[1] = {x}, slope[1] = {A(1)};
    if (capped) cap.apply(y, slope);
    return slope[0];
  }

  // All that goes to the class of id k, which may be there more than once.
  ML_FN double total_of(const Row& r, int64_t k) const {
    double sum = 0;
    for (int64_t i = 0; i < args.ids; ++i) {
      if (r.token.id(i) == r.token.id(k)) sum += r.token.upstream_of_id(i);
    }
    return sum;
  }

  // One part of one row, or all of it.
  ML_FN void run(int64_t row, int64_t part, uint4* cache) const {
    if constexpr (Loss::kManyTargets) {
      differentiate_ids(row);
    } else {
      run_target(row, part, cache);
    }
  }

  ML_FN void run_target(int64_t row, int64_t part, uint4* cache) const {
    Row r = row_at(row, part);
    if (r.weight == A(0)) return masked(r, part);
    if (!args.forward) {
      find_target(&r, part, true);
      if (r.dx == r.x) team_barrier<kWarps>();  // all of its threads have the target's logit
      const Token<A>& t = r.token;
      const GradOfRow g = grad_of(r, t.column(TokenField::kTop), t.column(TokenField::kSum),
                                  t.column(TokenField::kTargetMass));
      grad(r, g, cache);
      return;
    }
    Sums sums;
    A own;
    if (plan.phase == Phase::kFinish) {
      sums = sums_of_parts(row);
      own = partials_of(row)[0].own;
    } else {
      find_target(&r, part, true);  // its logit before anything is written: dx may be x
      own = r.own;
      sums = look(r, cache);
      if (kInClusters && plan.together) {
        if (rank() == 0) partials_of(row)[part].sums = sums;
        cluster_barrier();  // all parts of the row are read
        sums = sums_of_parts(row);
      }
    }
    // What was known of the row is found again, rather than kept in registers meanwhile.
    row = opaque(row);
    if (plan.phase == Phase::kPartial) {
      if (rank() == 0) partials_of(row)[part] = {sums, own};
    } else {
      Row again = row_at(row, part);
      find_target(&again, part, false);
      again.own = own;
      if (part == 0 && rank() == 0) finish(again, sums);
      if (again.dx)
        grad(again, grad_of(again, A(sums.top), A(sums.sum), mass_of(again, sums)), cache);
    }
    // The next row's states and words go where this one's may still be read.
    team_barrier<kWarps>();
  }
};

// Registers for so many threads on a multiprocessor. More of them would spill for sm_75 and sm_120,
// whose memory is slow enough for less than that to keep it busy.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kThreadsPlanned = 640;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kThreadsPlanned = 896;
#else
constexpr int kThreadsPlanned = 1024;
#endif
constexpr int kThreadsInGeneral = 512;  // and for float64
constexpr int kThreadsOfOptions = 768;  // without a gradient

constexpr int threads_of(int warps) { return warps == 1 ? 4 * kWarp : warps * kWarp; }
template <class T>
constexpr int blocks_of(bool general, int warps) {
  return (general || sizeof(T) == 8 ? kThreadsInGeneral : kThreadsPlanned) / threads_of(warps);
}

template <class T, class Loss, int kWarps>
__global__ void __launch_bounds__(threads_of(kWarps), blocks_of<T>(is_general<Loss>, kWarps))
    rows_kernel(const RowArgs args, const Plan plan) {
  using A = typename Accumulation<T>::Type;
  if (plan.unless_one && *static_cast<const A*>(args.upstream[0].values) == A(1)) return;
  const RowKernel<T, Loss, kWarps> rows{{args, plan}};
  const int teams = static_cast<int>(blockDim.x) / (kWarps * kWarp);
  const int team = team_of_block<kWarps>();
  uint4* const cache = shared_memory + team * plan.cached;
  // The first part alone finishes a row that has no gradient.
  const bool all_parts = args.dlogits || plan.phase == Phase::kPartial;
  const int64_t parts = all_parts ? plan.parts : 1, items = args.rows * parts;
  // The step is computed when it is taken: kept meanwhile, it would cost registers that spill.
  for (int64_t i = int64_t{blockIdx.x} * teams + team; i < items;
       i += opaque(int64_t{gridDim.x}) * teams) {
    const int64_t row = quotient(i, parts);
    rows.run(row, i - row * parts, cache);
  }
}

template <class T, class Loss>
constexpr int kThreadsOfValues = sizeof(T) == 8       ? kThreadsInGeneral
                                 : Loss::kManyTargets ? kThreadsPlanned
                                                      : kThreadsOfOptions;

// The forward pass of whole rows, of log-probabilities and of cross entropy in general: a kernel of
// its own, without the gradient's registers.
template <class T, class Loss, int kWarps>
__global__ void __launch_bounds__(threads_of(kWarps),
                                  kThreadsOfValues<T, Loss> / threads_of(kWarps))
    values_kernel(const RowArgs args, const Plan plan) {
  const RowKernel<T, Loss, kWarps> rows{{args, plan}};
  const int teams = static_cast<int>(blockDim.x) / (kWarps * kWarp);
  for (int64_t row = int64_t{blockIdx.x} * teams + team_of_block<kWarps>(); row < args.rows;
       row += int64_t{gridDim.x} * teams) {
    if constexpr (Loss::kManyTargets) {
      rows.score_ids(row);
    } else {
      rows.score_target(row);
    }
  }
}

template <class T, class Loss>
void launch_team(const RowArgs& args, const Plan& plan, Stream stream) {
  const int64_t items = args.rows * plan.parts;
  int64_t blocks = (items + plan.teams - 1) / plan.teams;
  if (plan.unless_one) blocks = std::min(blocks, plan.blocks);  // there is hardly ever work
  const int threads = plan.warps * plan.teams * kWarp;
  const int64_t shared = int64_t{plan.cached} * plan.teams * 16;
  auto kernel = rows_kernel<T, Loss, 4>;
  if constexpr (sizeof(T) < 8) {
    if (plan.warps == 1) kernel = rows_kernel<T, Loss, 1>;
    if constexpr (!Loss::kManyTargets) {
      if (plan.warps == 16) kernel = rows_kernel<T, Loss, 16>;
    }
    if constexpr (!is_general<Loss>) {
      if (plan.warps == 2) kernel = rows_kernel<T, Loss, 2>;
      if (plan.warps == 8) kernel = rows_kernel<T, Loss, 8>;
    }
  }
  if constexpr (is_general<Loss>) {
    if (plan.phase == Phase::kValues) {
      kernel = values_kernel<T, Loss, 4>;
      if constexpr (sizeof(T) < 8) {
        if (plan.warps == 1) kernel = values_kernel<T, Loss, 1>;
        if constexpr (!Loss::kManyTargets) {
          if (plan.warps == 16) kernel = values_kernel<T, Loss, 16>;
        }
      }
    }
  }
  const int cluster = plan.together ? static_cast<int>(plan.parts) : 1;
  launch(kernel, Grid{blocks, threads, shared, cluster}, stream, args, plan);
}

template <class T>
void launch_rows(const RowArgs& args, const Plan& plan, Stream stream) {
  if (args.part) return launch_shard<T>(args, plan, stream);
  if constexpr (sizeof(T) < 8) {
    if (plan.phase == Phase::kLosses) return launch_forward<T>(args, plan, stream);
  }
  if (args.loss == RowLoss::kLogProbs) {
    // The entropy itself, or its gradient.
    const bool with_entropy = args.results[1] || args.upstream[1].values;
    return with_entropy ? launch_team<T, LogProbs<true>>(args, plan, stream)
                        : launch_team<T, LogProbs<false>>(args, plan, stream);
  }
  plan.capped    ? launch_team<T, SoftcappedCrossEntropy>(args, plan, stream)
  : plan.general ? launch_team<T, CrossEntropy<true>>(args, plan, stream)
                 : launch_team<T, CrossEntropy<false>>(args, plan, stream);
}
