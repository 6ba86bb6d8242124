// SPDX-License-Identifier: BSD-3-Clause
// A row of logits for a team of warps: where it lies, and one look at it, which is all that its
// loss takes. The gradient's second look is in rows.inl.cuh. Included inside a file's own
// namespace, after look.inl.cuh.

// Cross entropy in general, with a softcap: kernels of its own, since a softcap wants registers,
// and is asked for at each word.
struct SoftcappedCrossEntropy : CrossEntropy<true> {};

// What threads add up: of cross entropy in general also what its options need.
template <class Loss, class V>
using ThreadSums = std::conditional_t<std::is_base_of_v<CrossEntropy<true>, Loss>, TargetSums<V>,
                                      typename Loss::template Sums<V>>;

// All but plain cross entropy: with a softcap, a temperature, a soft target distribution, or
// statistics.
template <class Loss>
constexpr bool is_general = !std::is_same_v<Loss, CrossEntropy<false>>;

template <class T, class Loss, int kWarps>
struct RowReader {
  using A = typename Accumulation<T>::Type;
  static constexpr bool general = is_general<Loss>;
  // Where several terms make up a gradient in float, it shows every rounding of what is done once
  // for each row: the threads' sums are merged, and the coefficients computed, in double.
  using C = std::conditional_t<general, double, A>;
  template <class X>
  using SumsOf = ThreadSums<Loss, X>;
  using Sums = SumsOf<C>;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kPerLoad = kPerWord16<T>;
  // 16-byte words that a thread asks for, and then works on, together.
  static constexpr int kLoads = 2;

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

  const RowArgs& args;
  const Plan& plan;
  const bool capped =
      std::is_same_v<Loss, SoftcappedCrossEntropy> || (Loss::kManyTargets && plan.capped);
  const bool cooling = general && (args.temperatures || args.temperature != 1);
  const bool soft = general && (args.probs || args.label_smoothing != 0);
  const Softcap<A> cap{capped ? args.softcap : 1.0};
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
    A y[1] = {x};
    map(r, y);
    return y[0];
  }
  // To what a softcap and a temperature make of them.
  template <int N>
  ML_FN void map(const Row& r, A (&y)[N]) const {
    if (capped) cap.apply(y);
    cool(r, y);
  }
  template <int N>
  ML_FN void cool(const Row& r, A (&y)[N]) const {
    if (cooling) {
#pragma unroll
      for (A& x : y) x = cooled(x, r.cool);
    }
  }

  // Whether every class has the same share of the target distribution's soft part.
  ML_FN static bool is_uniform(const Row& r) { return !r.class_weight && !r.probs; }
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

  // The column of number i of what is worked on together, of which the first is in column `at`.
  ML_FN static int column(int at, int i) {
    return at + i % kPerLoad + i / kPerLoad * kThreads * kPerLoad;
  }

  template <int N>
  ML_FN void push(const Row& r, SumsOf<A>* sums, const A (&x)[N], int at) const {
    if constexpr (Loss::kManyTargets) {
      A y[N];
#pragma unroll
      for (int i = 0; i < N; ++i) y[i] = x[i];
      map(r, y);
      sums->push(y);
    } else if constexpr (general) {
      if (args.stats) sums->beaten |= beats_target(r, x, at);
      A y[N];
#pragma unroll
      for (int i = 0; i < N; ++i) y[i] = x[i];
      map(r, y);
      sums->push(y, args.stats);
      if (soft && is_uniform(r)) {
        sums->push_uniform(y);
      } else if (soft) {
        constexpr int kWord = N < kPerLoad ? N : kPerLoad;
        const A share = uniform_in_units(args.probs, uniform);
#pragma unroll
        for (int word = 0; word < N; word += kWord) {
          A z[kWord], q[kWord];
#pragma unroll
          for (int i = 0; i < kWord; ++i) {
            z[i] = y[word + i];
            q[i] = soft_target_at(r, column(at, word + i), share);
          }
          sums->push_soft(z, q);
        }
      }
    } else {
      sums->push(x);
    }
  }

  // Whether one of them is larger than the target's logit, or as large and before it, or a NaN.
  template <int N>
  ML_FN static bool beats_target(const Row& r, const A (&x)[N], int at) {
    bool beats = false;
    if (at > r.target) {
#pragma unroll
      for (const A each : x) beats |= !(each <= r.own);
    } else if (column(at, N - 1) < r.target) {
#pragma unroll
      for (const A each : x) beats |= !(each < r.own);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        beats |= !(column(at, i) < r.target ? x[i] < r.own : x[i] <= r.own);
      }
    }
    return beats;
  }

  ML_FN Sums look(const Row& r, uint4* cache) const {
    // Log-probabilities that are not mapped have no other sums than these.
    if constexpr (std::is_same_v<SumsOf<A>, LogSumExp<A>> && sizeof(T) < 8) {
      if (!general || !(capped || cooling)) {
        Look<T, kThreads> look{r.x, r.n, rank(), cache, plan.cached};
        const LogSumExp<float> lse =
            !general && r.dx ? look.template run<true>() : look.template run<false>();
        return merge_team<kWarps>(Sums(lse), Align{});
      }
    }
    const Words16<T> span(r.x, r.n);
    const auto whole = [&](int i) { return i + (kLoads - 1) * kThreads < span.words; };
    SumsOf<A> sums;
    uint4 words[kLoads];
    int i = rank();
    if (whole(i)) ask(r, span, i, cache, words);
    while (whole(i)) {
      const int at = i;
      A x[kLoads * kPerLoad];
      keep(words, at, cache, x);
      i += kLoads * kThreads;
      if (whole(i)) ask(r, span, i, cache, words);  // they come while these are worked on
      push(r, &sums, x, span.head + at * kPerLoad);
    }
    for (; i < span.words; i += kThreads) {
      uint4 word[1];
      A x[kPerLoad];
      ask(r, span, i, cache, word);
      keep(word, i, cache, x);
      push(r, &sums, x, span.head + i * kPerLoad);
    }
    // What is left of the row is shorter than a warp's width: at most 7 and 7 elements.
    const int single = rank() < span.head ? rank() : span.tail() + rank() - span.head;
    if (single < r.n) {
      const A x[1] = {A(widen(r.x[single]))};
      push(r, &sums, x, single);
    }
    return merge_team<kWarps>(Sums(sums), Align{});
  }

  // Words i, i + kThreads and so on of the row: asks for them; and keeps those that are to be found
  // again.
  template <int kWords>
  ML_FN void ask(const Row& r, const Words16<T>& span, int i, const uint4* cache,
                 uint4 (&words)[kWords]) const {
    const int read_again = cache && r.dx ? plan.cached : INT_MAX;  // from here on, out of L2
#pragma unroll
    for (int u = 0; u < kWords; ++u) {
      const int k = i + u * kThreads;
      words[u] = k < read_again ? __ldcs(span.first + k) : span.first[k];
    }
  }
  template <int kWords>
  ML_FN void keep(const uint4 (&words)[kWords], int i, uint4* cache,
                  A (&x)[kWords * kPerLoad]) const {
#pragma unroll
    for (int u = 0; u < kWords; ++u) {
      const int k = i + u * kThreads;
      if (cache && k < plan.cached) cache[k] = words[u];
      unpack(words[u], x + u * kPerLoad, T{});
    }
  }

  // By one thread, in double.
  ML_FN void finish(const Row& r, const Sums& sums) const {
    const double own = logit(r, r.own);
    const TargetSums<double> wide = all_sums(sums);
    Loss::finish(r.token, wide, own, r.hard);
    if constexpr (general) {
      if (args.stats) Loss::finish_stats(r.token, wide);
    }
  }
  ML_FN TargetSums<double> all_sums(const Sums& sums) const {
    TargetSums<double> wide;
    wide.top = sums.top, wide.sum = sums.sum;
    if constexpr (Loss::kSlope) wide.entropy_sum = sums.entropy_sum;
    if constexpr (general && !Loss::kManyTargets) {
      wide = TargetSums<double>(sums);
      wide.soft_loss *= soft_unit(args.probs, uniform);
      wide.soft_mass = soft_mass_of(sums);
    }
    return wide;
  }

  // The sum of the target distribution.
  ML_FN A mass_of(const Row& r, const Sums& sums) const {
    if constexpr (general) return r.hard + soft_mass_of(sums);
    return r.hard;
  }
  ML_FN A soft_mass_of(const Sums& sums) const {
    return soft_unit(args.probs, uniform) * static_cast<A>(sums.soft_mass);
  }
};
