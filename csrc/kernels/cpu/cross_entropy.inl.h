// SPDX-License-Identifier: BSD-3-Clause
// Cross entropy of rows of logits, and its gradient, without ever holding a row of probabilities.
//
// A row is read once from memory: its second look, where the gradient (or a smoothed target, or a
// statistic) is wanted, finds it in the cache. A row is cut into fixed segments whose logsumexps
// are merged in order, so that several threads can share a long row and still give the same bits.
// A masked row is never read; its gradient is set to zero.

// A full vector, or the first n lanes of one.
struct Full {};
struct Part {
  int n;
};
template <class V, class T>
ML_FN V load(const T* p, Full) {
  return V::load(p);
}
template <class V, class T>
ML_FN V load(const T* p, Part part) {
  return V::load(p, part.n);
}
template <class V, class T>
ML_FN void store(V v, T* p, Full) {
  v.store(p);
}
template <class V, class T>
ML_FN void store(V v, T* p, Part part) {
  v.store(p, part.n);
}
template <class V>
ML_FN V keep(V v, Full, typename V::Scalar) {
  return v;
}
template <class V>
ML_FN V keep(V v, Part part, typename V::Scalar fill) {
  return keep(v, part.n, fill);
}

// f(j, Full or Part) over [begin, end).
template <class V, class F>
ML_FN void for_each_vector(int64_t begin, int64_t end, const F& f) {
  for (; begin + V::kLanes <= end; begin += V::kLanes) f(begin, Full{});
  if (begin < end) f(begin, Part{static_cast<int>(end - begin)});
}

template <class T, bool kCapped, bool kSoft>
struct Rows {
  using V = VecOf<T>;
  using A = typename V::Scalar;
  using Lse = LogSumExp<A>;

  const CrossEntropyArgs& args;
  const A cap = static_cast<A>(args.softcap);
  const A inverse_cap = kCapped ? 1 / cap : A(0);
  const A z_loss = static_cast<A>(args.z_loss);
  const A hard_scale = static_cast<A>(1 - args.label_smoothing);
  const A probs_scale = args.probs ? hard_scale : A(0);
  const A uniform = static_cast<A>(args.label_smoothing / static_cast<double>(args.cols));
  const A* const class_weight = static_cast<const A*>(args.class_weight);

  struct Row {
    const T* x;
    T* dx;
    const T* probs;
    int64_t token;   // the token that this row of logits scores
    int64_t target;  // its class, or -1
    A hard;          // the hard part of its target distribution
  };

  A* field(int64_t which, int64_t token) const {
    return static_cast<A*>(args.tokens) + which * args.rows + token;
  }

  int64_t token_of(int64_t row) const {
    if (!args.shift) return row;
    const bool last = row % args.steps == args.steps - 1;
    return last ? row - (args.steps - 1) : row + 1;  // the last scores nothing: a masked token
  }

  bool active(int64_t row) const { return *field(TokenField::kWeight, token_of(row)) != 0; }

  const T* logits_of(int64_t row) const {
    return static_cast<const T*>(args.logits) + (row / args.steps) * args.batch_stride +
           (row % args.steps) * args.step_stride;
  }

  T* dlogits_of(int64_t row) const {
    return static_cast<T*>(args.dlogits) + (row / args.steps) * args.grad_batch_stride +
           (row % args.steps) * args.grad_step_stride;
  }

  Row row_at(int64_t row) const {
    Row r;
    r.x = logits_of(row);
    r.dx = args.dlogits ? dlogits_of(row) : nullptr;
    r.token = token_of(row);
    r.probs = args.probs ? static_cast<const T*>(args.probs) + row * args.cols : nullptr;
    r.target = args.probs ? -1 : index_at(args.target, args.target_type, r.token);
    r.hard = args.probs ? A(0) : hard_scale * (class_weight ? class_weight[r.target] : A(1));
    return r;
  }

  ML_FN V capped(V raw) const {
    if constexpr (kCapped) return softcap(raw, V(cap), V(inverse_cap));
    return raw;
  }

  template <class Count>
  ML_FN V logit(const T* x, Count count) const {
    return capped(load<V>(x, count));
  }

  // Through the vector's tanh: another one's last bit would tell the target from its equals.
  A logit(const T* x) const {
    if constexpr (kCapped) return lane_sum(keep(logit(x, Part{1}), Part{1}, A(0)));
    return A(widen(*x));
  }

  A slope(const T* x) const {
    const V t = tanh(load<V>(x, Part{1}) * V(inverse_cap));
    return lane_sum(keep(tanh_slope(t), Part{1}, A(0)));
  }

  template <class Count>
  ML_FN V soft_target_at(const Row& r, int64_t j, Count count) const {
    return soft_target(class_weight ? load<V>(class_weight + j, count) : V(1),
                       r.probs ? load<V>(r.probs + j, count) : V(0), V(probs_scale), V(uniform));
  }

  A soft_target_at(const Row& r, int64_t j) const {
    return soft_target(class_weight ? class_weight[j] : A(1), r.probs ? A(widen(r.probs[j])) : A(0),
                       probs_scale, uniform);
  }

  // f(begin, end) over pieces of [begin, end): a lane that adds up more terms than this in a row
  // loses digits.
  template <class F>
  static void for_each_piece(int64_t begin, int64_t end, int64_t terms, const F& f) {
    const int64_t size = terms * V::kLanes;
    for (; begin < end; begin += size) f(begin, std::min(begin + size, end));
  }

  // f(to, fetched) works on [j, to) of the row x and meanwhile fetches what lies from `fetched` on:
  // kAhead bytes further in x, and where x ends, the row `next`.
  template <class F>
  static void fetch_ahead(const T* x, const T* next, int64_t cols, const int64_t& j, int64_t end,
                          const F& f) {
    constexpr int64_t kElements = kAhead / sizeof(T);
    const int64_t last = std::max<int64_t>(0, cols - kElements);
    f(std::min(last, end), x + j + kElements);
    f(end, next + std::max<int64_t>(0, j - last));
  }

  // Both cache lines of two vectors, or the one of two half vectors, into the second level: the
  // first one's few requests in flight are what reading waits for.
  static void prefetch(const T* p) {
    __builtin_prefetch(p, 0, 2);
    if constexpr (2 * V::kLanes * sizeof(T) > 64) __builtin_prefetch(p + V::kLanes, 0, 2);
  }

  // The row to fetch ahead after `row`: a masked one is not.
  const T* next_active(int64_t row, int64_t end) const {
    for (int64_t i = row + 1; i < end; ++i) {
      if (active(i)) return logits_of(i);
    }
    return logits_of(row);
  }

  Lse lse(const T* x, int64_t begin, int64_t end, const T* next) const {
    Lse all;
    for_each_piece(begin, end, 1024,
                   [&](int64_t b, int64_t e) { append(&all, lse_piece(x, b, e, next)); });
    return all;
  }

  // The first is taken as it is: merged into nothing it is the same, later.
  static void append(Lse* all, const Lse& next) {
    if (all->sum == 0) {
      *all = next;
    } else {
      all->merge(next);
    }
  }

  Lse lse_piece(const T* x, int64_t begin, int64_t end, const T* next) const {
    constexpr int kBlock = V::kBlock;
    constexpr int64_t kStep = kBlock * V::kLanes;
    LogSumExp<V> lanes;
    int64_t j = begin;
    fetch_ahead(x, next, args.cols, j, end, [&](int64_t to, const T* fetched) {
      for (; j + kStep <= to; j += kStep, fetched += kStep) {
        V y[kBlock];
        for (int i = 0; i < kBlock; i += 2) {
          prefetch(fetched + i * V::kLanes);
          V::load2(x + j + i * V::kLanes, y[i], y[i + 1]);
          y[i] = capped(y[i]), y[i + 1] = capped(y[i + 1]);
        }
        lanes.push(y);
      }
    });
    for_each_vector<V>(j, end, [&](int64_t i, auto count) {
      const V y[1] = {keep(logit(x + i, count), count, -std::numeric_limits<A>::infinity())};
      lanes.push(y);
    });
    const A top = lane_max(lanes.top);
    return {top, lane_sum(lanes.sum * exp(lanes.top - V(top)))};
  }

  // sum_j q_j (top - y_j) and sum_j q_j over the soft part of the target distribution.
  void soft_sums(const Row& r, A top, double* below, double* mass) const {
    double below_sum = 0, mass_sum = 0;
    for_each_piece(0, args.cols, 64, [&](int64_t begin, int64_t end) {
      V below_lanes(0), mass_lanes(0);
      for_each_vector<V>(begin, end, [&](int64_t j, auto count) {
        const V q = keep(soft_target_at(r, j, count), count, 0);
        below_lanes = below_lanes + keep(q * (V(top) - logit(r.x + j, count)), count, 0);
        mass_lanes = mass_lanes + q;
      });
      below_sum += lane_sum(below_lanes);
      mass_sum += lane_sum(mass_lanes);
    });
    *below = below_sum;
    *mass = mass_sum;
  }

  double spread(const Row& r, A top) const {
    double sum = 0;
    for_each_piece(0, args.cols, 64, [&](int64_t begin, int64_t end) {
      V lanes(0);
      for_each_vector<V>(begin, end, [&](int64_t j, auto count) {
        const V y = logit(r.x + j, count);
        lanes = lanes + keep(spread_term(exp(y - V(top)), y, V(top)), count, 0);
      });
      sum += lane_sum(lanes);
    });
    return sum;
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

  bool any_above(const T* x, int64_t begin, int64_t end, A bound) const {
    bool found = false;
    for (; begin + V::kLanes <= end && !found; begin += V::kLanes) {
      found = any_greater(V::load(x + begin), V(bound));
    }
    for (; begin < end && !found; ++begin) found = A(widen(x[begin])) > bound;
    return found;
  }

  // From a row's logsumexp to what the token table keeps of it. In double: a handful of operations,
  // of which each would add its rounding to the loss.
  void finish(const Row& r, const Lse& lse) const {
    const LogSumExp<double> wide(lse.top, lse.sum);
    double loss = 0, mass = r.hard;
    if (r.target >= 0) loss = hard_loss<double>(wide, logit(r.x + r.target), r.hard);
    if constexpr (kSoft) {
      double below, soft_mass;
      soft_sums(r, lse.top, &below, &soft_mass);
      loss += soft_loss(wide, below, soft_mass);
      mass += soft_mass;
    }
    *field(TokenField::kLoss, r.token) = static_cast<A>(loss);
    *field(TokenField::kTop, r.token) = lse.top;
    *field(TokenField::kSum, r.token) = lse.sum;
    *field(TokenField::kMass, r.token) = static_cast<A>(mass);
    if (args.stats) {
      *field(TokenField::kEntropy, r.token) = static_cast<A>(entropy(wide.sum, spread(r, lse.top)));
      // A NaN is the argmax of its row, and makes the sum one too.
      const bool has_nan = lse.sum != lse.sum && std::any_of(r.x, r.x + args.cols, is_nan);
      *field(TokenField::kCorrect, r.token) = r.target >= 0 && !has_nan && is_argmax(r);
    }
  }

  // In double, as finish().
  LogitGrad<double> grad_of(const Row& r) const {
    const LogSumExp<double> lse(*field(TokenField::kTop, r.token),
                                *field(TokenField::kSum, r.token));
    const double* group = args.groups + (r.token / args.group_size) * GroupField::kCount;
    const A* dloss = static_cast<const A*>(args.dloss);
    const double scale = static_cast<double>(*field(TokenField::kWeight, r.token)) *
                         (dloss ? dloss[args.dloss_per_token ? r.token : 0] : A(1));
    LogitGrad<double> g = logit_grad<double>(lse, *field(TokenField::kMass, r.token), r.hard,
                                             z_loss, scale * group[GroupField::kScaleLoss],
                                             scale * group[GroupField::kScaleZ]);
    if (g.softmax != g.softmax) g.softmax = std::numeric_limits<A>::quiet_NaN();  // see rounded()
    return g;
  }

  // The gradient of [begin, end) of a row. Where `next` is none, the row was read just now.
  void grad(const Row& r, const LogitGrad<double>& g, int64_t begin, int64_t end,
            const T* next) const {
    const A top_of_row = *field(TokenField::kTop, r.token);
    const V top(top_of_row), softmax(static_cast<A>(g.softmax)), soft(static_cast<A>(g.soft));
    const bool has_target = begin <= r.target && r.target < end;
    const A own = has_target ? logit(r.x + r.target) : A(0);  // now: dx may be x
    const A own_slope = has_target && kCapped ? slope(r.x + r.target) : A(1);
    const auto of_raw = [&](V raw, V soft_part) {
      if constexpr (kCapped) {
        const V t = tanh(raw * V(inverse_cap));
        return (softmax_grad(V(cap) * t, top, softmax) - soft_part) * tanh_slope(t);
      }
      return softmax_grad(raw, top, softmax) - soft_part;
    };
    const auto at = [&](int64_t j, auto count) {
      const V soft_part = kSoft ? soft * soft_target_at(r, j, count) : V(0);
      return of_raw(load<V>(r.x + j, count), soft_part);
    };
    int64_t j = begin;
    if constexpr (!kSoft) {
      const bool stream = args.stream && r.dx != r.x;
      if (stream) j = std::min(end, j + elements_to_line(r.dx + j));
      for (int64_t i = begin; i < j; i += V::kLanes) {
        const Part part{static_cast<int>(std::min<int64_t>(V::kLanes, j - i))};
        store(at(i, part), r.dx + i, part);
      }
      const auto pairs_to = [&](int64_t to, auto fetch) {
        for (; j + 2 * V::kLanes <= to; j += 2 * V::kLanes) {
          fetch();
          V a, b;
          V::load2(r.x + j, a, b);
          a = of_raw(a, V(0)), b = of_raw(b, V(0));
          stream ? V::stream2(r.dx + j, a, b) : V::store2(r.dx + j, a, b);
        }
      };
      if (next) {
        fetch_ahead(r.x, next, args.cols, j, end, [&](int64_t to, const T* fetched) {
          pairs_to(to, [&] { prefetch(fetched), fetched += 2 * V::kLanes; });
        });
      } else {
        pairs_to(end, [] {});
      }
    }
    for_each_vector<V>(j, end,
                       [&](int64_t i, auto count) { store(at(i, count), r.dx + i, count); });
    if (has_target) {
      // Added up in A, as the row's mass was: of one class alone nothing must be left.
      const A q = r.hard + (kSoft ? soft_target_at(r, r.target) : A(0));
      const double d = own_slope * target_grad<double>(own, top_of_row, q, g);
      narrow(static_cast<A>(d), r.dx + r.target);
    }
  }

  static int64_t elements_to_line(const T* p) {
    const uintptr_t past = reinterpret_cast<uintptr_t>(p) % 64;
    return past ? static_cast<int64_t>((64 - past) / sizeof(T)) : 0;
  }

  void zero(T* dx, int64_t count) const {
    int64_t j = args.stream ? std::min(count, elements_to_line(dx)) : count;
    std::memset(dx, 0, j * sizeof(T));
    for (; j + 2 * V::kLanes <= count; j += 2 * V::kLanes) V::stream2(dx + j, V(0), V(0));
    std::memset(dx + j, 0, (count - j) * sizeof(T));
  }

  void masked(int64_t row) const {
    if (args.forward) finish_masked(token_of(row));
    if (args.dlogits) zero(dlogits_of(row), args.cols);
  }

  void finish_masked(int64_t token) const {
    *field(TokenField::kLoss, token) = 0;
    *field(TokenField::kTop, token) = 0;
    *field(TokenField::kSum, token) = 1;
    *field(TokenField::kMass, token) = 0;
    if (args.stats) {
      *field(TokenField::kEntropy, token) = 0;
      *field(TokenField::kCorrect, token) = 0;
    }
  }

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
        Lse all;
        for (int64_t j = 0; j < args.cols; j += kSegment) {
          append(&all, lse(r.x, j, std::min(j + kSegment, args.cols), next));
        }
        finish(r, all);
      }
      if (args.dlogits) {
        const LogitGrad<double> g = grad_of(r);
        for (int64_t j = 0; j < args.cols; j += kSegment) {
          grad(r, g, j, std::min(j + kSegment, args.cols), args.forward ? nullptr : next);
        }
      }
    }
    if (args.stream) end_streams();
  }

  // Several threads on one row: each segment's logsumexp, then (one thread) the row's, then each
  // segment's gradient.
  void run_lse(int64_t row, int64_t segment, void* partial) const {
    if (!active(row)) return;
    const int64_t begin = segment * kSegment;
    const T* x = logits_of(row);
    static_cast<Lse*>(partial)[segment] = lse(x, begin, std::min(begin + kSegment, args.cols), x);
  }

  void run_finish(int64_t row, const void* partial) const {
    if (!active(row)) return finish_masked(token_of(row));
    Lse all;
    for (int64_t i = 0; i * kSegment < args.cols; ++i) {
      append(&all, static_cast<const Lse*>(partial)[i]);
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
      zero(dlogits_of(row) + begin, end - begin);
    }
    if (args.stream) end_streams();
  }
};

// Options that an inner loop should not have to ask for are template arguments.
template <class T, class F>
void with_options(const CrossEntropyArgs& args, const F& f) {
  const bool capped = args.softcap != 0;
  const bool soft = args.probs || args.label_smoothing != 0;
  if (capped) {
    if (soft) return f(Rows<T, true, true>{args});
    return f(Rows<T, true, false>{args});
  }
  if (soft) return f(Rows<T, false, true>{args});
  return f(Rows<T, false, false>{args});
}

template <class T>
constexpr RowKernels row_kernels() {
  return {
      [](const CrossEntropyArgs& args, int64_t begin, int64_t end) {
        with_options<T>(args, [&](const auto& rows) { rows.run(begin, end); });
      },
      [](const CrossEntropyArgs& args, int64_t row, int64_t segment, void* partial) {
        with_options<T>(args, [&](const auto& rows) { rows.run_lse(row, segment, partial); });
      },
      [](const CrossEntropyArgs& args, int64_t row, const void* partial) {
        with_options<T>(args, [&](const auto& rows) { rows.run_finish(row, partial); });
      },
      [](const CrossEntropyArgs& args, int64_t row, int64_t segment) {
        with_options<T>(args, [&](const auto& rows) { rows.run_grad(row, segment); });
      },
  };
}

constexpr Kernels make_kernels(const char* name) {
  return {name,
          {row_kernels<double>(), row_kernels<float>(), row_kernels<BFloat16>(),
           row_kernels<Float16>()}};
}
