// SPDX-License-Identifier: BSD-3-Clause
// What the threads of a pair of rows add up: at the first look its log-sum-exps, at the second its
// value, or its statistics. Included inside a file's own namespace, after math.inl.h.

// Both log-sum-exps. What threads have summed up is merged in double: a sum of which one class is
// almost all would show every rounding in the gradient of that class.
template <class A>
struct PairSums {
  A top = Limits<A>::lowest(), teacher_top = Limits<A>::lowest();
  double sum = 0, teacher_sum = 0;

  ML_FN PairSums() {}
  ML_FN PairSums(const LogSumExp<A>& student, const LogSumExp<A>& teacher)
      : top(student.top), teacher_top(teacher.top), sum(student.sum), teacher_sum(teacher.sum) {}
  // Of the same tops.
  ML_FN void add(const PairSums& other) { sum += other.sum, teacher_sum += other.teacher_sum; }
};

// Lanes agree on the largest tops first: each is rescaled, and rounded, once.
struct AlignPair {
  template <int kLanes, class A>
  ML_FN void lanes(PairSums<A>* sums) const {
    A top = sums->top, teacher_top = sums->teacher_top;
#pragma unroll
    for (int mask = kLanes / 2; mask > 0; mask /= 2) {
      top = max(top, from_lane_xor(top, mask));
      teacher_top = max(teacher_top, from_lane_xor(teacher_top, mask));
    }
    sums->sum *= exp(sums->top - top);
    sums->teacher_sum *= exp(sums->teacher_top - teacher_top);
    sums->top = top, sums->teacher_top = teacher_top;
  }
};

struct ValueSums {
  double value = 0, mean = 0;
  ML_FN void add(const ValueSums& other) { value += other.value, mean += other.mean; }
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
