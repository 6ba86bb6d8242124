// SPDX-License-Identifier: BSD-3-Clause
// Cross entropy of rows of logits, and its gradient, without ever holding a row of probabilities.
//
// A team (one warp, or a whole block) works on a row, or on a part of it where rows are few. It
// reads the row once from memory; for the gradient it looks at it again, in shared memory as far as
// that reaches, beyond that in L2. A masked row is never read; its gradient is set to zero.
// Included inside a file's own namespace, after math.inl.h.

// What threads add up: of cross entropy in general also what its options need.
template <class Loss, class V>
struct ThreadSums {
  using Type = typename Loss::template Sums<V>;
};
template <class V>
struct ThreadSums<CrossEntropy<true>, V> {
  using Type = TargetSums<V>;
};

// All but plain cross entropy: with a softcap, a temperature, a soft target distribution, or
// statistics.
template <class Loss>
constexpr bool is_general = !std::is_same_v<Loss, CrossEntropy<false>>;

template <class T, class Loss, int kWarps>
struct RowKernel {
  using A = typename Accumulation<T>::Type;
  static constexpr bool general = is_general<Loss>;
  // Where several terms make up a gradient in float, it shows every rounding of what is done once
  // for each row: the threads' sums are merged, and the coefficients computed, in double.
  using C = std::conditional_t<general, double, A>;
  template <class X>
  using SumsOf = typename ThreadSums<Loss, X>::Type;
  using Sums = SumsOf<C>;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kPerLoad = kPerWord16<T>;
  // 16-byte loads that a thread has in flight. What hides the latency of an H200's memory at its
  // full speed is some 32 KB on a multiprocessor: 512 threads with four each.
  static constexpr int kLoadsInFlight = general || sizeof(T) == 8 ? 2 : 4;
  static constexpr int kGradLoads = sizeof(T) == 4 ? 2 : kLoadsInFlight;  // expf wants registers
  static constexpr int kShiftedLoads = sizeof(T) == 2 ? 1 : 2;            // two words for each

  // Lanes agree on the largest top first, and then only add: each is rescaled, and rounded, once.
  struct Align {
    template <int kLanes>
    ML_FN void lanes(Sums* sums) const {
      C top = sums->top;
#pragma unroll
      for (int mask = kLanes / 2; mask > 0; mask /= 2) top = max(top, from_lane_xor(top, mask));
      sums->raise(top);
    }
  };

  struct Partial {
    Sums sums;
    A own;
  };
  static_assert(sizeof(Partial) <= kPartialBytes, "scratch memory is allocated by it");

  const RowArgs& args;
  const Plan& plan;
  const bool capped = general && args.softcap != 0;
  const bool cooling = general && (args.temperatures || args.temperature != 1);
  const bool soft = general && (args.probs || args.label_smoothing != 0);
  const A cap = static_cast<A>(args.softcap);
  const A probs_scale = args.probs ? static_cast<A>(1 - args.label_smoothing) : A(0);
  const A uniform = static_cast<A>(args.label_smoothing / static_cast<double>(args.classes));

  // One row, from column `begin` on; x, dx and probs begin there, and target counts from there.
  struct Row {
    const T* x;
    T* dx;
    const T* probs;
    const A* class_weight;
    Token<A> token;
    InverseTemperature<A> cool;
    int64_t label;  // its target; of a masked token anything
    int n;          // columns
    int target;     // its column; -1 or INT_MAX where it lies in a part before or after this one
    A own;          // its logit, wherever it lies
    A hard;
    A weight;
  };

  ML_FN static int rank() { return static_cast<int>(threadIdx.x % kThreads); }

  ML_FN A logit(const Row& r, A x) const {
    if (capped) x = softcap(x, cap);
    return cooling ? cooled(x, r.cool) : x;
  }

  ML_FN A soft_target_at(const Row& r, int j, A share) const {
    return soft_target(r.class_weight ? r.class_weight[j] : A(1),
                       r.probs ? A(widen(r.probs[j])) : A(0), probs_scale, share);
  }

  ML_FN Row row_at(int64_t row, int64_t part) const {
    const int64_t begin = part * plan.width;
    const int64_t batch = quotient(row, args.steps), step = row - batch * args.steps;
    const Token<A> token{args, token_of(args, row, step)};
    Row r{nullptr, nullptr,
          nullptr, nullptr,
          token,   InverseTemperature<A>(cooling ? static_cast<double>(token.temperature()) : 1.0)};
    r.n = static_cast<int>(min(plan.width, args.cols - begin));
    r.x = static_cast<const T*>(args.logits) + batch * args.batch_stride + step * args.step_stride +
          begin;
    r.dx = args.dlogits ? static_cast<T*>(args.dlogits) + batch * args.grad_batch_stride +
                              step * args.grad_step_stride + begin
                        : nullptr;
    r.probs = args.probs ? static_cast<const T*>(args.probs) + row * args.cols + begin : nullptr;
    const A* const weights = static_cast<const A*>(args.class_weight);
    r.class_weight = weights ? weights + args.first + begin : nullptr;
    r.target = -1;
    r.own = r.hard = A(0);
    // Together: the target's logit must not wait for one after the other, and the row's first loads
    // come after it.
    r.label =
        Loss::kManyTargets || args.probs ? 0 : index_at(args.target, args.target_type, token.index);
    r.weight = token.column(TokenField::kWeight);
    return r;
  }

  // Of an active row.
  ML_FN void find_target(Row* r, int64_t part, bool with_logit) const {
    if (args.probs) return;
    const int64_t at = r->label - args.first - part * plan.width;
    r->target = at < 0 ? -1 : at < r->n ? static_cast<int>(at) : INT_MAX;
    r->hard = Loss::template hard<A>(args, r->label);
    // Without a forward pass dx may be x, and another part's logit overwritten already.
    const bool wanted =
        with_logit && (args.forward || static_cast<uint64_t>(at) < static_cast<uint64_t>(r->n));
    if (wanted) r->own = A(widen(r->x[at]));
  }

  // One look at a row

  template <int N>
  ML_FN void push(const Row& r, SumsOf<A>* sums, const A (&x)[N], int at) const {
    if constexpr (Loss::kManyTargets) {
      A y[N];
#pragma unroll
      for (int i = 0; i < N; ++i) y[i] = logit(r, x[i]);
      sums->push(y);
    } else if constexpr (general) {
      A y[N];
#pragma unroll
      for (int i = 0; i < N; ++i) y[i] = logit(r, x[i]);
      sums->push(y, args.stats);
      if (soft) {
        const A share = uniform_in_units(args.probs, uniform);
        A q[N];
#pragma unroll
        for (int i = 0; i < N; ++i) q[i] = soft_target_at(r, at + i, share);
        sums->push_soft(y, q);
      }
      if (args.stats) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          // Also by a NaN.
          sums->beaten |= !(x[i] <= r.own) || (x[i] == r.own && at + i < r.target);
        }
      }
    } else {
      sums->push(x);
    }
  }

  ML_FN Sums look(const Row& r, uint4* cache) const {
    if constexpr (!general && sizeof(T) < 8) {
      Look<T, kThreads> look{r.x, r.n, rank(), cache, plan.cached};
      const Sums sums = r.dx ? look.template run<true>() : look.template run<false>();
      return merge_team<kWarps>(sums, Align{});
    }
    const Words16<T> span(r.x, r.n);
    const int read_again = r.dx ? plan.cached : INT_MAX;  // from here on, out of L2
    SumsOf<A> sums;
    for (int i = rank(); i < span.words; i += kLoadsInFlight * kThreads) {
      uint4 words[kLoadsInFlight];
#pragma unroll
      for (int u = 0; u < kLoadsInFlight; ++u) {
        const int k = i + u * kThreads;
        words[u] = minus_infinities<T>();
        if (k < span.words) {
          words[u] = k < read_again ? __ldcs(span.first + k) : span.first[k];
        }
      }
#pragma unroll
      for (int u = 0; u < kLoadsInFlight; ++u) {
        const int k = i + u * kThreads;
        if (k < plan.cached && k < span.words) cache[k] = words[u];
        A x[kPerLoad];
        unpack(words[u], x, T{});
        if (!general || k < span.words) push(r, &sums, x, span.head + k * kPerLoad);
      }
    }
    // What is left of the row is shorter than a warp's width: at most 7 and 7 elements.
    const int single = rank() < span.head ? rank() : span.tail() + rank() - span.head;
    if (single < r.n) {
      const A x[1] = {A(widen(r.x[single]))};
      push(r, &sums, x, single);
    }
    return merge_team<kWarps>(Sums(sums), Align{});
  }

  // By one thread, in double.
  ML_FN void finish(const Row& r, const Sums& sums) const {
    const double own = logit(r, r.own);
    if constexpr (general) {
      TargetSums<double> wide(sums);
      wide.soft_loss *= soft_unit(args.probs, uniform);
      wide.soft_mass = soft_mass_of(sums);
      Loss::finish(r.token, wide, own, r.hard);
      if (args.stats) Loss::finish_stats(r.token, wide);
    } else {
      TargetSums<double> wide;
      wide.top = sums.top, wide.sum = sums.sum;
      Loss::finish(r.token, wide, own, r.hard);
    }
  }

  // The sum of the target distribution.
  ML_FN A mass_of(const Row& r, const Sums& sums) const {
    if constexpr (general) return r.hard + soft_mass_of(sums);
    return r.hard;
  }
  ML_FN A soft_mass_of(const Sums& sums) const {
    return soft_unit(args.probs, uniform) * static_cast<A>(sums.soft_mass);
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
    A d[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      A y = x[i];
      if (capped) {
        y = softcap(x[i], cap);
        x[i] = tanh_rest(x[i] / cap);  // what the slope is made of
      }
      if (cooling) y = cooled(y, r.cool);
      if constexpr (Loss::kManyTargets) {
        d[i] = gradient_term<Loss, A>(y, g.top, g, A(0));
      } else {
        d[i] = soft ? gradient_term<CrossEntropy<true>, A>(y, g.top, g,
                                                           soft_target_at(r, at + i, uniform))
                    : gradient_term<CrossEntropy<false>, A>(y, g.top, g, A(0));
      }
    }
    if (static_cast<unsigned>(r.target - at) < static_cast<unsigned>(N)) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (at + i == r.target) d[i] = g.target;
      }
    }
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = capped ? d[i] * tanh_slope(x[i]) : d[i];
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
    const auto word = [&](int k) { return k < plan.cached ? cache[k] : __ldcs(in.first + k); };
    for (int i = begin + rank(); i < end; i += kUnroll * kThreads) {
      uint4 words[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int k = i + u * kThreads;
        if (k < end) {
          words[u] = word(k + apart);
          if constexpr (kShifted) {
            words[u] = between(words[u], word(k + apart + 1), shift_bytes);
          }
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int k = i + u * kThreads;
        if (k < end) {
          A x[kPerLoad];
          unpack(words[u], x, T{});
          differentiate(r, g, out.head + k * kPerLoad, x);
          store(to + k, pack(x, T{}));
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
  // on the batch. An id's thread writes its class after all other classes are written.
  ML_FN void run_ids(int64_t row) const {
    const Row r = row_at(row, 0);
    if (r.weight == A(0)) return masked(r, 0);
    if (args.forward) {
      const Sums sums = look(r, nullptr);
      if (rank() == 0) Loss::finish(r.token, sums);
      for_each_id(r, [&](int64_t k, int64_t column) {
        const A y = column < 0 ? A(0) : logit(r, A(widen(r.x[column])));
        r.token.log_prob(k) = column < 0 ? A(0) : static_cast<A>(Loss::log_prob(sums, y));
      });
      team_barrier<kWarps>();  // the next row's states go where this one's may still be read
    }
    if (!r.dx) return;
    const RowGrad<double> g = Loss::grad(r.token);
    const A top = r.token.column(LogProbField::kTop);
    A* const derivatives = static_cast<A*>(args.scratch) + r.token.index * args.ids;
    for_each_id(r, [&](int64_t k, int64_t column) {
      if (column < 0) return;
      const A x = A(widen(r.x[column])), rest = capped ? tanh_rest(x / cap) : A(1);
      const double own = total_of(r, k) / r.token.temperature();
      const double d = Loss::target_grad(logit(r, x), top, g, own);
      derivatives[k] = static_cast<A>(tanh_slope(rest) * d);
    });
    team_barrier<kWarps>();  // dx may be x
    grad(r, {{A(g.alpha), A(g.beta), A(0)}, top, A(0)}, nullptr);
    team_barrier<kWarps>();
    for_each_id(r, [&](int64_t k, int64_t column) {
      if (column >= 0) narrow(derivatives[k], r.dx + column);
    });
  }

  // f(k, the id's column, or -1 where it is ignored), shared out to the team.
  template <class F>
  ML_FN void for_each_id(const Row& r, const F& f) const {
    for (int64_t k = rank(); k < args.ids; k += kThreads) {
      const int64_t id = r.token.id(k);
      f(k, id == args.ignore_index ? -1 : id - args.first);
    }
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
      run_ids(row);
    } else {
      run_target(row, part, cache);
    }
  }

  ML_FN void run_target(int64_t row, int64_t part, uint4* cache) const {
    Row r = row_at(row, part);
    if (r.weight == A(0)) return masked(r, part);
    if (!args.forward) {
      find_target(&r, part, true);  // of dx = x, only by the thread that writes it
      const Token<A>& t = r.token;
      const GradOfRow g = grad_of(r, t.column(TokenField::kTop), t.column(TokenField::kSum),
                                  t.column(TokenField::kTargetMass));
      grad(r, g, cache);
      return;
    }
    Sums sums;
    A own;
    if (plan.phase == Phase::kFinish) {
      const Partial* const partials = static_cast<Partial*>(args.scratch) + row * plan.parts;
      for (int64_t i = rank(); i < plan.parts; i += kThreads) {
        merge(&sums, partials[i].sums);
      }
      sums = merge_team<kWarps>(sums, Align{});
      own = partials[0].own;
    } else {
      find_target(&r, part, true);  // its logit before anything is written: dx may be x
      own = r.own;
      sums = look(r, cache);
    }
    // What was known of the row is found again, rather than kept in registers meanwhile.
    row = opaque(row);
    if (plan.phase == Phase::kPartial) {
      Partial* const partials = static_cast<Partial*>(args.scratch) + row * plan.parts;
      if (rank() == 0) partials[part] = {sums, own};
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

// Registers for 1024 threads on a multiprocessor, or for half as many where a row takes more.
constexpr int threads_of(int warps) { return warps < 4 ? 4 * kWarp : warps * kWarp; }
template <class T>
constexpr int blocks_of(bool general, int warps) {
  return (general || sizeof(T) == 8 ? 512 : 1024) / threads_of(warps);
}

template <class T, class Loss, int kWarps>
__global__ void __launch_bounds__(threads_of(kWarps), blocks_of<T>(is_general<Loss>, kWarps))
    rows_kernel(const RowArgs args, const Plan plan) {
  using A = typename Accumulation<T>::Type;
  if (plan.unless_one && *static_cast<const A*>(args.upstream[0].values) == A(1)) return;
  const RowKernel<T, Loss, kWarps> rows{args, plan};
  const int teams = static_cast<int>(blockDim.x) / (kWarps * kWarp);
  const int team = static_cast<int>(threadIdx.x) / (kWarps * kWarp);
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
void launch_team(const RowArgs& args, const Plan& plan, Stream stream) {
  const int64_t items = args.rows * plan.parts;
  int64_t blocks = (items + plan.teams - 1) / plan.teams;
  if (plan.unless_one) blocks = std::min(blocks, plan.blocks);  // there is hardly ever work
  const int threads = plan.warps * plan.teams * kWarp;
  const int64_t shared = int64_t{plan.cached} * plan.teams * 16;
  auto kernel = rows_kernel<T, Loss, 4>;
  if constexpr (sizeof(T) < 8) {
    if constexpr (!Loss::kManyTargets) {
      if (plan.warps == 1) kernel = rows_kernel<T, Loss, 1>;
    }
    if (plan.warps == 16) kernel = rows_kernel<T, Loss, 16>;
  }
  if constexpr (sizeof(T) < 8 && !is_general<Loss>) {
    if (plan.warps == 2) kernel = rows_kernel<T, Loss, 2>;
    if (plan.warps == 8) kernel = rows_kernel<T, Loss, 8>;
  }
  launch(kernel, blocks, threads, shared, stream, args, plan);
}

template <class T>
void launch_rows(const RowArgs& args, const Plan& plan, Stream stream) {
  if constexpr (sizeof(T) < 8) {
    if (plan.phase == Phase::kLosses) return launch_forward<T>(args, plan, stream);
  }
  if (args.loss == RowLoss::kLogProbs) {
    // The entropy itself, or its gradient.
    const bool with_entropy = args.results[1] || args.upstream[1].values;
    return with_entropy ? launch_team<T, LogProbs<true>>(args, plan, stream)
                        : launch_team<T, LogProbs<false>>(args, plan, stream);
  }
  plan.general ? launch_team<T, CrossEntropy<true>>(args, plan, stream)
               : launch_team<T, CrossEntropy<false>>(args, plan, stream);
}
