// SPDX-License-Identifier: BSD-3-Clause
// What the threads of a pair of rows add up: at the first look its log-sum-exps, at the second its
// value, or its statistics. Included inside a file's own namespace, after math.inl.h.

// Of one row: log sum exp(x / temperature). Tops are logits before the temperature.
template <class A>
struct CooledSum : LogSumExp<A> {
  Cooling<A> cooling;

  ML_FN explicit CooledSum(const Cooling<A>& cooling) : cooling(cooling) {}
  template <int N>
  ML_FN void push(const A (&x)[N]) {
    const A peak = peak_of(this->top, x);
    if (peak > this->top) {
      this->sum *= exp(cooling(this->top - peak));
      this->top = peak;
    }
    A e[N];
#pragma unroll
    for (int i = 0; i < N; ++i) e[i] = x[i] - this->top;
    cooling.all(e);
#pragma unroll
    for (A& each : e) each = exp(each);
    this->sum += tree_sum(e);
  }
};

// Both log-sum-exps. What threads have summed up is merged in double: a sum of which one class is
// almost all would show every rounding in the gradient of that class.
template <class A>
struct PairSums {
  A top = Limits<A>::lowest(), teacher_top = Limits<A>::lowest();
  double sum = 0, teacher_sum = 0;

  ML_FN PairSums() {}
  ML_FN PairSums(const LogSumExp<A>& student, const LogSumExp<A>& teacher)
      : top(student.top), teacher_top(teacher.top), sum(student.sum), teacher_sum(teacher.sum) {}
};

// Of a warp's lanes: all get the tops, the lower half of them the student's sum, and the upper half
// the teacher's, both as `sum`. Lanes agree on the tops first: each is rescaled, and rounded, once.
template <class A, class Exponential>
ML_FN PairSums<A> merge_lanes(const PairSums<A>& s, const Exponential& student,
                              const Exponential& teacher) {
  PairSums<A> all = s;
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    all.top = max(all.top, from_lane_xor(all.top, mask));
    all.teacher_top = max(all.teacher_top, from_lane_xor(all.teacher_top, mask));
  }
  const double sum = s.sum * student.of(s.top - all.top);
  const double teacher_sum = s.teacher_sum * teacher.of(s.teacher_top - all.teacher_top);
  const bool upper = static_cast<int>(threadIdx.x) % kWarp >= kWarp / 2;
  const double own = upper ? teacher_sum : sum, other = upper ? sum : teacher_sum;
  all.sum = own + from_lane_xor(other, kWarp / 2);
#pragma unroll
  for (int mask = kWarp / 4; mask > 0; mask /= 2) all.sum += from_lane_xor(all.sum, mask);
  return all;
}
// Of a block; all get the result. There must be another barrier before the next.
template <int kWarps, class A, class Exponential>
ML_FN PairSums<A> merge_block(PairSums<A> s, const Exponential& student,
                              const Exponential& teacher) {
  __shared__ double sums[2][kWarps];
  __shared__ A tops[2][kWarps];
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  s = merge_lanes(s, student, teacher);
  if (lane == 0) tops[0][warp] = s.top, tops[1][warp] = s.teacher_top, sums[0][warp] = s.sum;
  if (lane == kWarp / 2) sums[1][warp] = s.sum;
  __syncthreads();
  s = PairSums<A>();
  if (lane * kWarp < static_cast<int>(blockDim.x)) {
    s.top = tops[0][lane], s.teacher_top = tops[1][lane];
    s.sum = sums[0][lane], s.teacher_sum = sums[1][lane];
  }
  s = merge_lanes(s, student, teacher);
  const double own = s.sum;
  s.sum = from_lane(own, 0);
  s.teacher_sum = from_lane(own, kWarp / 2);
  return s;
}

// Of a divergence, and of reverse KL's gradient the mean score too: the sum of p - q is 0.
struct ValueSum {
  double value = 0;
  ML_FN void add(const ValueSum& other) { value += other.value; }
  ML_FN double mean() const { return value; }
};
struct ValueSums {
  double value = 0, scores = 0;
  ML_FN void add(const ValueSums& other) { value += other.value, scores += other.scores; }
  ML_FN double mean() const { return scores; }
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
