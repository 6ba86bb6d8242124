// SPDX-License-Identifier: BSD-3-Clause
// A loss of rows of logits, and its gradient, without ever holding a row of probabilities.
//
// A row is read once from memory: its second look, where the gradient (or a smoothed target, or a
// statistic) is wanted, finds it in the cache. A row is cut into fixed segments whose sums are
// merged in order, so that several threads can share a long row and still give the same bits.
// A masked row is never read; its gradient is set to zero.

template <class V, class A>
LogSumExp<A> lanes_added(const LogSumExp<V>& lanes, A top) {
  return {top, lane_sum(lanes.sum)};
}
template <class V, class A>
EntropySums<A> lanes_added(const EntropySums<V>& lanes, A top) {
  EntropySums<A> all;
  all.top = top, all.sum = lane_sum(lanes.sum), all.entropy_sum = lane_sum(lanes.entropy_sum);
  return all;
}

// mapped: the logits have a softcap or a temperature, which an inner loop should not have to ask.
template <class T, class Loss, bool mapped>
struct RowKernel {
  using V = VecOf<T>;
  using A = typename V::Scalar;
  using Sums = typename Loss::template Sums<A>;
  using Grad = typename Loss::template Grad<double>;

  const RowArgs& args;

  // One thread, whole rows.
  void run(int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end; ++row) {
      if (!active(row)) {
        masked(row);
        continue;
      }
      const Row r = row_at(row);
      const T* next = next_active(row, end);
      if (args.forward) {
        Sums all;
        for (int64_t j = 0; j < args.cols; j += kSegment) {
          append(&all, look(r, j, std::min(j + kSegment, args.cols), next));
        }
        finish(r, all);
      }
      if (args.dlogits) {
        const Grad g = grad_of(r);
        for (int64_t j = 0; j < args.cols; j += kSegment) {
          grad(r, g, j, std::min(j + kSegment, args.cols), args.forward ? nullptr : next);
        }
      }
    }
    if (args.stream) end_streams();
  }

  // Several threads on one row: each segment's sums, then (one thread) the row's, then each
  // segment's gradient.
  void run_look(int64_t row, int64_t segment, void* partial) const {
    if (!active(row)) return;
    const int64_t begin = segment * kSegment;
    const Row r = row_at(row);
    static_cast<Sums*>(partial)[segment] =
        look(r, begin, std::min(begin + kSegment, args.cols), r.x);
  }

  void run_finish(int64_t row, const void* partial) const {
    if (!active(row)) return masked_results(row);
    Sums all;
    for (int64_t i = 0; i * kSegment < args.cols; ++i) {
      append(&all, static_cast<const Sums*>(partial)[i]);
    }
    finish(row_at(row), all);
  }

  void run_grad(int64_t row, int64_t segment) const {
    const int64_t begin = segment * kSegment;
    const int64_t end = std::min(begin + kSegment, args.cols);
    if (active(row)) {
      const Row r = row_at(row);
      grad(r, grad_of(r), begin, end, r.x);
    } else {
      clear<V>(dlogits_of(row) + begin, end - begin, args.stream);
    }
    if (args.stream) end_streams();
  }

  // Rows

  struct Row {
    const T* x;
    T* dx;
    const T* probs;
    Token<A> token;
    int64_t target;  // the column of its class, or -1
    A hard;          // the hard part of its target distribution
    InverseTemperature<A> cool;
  };

  const A cap = static_cast<A>(args.softcap);
  const bool capped = mapped && args.softcap != 0;
  const bool cooling = mapped && (args.temperatures || args.temperature != 1);
  const A probs_scale = args.probs ? static_cast<A>(1 - args.label_smoothing) : A(0);
  const A uniform = static_cast<A>(args.label_smoothing / static_cast<double>(args.classes));
  const A* const class_weight =
      args.class_weight ? static_cast<const A*>(args.class_weight) + args.first : nullptr;

  Token<A> token(int64_t row) const { return {args, token_of(args, row, row % args.steps)}; }

  static_assert(int64_t{TokenField::kWeight} == LogProbField::kSum);
  bool active(int64_t row) const { return token(row).column(TokenField::kWeight) != 0; }

  void masked(int64_t row) const {
    if (args.forward) masked_results(row);
    if (args.dlogits) clear<V>(dlogits_of(row), args.cols, args.stream);
  }

  const T* logits_of(int64_t row) const {
    return static_cast<const T*>(args.logits) + (row / args.steps) * args.batch_stride +
           (row % args.steps) * args.step_stride;
  }

  T* dlogits_of(int64_t row) const {
    return static_cast<T*>(args.dlogits) + (row / args.steps) * args.grad_batch_stride +
           (row % args.steps) * args.grad_step_stride;
  }

  Row row_at(int64_t row) const {
    Row r{logits_of(row),
          args.dlogits ? dlogits_of(row) : nullptr,
          args.probs ? static_cast<const T*>(args.probs) + row * args.cols : nullptr,
          token(row),
          -1,
          A(0),
          InverseTemperature<A>(mapped ? token(row).temperature() : 1)};
    if constexpr (!Loss::kManyTargets) {
      if (args.probs) return r;
      const int64_t target = index_at(args.target, args.target_type, r.token.index);
      r.target = target - args.first;
      r.hard = Loss::template hard<A>(args, target);
    }
    return r;
  }

  // The row to fetch ahead after `row`: a masked one is not.
  const T* next_active(int64_t row, int64_t end) const {
    for (int64_t i = row + 1; i < end; ++i) {
      if (active(i)) return logits_of(i);
    }
    return logits_of(row);
  }

  ML_FN V logit(const Row& r, V raw) const {
    if constexpr (mapped) {
      if (capped) raw = softcap(raw, V(cap));
      if (cooling) raw = cooled(raw, r.cool);
    }
    return raw;
  }

  // Through the vector's functions: another tanh's last bit would tell the target from its equals.
  A logit_at(const Row& r, int64_t j) const {
    if constexpr (!mapped) return A(widen(r.x[j]));
    return lane_sum(keep(logit(r, load<V>(r.x + j, Part{1})), Part{1}, A(0)));
  }

  A slope_at(const Row& r, int64_t j) const {
    if (!capped) return A(1);
    const V slope = softcap_slope(load<V>(r.x + j, Part{1}), V(cap));
    return lane_sum(keep(slope, Part{1}, A(0)));
  }

  template <class Count>
  ML_FN V soft_target_at(const Row& r, int64_t j, Count count, A share) const {
    return soft_target(class_weight ? load<V>(class_weight + j, count) : V(1),
                       r.probs ? load<V>(r.probs + j, count) : V(0), V(probs_scale), V(share));
  }

  A soft_target_at(const Row& r, int64_t j) const {
    return soft_target(class_weight ? class_weight[j] : A(1), r.probs ? A(widen(r.probs[j])) : A(0),
                       probs_scale, uniform);
  }

  // Looks

  Sums look(const Row& r, int64_t begin, int64_t end, const T* next) const {
    Sums all;
    for_each_run<V>(begin, end, 1024,
                    [&](int64_t b, int64_t e) { append(&all, look_at_run(r, b, e, next)); });
    return all;
  }

  // The first is taken as it is: merged into nothing it is the same, later.
  static void append(Sums* all, const Sums& next) {
    if (all->sum == 0) {
      *all = next;
    } else {
      merge(all, next);
    }
  }

  Sums look_at_run(const Row& r, int64_t begin, int64_t end, const T* next) const {
    constexpr int kBlock = V::kBlock;
    constexpr int64_t kStep = kBlock * V::kLanes;
    const T* const x = r.x;
    typename Loss::template Sums<V> lanes;
    int64_t j = begin;
    fetch_ahead(x, next, args.cols, j, end, [&](int64_t to, const T* fetched) {
      for (; j + kStep <= to; j += kStep, fetched += kStep) {
        V y[kBlock];
        for (int i = 0; i < kBlock; i += 2) {
          prefetch<V>(fetched + i * V::kLanes);
          V::load2(x + j + i * V::kLanes, y[i], y[i + 1]);
          y[i] = logit(r, y[i]), y[i + 1] = logit(r, y[i + 1]);
        }
        lanes.push(y);
      }
    });
    for_each_vector<V>(j, end, [&](int64_t i, auto count) {
      const V y[1] = {
          keep(logit(r, load<V>(x + i, count)), count, -std::numeric_limits<A>::infinity())};
      lanes.push(y);
    });
    const A top = lane_max(lanes.top);
    lanes.raise(V(top));
    return lanes_added(lanes, top);
  }

  // From the first look's sums to what the token table keeps of them, or to what a shard tells.
  void finish(const Row& r, const Sums& sums) const {
    if (args.part) return tell(r, sums);
    if constexpr (Loss::kManyTargets) {
      Loss::finish(r.token, sums);
      const double log_sum = log(static_cast<double>(sums.sum));
      for (int64_t k = 0; k < args.ids; ++k) {
        const int64_t id = r.token.id(k);
        const bool ignored = id == args.ignore_index;
        const double y = ignored ? 0 : logit_at(r, id - args.first);
        r.token.log_prob(k) = ignored ? A(0) : static_cast<A>(Loss::log_prob(y, sums.top, log_sum));
      }
    } else {
      finish_loss(r, sums);
    }
  }

  void masked_results(int64_t row) const {
    if (args.part) return;
    const Token<A> t = token(row);
    Loss::finish_masked(t);
    for (int64_t k = 0; Loss::kManyTargets && k < args.ids; ++k) t.log_prob(k) = 0;
  }

  void finish_loss(const Row& r, const Sums& sums) const {
    TargetSums<double> all = all_sums(r, sums);
    Loss::finish(r.token, all, r.target >= 0 ? logit_at(r, r.target) : A(0), r.hard);
    if (!args.stats) return;
    all.beaten = has_nan(r, sums) || r.target < 0 || !is_argmax(r);
    Loss::finish_stats(r.token, all);
  }

  void tell(const Row& r, const Sums& sums) const {
    ShardSums all;
    if constexpr (Loss::kManyTargets) {
      all.top = sums.top, all.sum = sums.sum;
      if constexpr (Loss::kSlope) all.entropy_sum = sums.entropy_sum;
    } else {
      all = ShardSums(all_sums(r, sums));
      if (args.stats) all.best = best(r, sums);
    }
    write_shard(r.token, all);
    for (int64_t k = 0; k < args.ids; ++k) {
      const int64_t j = r.token.id(k) - args.first;
      if (is_here(j)) write_id(r.token, k, logit_at(r, j));
    }
  }

  bool is_here(int64_t column) const { return 0 <= column && column < args.cols; }

  // As ShardSums has it.
  double best(const Row& r, const Sums& sums) const {
    const double none = std::numeric_limits<double>::quiet_NaN();
    if (has_nan(r, sums)) return none;
    if (is_here(r.target)) return is_argmax(r) ? A(widen(r.x[r.target])) : none;
    double largest = -std::numeric_limits<double>::infinity();
    for (int64_t j = 0; j < args.cols; ++j) largest = std::max<double>(largest, widen(r.x[j]));
    return largest;
  }

  // With what a second look adds to a loss of one target.
  TargetSums<double> all_sums(const Row& r, const Sums& sums) const {
    TargetSums<double> all;
    all.top = sums.top, all.sum = sums.sum;
    if constexpr (Loss::kSoft) {
      const A unit = soft_unit(args.probs, uniform), share = uniform_in_units(args.probs, uniform);
      double soft[2] = {0, 0};
      add_up<V>(args.cols, soft, [&](int64_t j, auto count, V(&terms)[2]) {
        terms[1] = soft_target_at(r, j, count, share);
        terms[0] = terms[1] * (V(sums.top) - logit(r, load<V>(r.x + j, count)));
      });
      all.soft_loss = unit * soft[0], all.soft_mass = unit * static_cast<A>(soft[1]);
    }
    if (!args.stats) return all;
    double spread[1] = {0};
    add_up<V>(args.cols, spread, [&](int64_t j, auto count, V(&terms)[1]) {
      const V y = logit(r, load<V>(r.x + j, count));
      terms[0] = entropy_term(exp(y - V(sums.top)), y, V(sums.top));
    });
    all.entropy_sum = spread[0];
    return all;
  }

  // A NaN is the argmax of its row, and makes the sum one too.
  bool has_nan(const Row& r, const Sums& sums) const {
    return sums.sum != sums.sum && std::any_of(r.x, r.x + args.cols, is_nan);
  }

  // argmax of the logits = target, where the first of equal logits wins.
  bool is_argmax(const Row& r) const {
    const A own = A(widen(r.x[r.target]));
    const A lowest = -std::numeric_limits<A>::infinity();
    if (own != own || (own == lowest && r.target > 0)) return false;
    const A below_own = std::nextafter(own, lowest);
    return !any_above(r.x, 0, r.target, below_own) && !any_above(r.x, r.target + 1, args.cols, own);
  }

  static bool is_nan(T x) { return widen(x) != widen(x); }

  static bool any_above(const T* x, int64_t begin, int64_t end, A bound) {
    bool found = false;
    for (; begin + V::kLanes <= end && !found; begin += V::kLanes) {
      found = any_greater(V::load(x + begin), V(bound));
    }
    for (; begin < end && !found; ++begin) found = A(widen(x[begin])) > bound;
    return found;
  }

  // The gradient

  Grad grad_of(const Row& r) const {
    Grad g;
    if constexpr (Loss::kManyTargets) {
      g = Loss::grad(r.token);
    } else {
      const Token<A>& t = r.token;
      const LogSumExp<double> lse(t.column(TokenField::kTop), t.column(TokenField::kSum));
      double scale = static_cast<double>(t.column(TokenField::kWeight)) * t.upstream(0);
      if (cooling) scale /= t.temperature();
      g = Loss::grad(t, scale, lse, double{t.column(TokenField::kTargetMass)});
    }
    // The vectors' rounding to bf16 takes no NaN with low bits, which a carry could make infinite.
    if (g.alpha != g.alpha) g.alpha = std::numeric_limits<A>::quiet_NaN();
    if (g.beta != g.beta) g.beta = std::numeric_limits<A>::quiet_NaN();
    return g;
  }

  A top_of(const Row& r) const {
    return r.token.column(Loss::kManyTargets ? int64_t{LogProbField::kTop} : TokenField::kTop);
  }

  // The derivatives at the targets in [begin, end), to be computed before the row is overwritten,
  // and written after.
  struct OneTarget {
    int64_t column;
    A derivative;

    OneTarget(const RowKernel& kernel, const Row& r, const Grad& g, int64_t begin, int64_t end)
        : column(begin <= r.target && r.target < end ? r.target : -1) {
      if (column < 0) return;
      // Added up in A, as the row's mass was: of one class alone nothing must be left.
      const A q = r.hard + (Loss::kSoft ? kernel.soft_target_at(r, column) : A(0));
      const double y = kernel.logit_at(r, column), top = kernel.top_of(r);
      const double d = Loss::target_grad(y, top, double{q}, g);
      derivative = static_cast<A>(kernel.slope_at(r, column) * d);
    }
    void write(T* dx) const {
      if (column >= 0) narrow(derivative, dx + column);
    }
  };
  struct ManyTargets : Ids<A> {
    const int64_t begin, end;

    ManyTargets(const RowKernel& kernel, const Row& r, const Grad& g, int64_t begin, int64_t end)
        : Ids<A>(r.token), begin(begin), end(end) {
      for (int64_t k = 0; k < this->count; ++k) {
        const int64_t j = this->column[k];
        if (j < begin || j >= end) continue;
        const double own = this->total_of(k) / r.token.temperature();
        const double d = Loss::target_grad(kernel.logit_at(r, j), kernel.top_of(r), g, own);
        this->derivative[k] = static_cast<A>(kernel.slope_at(r, j) * d);
      }
    }
    void write(T* dx) const {
      for (int64_t k = 0; k < this->count; ++k) {
        const int64_t j = this->column[k];
        if (begin <= j && j < end) narrow(this->derivative[k], dx + j);
      }
    }
  };
  using Targets = std::conditional_t<Loss::kManyTargets, ManyTargets, OneTarget>;

  // Of [begin, end) of a row. Where `next` is none, the row was read just now.
  void grad(const Row& r, const Grad& g, int64_t begin, int64_t end, const T* next) const {
    const V top(top_of(r));
    const T* const x = r.x;
    T* const dx = r.dx;
    const RowGrad<V> of_lanes{V(static_cast<A>(g.alpha)), V(static_cast<A>(g.beta)),
                              V(static_cast<A>(g.gamma))};
    const Targets targets(*this, r, g, begin, end);
    const auto of_raw = [&](V raw, V q) {
      V y = raw, rest(1);
      if constexpr (mapped) {
        if (capped) y = softcap(raw, V(cap)), rest = tanh_rest(raw / V(cap));
        if (cooling) y = cooled(y, r.cool);
      }
      const V d = gradient_term<Loss>(y, top, of_lanes, q);
      if constexpr (mapped) return d * tanh_slope(rest);
      return d;
    };
    const auto at = [&](int64_t j, auto count) {
      return of_raw(load<V>(x + j, count),
                    Loss::kSoft ? soft_target_at(r, j, count, uniform) : V(0));
    };
    int64_t j = begin;
    if constexpr (!Loss::kSoft) {
      const bool stream = args.stream && dx != x;
      if (stream) j = std::min(end, j + elements_to_line(dx + j));
      for (int64_t i = begin; i < j; i += V::kLanes) {
        const Part part{static_cast<int>(std::min<int64_t>(V::kLanes, j - i))};
        store(at(i, part), dx + i, part);
      }
      const auto pairs_to = [&](int64_t to, auto fetch) {
        for (; j + 2 * V::kLanes <= to; j += 2 * V::kLanes) {
          fetch();
          V a, b;
          V::load2(x + j, a, b);
          a = of_raw(a, V(0)), b = of_raw(b, V(0));
          stream ? V::stream2(dx + j, a, b) : V::store2(dx + j, a, b);
        }
      };
      if (next) {
        fetch_ahead(x, next, args.cols, j, end, [&](int64_t to, const T* fetched) {
          pairs_to(to, [&] { prefetch<V>(fetched), fetched += 2 * V::kLanes; });
        });
      } else {
        pairs_to(end, [] {});
      }
    }
    for_each_vector<V>(j, end, [&](int64_t i, auto count) { store(at(i, count), dx + i, count); });
    targets.write(dx);
  }
};

// The loss, and whether logits are mapped, are template arguments.
template <class T, class Loss, class F>
void with_mapping(const RowArgs& args, const F& f) {
  const bool mapped = args.softcap != 0 || args.temperatures || args.temperature != 1;
  mapped ? f(RowKernel<T, Loss, true>{args}) : f(RowKernel<T, Loss, false>{args});
}
template <class T, class F>
void with_loss(const RowArgs& args, const F& f) {
  if (args.loss == RowLoss::kLogProbs) {
    // The entropy itself, what a shard tells of it, or its gradient.
    const bool with_entropy = args.results[1] || args.stats || args.upstream[1].values;
    return with_entropy ? with_mapping<T, LogProbs<true>>(args, f)
                        : with_mapping<T, LogProbs<false>>(args, f);
  }
  const bool soft = args.probs || args.label_smoothing != 0;
  soft ? with_mapping<T, CrossEntropy<true>>(args, f)
       : with_mapping<T, CrossEntropy<false>>(args, f);
}

template <class T>
constexpr RowKernels row_kernels() {
  return {
      [](const RowArgs& args, int64_t begin, int64_t end) {
        with_loss<T>(args, [&](const auto& rows) { rows.run(begin, end); });
      },
      [](const RowArgs& args, int64_t row, int64_t segment, void* partial) {
        with_loss<T>(args, [&](const auto& rows) { rows.run_look(row, segment, partial); });
      },
      [](const RowArgs& args, int64_t row, const void* partial) {
        with_loss<T>(args, [&](const auto& rows) { rows.run_finish(row, partial); });
      },
      [](const RowArgs& args, int64_t row, int64_t segment) {
        with_loss<T>(args, [&](const auto& rows) { rows.run_grad(row, segment); });
      },
  };
}

constexpr Kernels make_kernels(const char* name) {
  return {name,
          {row_kernels<double>(), row_kernels<float>(), row_kernels<BFloat16>(),
           row_kernels<Float16>()},
          divergence_rows};
}
