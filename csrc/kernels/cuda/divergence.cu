// SPDX-License-Identifier: BSD-3-Clause
// A divergence of pairs of rows, and its gradient, without ever holding a row of probabilities.
//
// A block works on one pair: a look for both log-sum-exps, one for the value, one for the gradient.
// How a row is split among its threads depends on nothing but its length, so that a token's result
// has the same bits in every batch.
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/numbers.cuh"
#include "kernels/cuda/team.cuh"

namespace masked_loss::cuda {
namespace {

#include "kernels/cuda/functions.inl.cuh"
ML_FN float exp(float x) { return ::expf(x); }
ML_FN float exp2(float x) { return ::exp2f(x); }
#include "kernels/cuda/tanh.inl.cuh"
#include "kernels/groups.inl.h"
#include "kernels/math.inl.h"

ML_FN double if_less(double a, double b, double yes, double no) { return a < b ? yes : no; }
ML_FN double expm1_less(double x) { return ::expm1(x) - x; }
ML_FN float min(float a, float b) { return ::fminf(a, b); }
ML_FN double min(double a, double b) { return ::fmin(a, b); }
ML_FN float log_quotient(float, float larger, float less) {
  return ::log1pf(-less / ::fmaxf(larger, kTiny));
}
ML_FN double log_quotient(double, double larger, double less) {
  return ::log1p(-less / ::fmax(larger, double{kTiny}));
}

#include "kernels/divergence.inl.h"

using Field = DivergenceField;

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;

template <class A>
struct PairSums {
  LogSumExp<A> student, teacher;
  ML_FN void add(const PairSums& other) {
    merge(&student, other.student);
    merge(&teacher, other.teacher);
  }
};

struct ValueSums {
  double value = 0, mean = 0, entropy = 0, teacher_entropy = 0;
  ML_FN void add(const ValueSums& other) {
    value += other.value, mean += other.mean;
    entropy += other.entropy, teacher_entropy += other.teacher_entropy;
  }
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
struct LargestPair {
  Largest<A> student, teacher;
  ML_FN void add(const LargestPair& other) {
    student.add(other.student);
    teacher.add(other.teacher);
  }
};

// One row's logits after softcap and temperature.
template <class A>
struct RowReader {
  const void* x;
  DType dtype;
  A cap, temperature;

  ML_FN RowReader(const LogitRows& rows, int64_t batch, int64_t step, int64_t token)
      : dtype(rows.dtype), cap(static_cast<A>(rows.softcap)) {
    const int64_t bytes = dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
    x = static_cast<const char*>(rows.logits) +
        (batch * rows.batch_stride + step * rows.step_stride) * bytes;
    temperature = rows.temperatures ? static_cast<const A*>(rows.temperatures)[token]
                                    : static_cast<A>(rows.temperature);
  }

  ML_FN A raw(int64_t j) const {
    if constexpr (sizeof(A) == 8) {
      return static_cast<const double*>(x)[j];
    } else {
      if (dtype == DType::kFloat32) return static_cast<const float*>(x)[j];
      if (dtype == DType::kBFloat16) return widen(static_cast<const BFloat16*>(x)[j]);
      return widen(static_cast<const Float16*>(x)[j]);
    }
  }
  ML_FN A operator()(int64_t j) const {
    return (cap == A(0) ? raw(j) : softcap(raw(j), cap)) / temperature;
  }
  ML_FN A slope(int64_t j) const { return cap == A(0) ? A(1) : softcap_slope(A(raw(j)), cap); }
};

template <class A>
ML_FN void write_gradient(const DivergenceArgs& args, int64_t offset, A d) {
  if constexpr (sizeof(A) == 8) {
    static_cast<double*>(args.dlogits)[offset] = d;
  } else {
    if (args.student.dtype == DType::kFloat32) {
      static_cast<float*>(args.dlogits)[offset] = d;
    } else if (args.student.dtype == DType::kBFloat16) {
      narrow(d, static_cast<BFloat16*>(args.dlogits) + offset);
    } else {
      narrow(d, static_cast<Float16*>(args.dlogits) + offset);
    }
  }
}

template <class Kind, class A>
__global__ void __launch_bounds__(kThreads) divergence_kernel(const DivergenceArgs args) {
  const A* const dloss = static_cast<const A*>(args.dloss);
  if (args.unless_one && *dloss == A(1)) return;
  const A beta = static_cast<A>(args.beta);
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
    const int64_t batch = quotient(row, args.steps), step = row - batch * args.steps;
    const int64_t token = token_of(args, row, step);
    const auto column = [&](int64_t which) -> A& {
      return static_cast<A*>(args.table)[which * args.rows + token];
    };
    const int64_t to = batch * args.grad_batch_stride + step * args.grad_step_stride;
    const A weight = column(Field::kWeight);
    if (weight == A(0)) {
      const int64_t fields = args.stats ? Field::kCount : Field::kSaved;
      if (args.forward && threadIdx.x == 0) {
        for (int64_t f = Field::kValue; f < fields; ++f) column(f) = A(0);
      }
      if (args.dlogits) {
        for (int64_t j = threadIdx.x; j < args.cols; j += kThreads) {
          write_gradient(args, to + j, A(0));
        }
      }
      continue;
    }
    const RowReader<A> student(args.student, batch, step, token);
    const RowReader<A> teacher(args.teacher, batch, step, token);

    PairSums<A> sums;
    if (args.forward) {
      for (int64_t j = threadIdx.x; j < args.cols; j += kThreads) {
        const A y[1] = {student(j)}, z[1] = {teacher(j)};
        sums.student.push(y);
        sums.teacher.push(z);
      }
      sums = merge_team<kWarps>(sums);
    } else {
      sums.student = {column(Field::kTop), column(Field::kSum)};
      sums.teacher = {column(Field::kTeacherTop), column(Field::kTeacherSum)};
    }
    const A top = sums.student.top, teacher_top = sums.teacher.top;
    const Origins<A> from = origins_of(top, teacher_top);
    SoftmaxPair<A> of{A(1) / sums.student.sum, A(1) / sums.teacher.sum, A(0)};
    of.shift = static_cast<A>((log(double(sums.student.sum)) + (top - from.student)) -
                              (log(double(sums.teacher.sum)) + (teacher_top - from.teacher)));
    const auto pair_at = [&](A y, A z) {
      const A e_y = exp(y - top), e_z = exp(z - teacher_top);
      return pair_of<Kind>((z - from.teacher) - (y - from.student), e_y, e_z, of);
    };

    A mean = A(0);
    if (args.forward) {
      ValueSums values;
      LargestPair<A> largest;
      for (int64_t j = threadIdx.x; j < args.cols; j += kThreads) {
        const A y = student(j), z = teacher(j);
        const ClassPair<A> c = pair_at(y, z);
        const ClassPart<A> part = Kind::part(c, beta);
        values.value += part.value;
        if constexpr (Kind::kScored) values.mean += c.q * part.score;
        if (args.stats) {
          const A of_y = bounded_below(y - top), of_z = bounded_below(z - teacher_top);
          values.entropy -= c.q * of_y;
          values.teacher_entropy -= c.p * of_z;
          largest.add({{y, j}, {z, j}});
        }
      }
      values = merge_team<kWarps>(values);
      // A teacher's NaN reaches the scores, which are bounded, through the sum alone.
      const double nan_or_zero = 0 * of.shift;
      mean = static_cast<A>(values.mean + nan_or_zero);
      if (args.stats) largest = merge_team<kWarps>(largest);
      if (threadIdx.x == 0) {
        column(Field::kValue) = static_cast<A>(values.value);
        column(Field::kMeanScore) = mean;
        column(Field::kTop) = sums.student.top, column(Field::kSum) = sums.student.sum;
        column(Field::kTeacherTop) = sums.teacher.top;
        column(Field::kTeacherSum) = sums.teacher.sum;
        if (args.stats) {
          column(Field::kEntropy) = static_cast<A>(log(double(sums.student.sum)) + values.entropy);
          column(Field::kTeacherEntropy) =
              static_cast<A>(log(double(sums.teacher.sum)) + values.teacher_entropy);
          column(Field::kAgreement) = largest.student.index == largest.teacher.index;
        }
      }
    } else {
      mean = column(Field::kMeanScore);
    }

    if (!args.dlogits) continue;
    const double factor = Kind::factor(args.beta);
    const double scale =
        group_at(args.groups, group_of(args.groups, token))[GroupField::kScaleLoss];
    const A g = dloss ? dloss[args.dloss_per_token ? token : 0] : A(1);
    const A all = static_cast<A>(double(g) * weight * scale * factor / student.temperature);
    for (int64_t j = threadIdx.x; j < args.cols; j += kThreads) {
      const ClassPair<A> c = pair_at(student(j), teacher(j));
      A d = Kind::part(c, beta).score;
      if constexpr (Kind::kScored) d = c.q * (d - mean);
      write_gradient(args, to + j, d * all * student.slope(j));
    }
  }
}

template <class A>
void launch_pairs(const DivergenceArgs& args, Stream stream) {
  const auto run = [&](auto kernel) { launch(kernel, args.rows, kThreads, 0, stream, args); };
  switch (args.kind) {
    case Divergence::kForwardKl:
      return run(divergence_kernel<ForwardKl, A>);
    case Divergence::kReverseKl:
      return run(divergence_kernel<ReverseKl, A>);
    case Divergence::kJsd:
      return run(divergence_kernel<JensenShannon, A>);
    case Divergence::kSkewForwardKl:
      return run(divergence_kernel<SkewForwardKl, A>);
    case Divergence::kSkewReverseKl:
      return run(divergence_kernel<SkewReverseKl, A>);
  }
}

}  // namespace

void divergence(const DivergenceArgs& args, Stream stream) {
  if (args.wide) return launch_pairs<double>(args, stream);
  launch_pairs<float>(args, stream);
}

}  // namespace masked_loss::cuda
