// SPDX-License-Identifier: BSD-3-Clause
// Cross entropy of rows of logits, and its gradient, without ever holding a row of probabilities.
//
// A team (one warp, or a whole block) works on a row, or on a part of it where rows are few. It
// reads the row once from memory; for the gradient it looks at it again, in shared memory as far as
// that reaches, beyond that in L2. A masked row is never read; its gradient is set to zero.
// Included inside a file's own namespace, after math.inl.h.

template <class T, bool kGeneral, int kWarps>
struct Rows {
  using A = typename Accumulation<T>::Type;
  using Lse = LogSumExp<A>;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kVector = kLanes<T>;
  // 16-byte loads that a thread has in flight. What hides the latency of an H200's memory at its
  // full speed is some 32 KB on a multiprocessor: 512 threads with four each.
  static constexpr int kAhead = kGeneral || sizeof(T) == 8 ? 2 : 4;
  static constexpr int kGradAhead = sizeof(T) == 4 ? 2 : kAhead;  // expf wants the registers
  static constexpr int kShiftedAhead = sizeof(T) == 2 ? 1 : 2;    // two pieces for each

  // What a look at a row tells: its logsumexp; in general also the sums over a soft target
  // distribution, the entropy, and whether another logit wins against the target's.
  struct PlainSums : Lse {
    ML_FN void add(const PlainSums& other) { this->sum = this->sum + other.sum; }
    ML_FN Lse logsumexp() const { return *this; }
  };
  struct GeneralSums : RowSums<A> {
    int beaten = 0;
    ML_FN void add(const GeneralSums& other) {
      RowSums<A>::add(other);
      beaten |= other.beaten;
    }
    ML_FN Lse logsumexp() const { return this->lse; }
  };
  using Sums = std::conditional_t<kGeneral, GeneralSums, PlainSums>;

  // Lanes agree on the largest top first, and then only add: each is rescaled, and rounded, once.
  struct Align {
    template <int kLaneCount>
    ML_FN void lanes(Sums* sums) const {
      A top = sums->logsumexp().top;
#pragma unroll
      for (int mask = kLaneCount / 2; mask > 0; mask /= 2) top = max(top, from_lane_xor(top, mask));
      sums->raise(top);
    }
  };

  struct Partial {
    Sums sums;
    A own;
  };
  static_assert(sizeof(Partial) <= kPartialBytes, "scratch memory is allocated by it");

  const CrossEntropyArgs& args;
  const Plan& plan;
  const bool capped = kGeneral && args.softcap != 0;
  const bool soft = kGeneral && (args.probs || args.label_smoothing != 0);
  const A cap = static_cast<A>(args.softcap);
  const A inverse_cap = capped ? 1 / cap : A(0);
  const A hard_scale = static_cast<A>(1 - args.label_smoothing);
  const A probs_scale = args.probs ? hard_scale : A(0);
  const A uniform = static_cast<A>(args.label_smoothing / static_cast<double>(args.cols));

  // One row, from column `begin` on; x, dx and probs begin there, and target counts from there.
  struct Row {
    const T* x;
    T* dx;
    const T* probs;
    const A* class_weight;
    int64_t token;
    int64_t label;  // its target; of a masked token anything
    int n;          // columns
    int target;     // its column; -1 or INT_MAX where it lies in a part before or after this one
    A own;          // its logit, wherever it lies
    A hard;
    A weight;
  };

  ML_FN static int rank() { return static_cast<int>(threadIdx.x % kThreads); }

  ML_FN A* field(int64_t which, int64_t token) const {
    return static_cast<A*>(args.tokens) + which * args.rows + token;
  }

  ML_FN A logit(A x) const { return capped ? softcap(x, cap, inverse_cap) : x; }

  ML_FN A soft_target_at(const Row& r, int j) const {
    return soft_target(r.class_weight ? r.class_weight[j] : A(1),
                       r.probs ? A(widen(r.probs[j])) : A(0), probs_scale, uniform);
  }

  ML_FN Row row_at(int64_t row, int64_t part) const {
    const int64_t begin = part * plan.width;
    const int64_t batch = quotient(row, args.steps), step = row - batch * args.steps;
    const bool last = step == args.steps - 1;  // with shift it scores nothing: a masked token
    Row r;
    r.token = !args.shift ? row : last ? row - step : row + 1;
    r.n = static_cast<int>(min(plan.width, args.cols - begin));
    r.x = static_cast<const T*>(args.logits) + batch * args.batch_stride + step * args.step_stride +
          begin;
    r.dx = args.dlogits ? static_cast<T*>(args.dlogits) + batch * args.grad_batch_stride +
                              step * args.grad_step_stride + begin
                        : nullptr;
    r.probs = args.probs ? static_cast<const T*>(args.probs) + row * args.cols + begin : nullptr;
    const A* const weights = static_cast<const A*>(args.class_weight);
    r.class_weight = weights ? weights + begin : nullptr;
    r.target = -1;
    r.own = r.hard = A(0);
    // Together: the target's logit must not wait for one after the other, and the row's first loads
    // come after it.
    r.label = args.probs ? 0 : index_at(args.target, args.target_type, r.token);
    r.weight = *field(TokenField::kWeight, r.token);
    return r;
  }

  // Of an active row.
  ML_FN void find_target(Row* r, int64_t part, bool with_logit) const {
    if (args.probs) return;
    const int64_t at = r->label - part * plan.width;
    r->target = at < 0 ? -1 : at < r->n ? static_cast<int>(at) : INT_MAX;
    const A* const weights = static_cast<const A*>(args.class_weight);
    r->hard = hard_scale * (weights ? weights[r->label] : A(1));
    if (with_logit) r->own = A(widen(r->x[at]));
  }

  // One look at a row

  template <int N>
  ML_FN void push(const Row& r, Sums* sums, const A (&x)[N], int at) const {
    if constexpr (kGeneral) {
      A y[N];
#pragma unroll
      for (int i = 0; i < N; ++i) y[i] = logit(x[i]);
      sums->push(y);
      if (soft) {
#pragma unroll
        for (int i = 0; i < N; ++i) sums->push_target(y[i], soft_target_at(r, at + i));
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
    const Span<T> span(r.x, r.n);
    const int read_again = r.dx ? plan.cached : INT_MAX;  // from here on, out of L2
    Sums sums;
    for (int i = rank(); i < span.pieces; i += kAhead * kThreads) {
      uint4 pieces[kAhead];
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const int k = i + u * kThreads;
        pieces[u] = minus_infinities<T>();
        if (k < span.pieces) {
          pieces[u] = k < read_again ? __ldcs(span.first + k) : span.first[k];
        }
      }
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const int k = i + u * kThreads;
        if (k < plan.cached && k < span.pieces) cache[k] = pieces[u];
        A x[kVector];
        unpack(pieces[u], x, T{});
        if (!kGeneral || k < span.pieces) push(r, &sums, x, span.head + k * kVector);
      }
    }
    // What is left of the row is shorter than a warp's width: at most 7 and 7 elements.
    const int single = rank() < span.head ? rank() : span.tail() + rank() - span.head;
    if (single < r.n) {
      const A x[1] = {A(widen(r.x[single]))};
      push(r, &sums, x, single);
    }
    return merge_team<kWarps>(sums, Align{});
  }

  // From a row's sums to what the token table keeps of it, by one thread. In double: a handful of
  // operations, of which a smoothed loss would show every rounding.
  ML_FN void finish(const Row& r, const Sums& sums) const {
    const Lse lse = sums.logsumexp();
    const LogSumExp<double> wide(lse.top, lse.sum);
    double loss = 0;
    if (!args.probs) loss = hard_loss<double>(wide, logit(r.own), r.hard);
    if constexpr (kGeneral) {
      if (soft) loss += soft_loss<double>(wide, sums.below, sums.mass);
      if (args.stats) {
        *field(TokenField::kEntropy, r.token) = entropy(sums.lse.sum, sums.spread);
        *field(TokenField::kCorrect, r.token) = !args.probs && r.own == r.own && !sums.beaten;
      }
    }
    *field(TokenField::kLoss, r.token) = static_cast<A>(loss);
    *field(TokenField::kTop, r.token) = lse.top;
    *field(TokenField::kSum, r.token) = lse.sum;
    *field(TokenField::kMass, r.token) = mass_of(r, sums);
  }

  // The sum of the target distribution.
  ML_FN A mass_of(const Row& r, const Sums& sums) const {
    if constexpr (kGeneral) return soft ? r.hard + sums.mass : r.hard;
    return r.hard;
  }

  ML_FN void finish_masked(int64_t token) const {
    *field(TokenField::kLoss, token) = 0;
    *field(TokenField::kTop, token) = 0;
    *field(TokenField::kSum, token) = 1;
    *field(TokenField::kMass, token) = 0;
    if (args.stats) {
      *field(TokenField::kEntropy, token) = 0;
      *field(TokenField::kCorrect, token) = 0;
    }
  }

  // The gradient

  // What the loops need of a LogitGrad: the target's own derivative is computed before them.
  struct RowGrad {
    A top, softmax, soft, target;
  };

  ML_FN RowGrad grad_of(const Row& r, const Lse& lse, A mass) const {
    const double* group = args.groups + quotient(r.token, args.group_size) * GroupField::kCount;
    const A* dloss = static_cast<const A*>(args.dloss);
    const A scale = r.weight * (dloss ? dloss[args.dloss_per_token ? r.token : 0] : A(1));
    const LogitGrad<A> g = logit_grad(lse, mass, r.hard, static_cast<A>(args.z_loss),
                                      static_cast<A>(scale * group[GroupField::kScaleLoss]),
                                      static_cast<A>(scale * group[GroupField::kScaleZ]));
    const bool here = 0 <= r.target && r.target < r.n;
    const A q = r.hard + (here && soft ? soft_target_at(r, r.target) : A(0));
    return {lse.top, g.softmax, g.soft, target_grad(logit(r.own), lse.top, q, g)};
  }

  template <int N>
  ML_FN void differentiate(const Row& r, const RowGrad& g, int at, A (&x)[N]) const {
    A d[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (capped) x[i] = tanh(x[i] * inverse_cap);  // what the slope needs, to its last digit
      d[i] = softmax_grad(capped ? cap * x[i] : x[i], g.top, g.softmax);
    }
    if (soft) {
#pragma unroll
      for (int i = 0; i < N; ++i) d[i] = d[i] - g.soft * soft_target_at(r, at + i);
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

  ML_FN void store(uint4* p, const uint4& piece) const {
    if (args.stream) {
      __stcs(p, piece);
    } else {
      *p = piece;
    }
  }

  // Pieces [begin, end) of dx from the pieces of x that lie `apart` from them, kept or not.
  // kShifted: between two of those. Every thread writes only what it has read: dx may be x.
  template <bool kShifted, int kUnroll>
  ML_FN void differentiate_pieces(const Row& r, const RowGrad& g, const Span<T>& in,
                                  const Span<T>& out, int begin, int end, int apart,
                                  int shift_bytes, const uint4* cache) const {
    uint4* const to = reinterpret_cast<uint4*>(r.dx + out.head);
    const auto piece = [&](int k) { return k < plan.cached ? cache[k] : __ldcs(in.first + k); };
    for (int i = begin + rank(); i < end; i += kUnroll * kThreads) {
      uint4 pieces[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int k = i + u * kThreads;
        if (k < end) {
          pieces[u] = piece(k + apart);
          if constexpr (kShifted) {
            pieces[u] = between(pieces[u], piece(k + apart + 1), shift_bytes);
          }
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int k = i + u * kThreads;
        if (k < end) {
          A x[kVector];
          unpack(pieces[u], x, T{});
          differentiate(r, g, out.head + k * kVector, x);
          store(to + k, pack(x, T{}));
        }
      }
    }
  }

  ML_FN void grad(const Row& r, const RowGrad& g, const uint4* cache) const {
    const Span<T> in(r.x, r.n), out(r.dx, r.n);
    // Piece k of dx begins with element out.head + k * kVector, and that is `shift` elements after
    // the beginning of piece k + apart of x.
    const int apart = out.head < in.head ? -1 : 0;
    const int shift = out.head - in.head - apart * kVector;
    const int begin = min(-apart, out.pieces);
    const int end = max_of(begin, min(out.pieces, in.pieces - apart - (shift != 0)));
    if (shift == 0) {
      differentiate_pieces<false, kGradAhead>(r, g, in, out, 0, end, 0, 0, cache);
    } else {
      differentiate_pieces<true, kShiftedAhead>(r, g, in, out, begin, end, apart,
                                                shift * static_cast<int>(sizeof(T)), cache);
    }
    const int head = out.head + begin * kVector, tail = out.head + end * kVector;
    for (int j = rank(); j < head + r.n - tail; j += kThreads) {
      const int at = j < head ? j : tail + j - head;
      A x[1] = {A(widen(r.x[at]))};
      differentiate(r, g, at, x);
      narrow(x[0], r.dx + at);
    }
  }

  ML_FN static int max_of(int a, int b) { return a > b ? a : b; }

  ML_FN void clear(const Row& r) const {
    const Span<T> out(r.dx, r.n);
    uint4* const to = reinterpret_cast<uint4*>(r.dx + out.head);
    for (int k = rank(); k < out.pieces; k += kThreads) store(to + k, uint4{0, 0, 0, 0});
    const int single = rank() < out.head ? rank() : out.tail() + rank() - out.head;
    if (single < r.n) narrow(A(0), r.dx + single);
  }

  ML_FN void masked(const Row& r, int64_t part) const {
    if (plan.phase == Phase::kPartial) return;
    if (args.forward && part == 0 && rank() == 0) finish_masked(r.token);
    if (r.dx) clear(r);
  }

  // One part of one row, or all of it.
  ML_FN void run(int64_t row, int64_t part, uint4* cache) const {
    Row r = row_at(row, part);
    if (r.weight == A(0)) return masked(r, part);
    if (!args.forward) {
      find_target(&r, part, true);  // of dx = x, only by the thread that writes it
      const Lse lse(*field(TokenField::kTop, r.token), *field(TokenField::kSum, r.token));
      grad(r, grad_of(r, lse, *field(TokenField::kMass, r.token)), cache);
      return;
    }
    Sums sums;
    A own;
    if (plan.phase == Phase::kFinish) {
      const Partial* const partials = static_cast<Partial*>(args.scratch) + row * plan.parts;
      for (int64_t i = rank(); i < plan.parts; i += kThreads) {
        Sums other = partials[i].sums;
        const A top = max(sums.logsumexp().top, other.logsumexp().top);
        sums.raise(top);
        other.raise(top);
        sums.add(other);
      }
      sums = merge_team<kWarps>(sums, Align{});
      own = partials[0].own;
    } else {
      find_target(&r, part, true);  // its logit before anything is written: dx may be x
      own = r.own;
      sums = look(r, cache);
    }
    // What was known of the row is found again, rather than kept in registers meanwhile.
    row = forgotten(row);
    if (plan.phase == Phase::kPartial) {
      Partial* const partials = static_cast<Partial*>(args.scratch) + row * plan.parts;
      if (rank() == 0) partials[part] = {sums, own};
    } else {
      r = row_at(row, part);
      find_target(&r, part, false);
      r.own = own;
      if (part == 0 && rank() == 0) finish(r, sums);
      const Lse lse = sums.logsumexp();
      if (r.dx) grad(r, grad_of(r, lse, mass_of(r, sums)), cache);
    }
    // The next row's states and pieces go where this one's may still be read.
    team_barrier<kWarps>();
  }
};

// Registers for two blocks of 512 threads on a multiprocessor, or as many threads in smaller ones.
template <class T, bool kGeneral, int kWarps>
__global__ void __launch_bounds__(kWarps == 16 ? 512 : 128, kGeneral || sizeof(T) == 8
                                                                ? (kWarps == 16 ? 1 : 4)
                                                                : (kWarps == 16 ? 2 : 8))
    rows_kernel(const CrossEntropyArgs args, const Plan plan) {
  using A = typename Accumulation<T>::Type;
  if (plan.unless_one && *static_cast<const A*>(args.dloss) == A(1)) return;
  const Rows<T, kGeneral, kWarps> rows{args, plan};
  const int teams = static_cast<int>(blockDim.x) / (kWarps * kWarp);
  const int team = static_cast<int>(threadIdx.x) / (kWarps * kWarp);
  uint4* const cache = shared_memory + team * plan.cached;
  // The first part alone finishes a row that has no gradient.
  const bool all_parts = args.dlogits || plan.phase == Phase::kPartial;
  const int64_t parts = all_parts ? plan.parts : 1, items = args.rows * parts;
  for (int64_t i = int64_t{blockIdx.x} * teams + team; i < items; i += int64_t{gridDim.x} * teams) {
    const int64_t row = quotient(i, parts);
    rows.run(row, i - row * parts, cache);
  }
}

template <class T, bool kGeneral>
void launch_team(const CrossEntropyArgs& args, const Plan& plan, Stream stream) {
  const int64_t items = args.rows * plan.parts;
  int64_t blocks = (items + plan.teams - 1) / plan.teams;
  if (plan.unless_one) blocks = std::min(blocks, plan.blocks);  // there is hardly ever work
  const int threads = plan.warps * plan.teams * kWarp;
  const int64_t shared = int64_t{plan.cached} * plan.teams * 16;
  auto kernel = rows_kernel<T, kGeneral, 4>;
  if constexpr (sizeof(T) < 8) {
    if (plan.warps == 1) kernel = rows_kernel<T, kGeneral, 1>;
    if (plan.warps == 16) kernel = rows_kernel<T, kGeneral, 16>;
  }
  launch(kernel, blocks, threads, shared, stream, args, plan);
}

template <class T>
void launch_rows(const CrossEntropyArgs& args, const Plan& plan, Stream stream) {
  plan.general ? launch_team<T, true>(args, plan, stream)
               : launch_team<T, false>(args, plan, stream);
}
