// SPDX-License-Identifier: BSD-3-Clause
// A whole loss without torch, weights to gradients, under every option: the kernels for rows and
// for tokens in the order in which csrc/ops/cross_entropy.cpp calls them, against the formula in
// double precision and its differences. Meant to run under sanitizers, as test_kernels.cpp.
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "kernels/cpu/backend.h"
#include "numbers.h"

using namespace masked_loss;

namespace {

struct Options {
  const char* name;
  Reduction reduction = Reduction::kMean;
  double smoothing = 0, z_loss = 0, softcap = 0;
  bool class_weight = false, shift = false, probs = false, narrow_target = false;
};

constexpr Options kOptions[] = {
    {"plain"},
    {"none", Reduction::kNone},
    {"sum", Reduction::kSum},
    {"sequence_mean", Reduction::kSequenceMean},
    {"smoothing", Reduction::kMean, 0.1},
    {"z_loss", Reduction::kMean, 0, 0.1},
    {"softcap", Reduction::kMean, 0, 0, 3},
    {"class_weight", Reduction::kMean, 0, 0, 0, true},
    {"shift", Reduction::kMean, 0, 0, 0, false, true},
    {"probs", Reduction::kMean, 0.1, 0, 0, true, false, true},
    {"everything", Reduction::kSequenceMean, 0.1, 0.1, 3, true, true, false, true},
};

constexpr int64_t kBatch = 2, kSteps = 4, kTokens = kBatch * kSteps;

struct Inputs {
  Numbers logits, probs, class_weight, mask;
  std::vector<int64_t> target;
};

Inputs make_inputs(int64_t cols, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal(0, 2);
  std::uniform_real_distribution<double> uniform(0.25, 1);
  Inputs in;
  // Small multiples of 1/16: every type holds them.
  for (int64_t i = 0; i < kTokens * cols; ++i) {
    in.logits.push_back(std::round(normal(random) * 16) / 16);
    in.probs.push_back(std::round(uniform(random) * 16) / 16);
  }
  for (int64_t j = 0; j < cols; ++j) in.class_weight.push_back(uniform(random));
  for (int64_t i = 0; i < kTokens; ++i) {
    in.mask.push_back(i == 2 ? 0 : std::round(uniform(random) * 16) / 16);
    in.target.push_back(i == 2 ? cols + 7 : i == 5 ? -100 : static_cast<int64_t>(i) * 5 % cols);
  }
  return in;
}

// The token losses' weighted sum over their scale, as docs/semantics.md writes it.
double loss_of(const Inputs& in, const Options& o, int64_t cols) {
  const int64_t groups = o.reduction == Reduction::kSequenceMean ? kBatch : 1;
  const int64_t size = kTokens / groups;
  const bool mean = o.reduction == Reduction::kMean || groups > 1;
  double total = 0, active_groups = 0;
  for (int64_t g = 0; g < groups; ++g) {
    double ce = 0, z = 0, weights = 0, class_weights = 0;
    for (int64_t n = g * size; n < (g + 1) * size; ++n) {
      if (in.mask[n] == 0 || (!o.probs && in.target[n] == -100)) continue;
      if (o.shift && n % kSteps == 0) continue;
      const double* x = &in.logits[(o.shift ? n - 1 : n) * cols];
      double sum = 0;
      Numbers y(x, x + cols);
      for (double& v : y) v = o.softcap != 0 ? o.softcap * std::tanh(v / o.softcap) : v;
      for (double v : y) sum += std::exp(v);
      const double lse = std::log(sum), w = in.mask[n];
      double own = 1;
      for (int64_t j = 0; j < cols; ++j) {
        const double c = o.class_weight ? in.class_weight[j] : 1;
        const double p = o.probs ? in.probs[n * cols + j] : j == in.target[n];
        const double q = (1 - o.smoothing) * p + o.smoothing / static_cast<double>(cols);
        ce += w * c * q * (lse - y[j]);
        if (!o.probs && j == in.target[n]) own = c;
      }
      z += w * o.z_loss * lse * lse;
      weights += w;
      class_weights += w * own;
    }
    if (weights == 0) continue;
    ++active_groups;
    total += mean ? ce / class_weights + z / weights : ce + z;
  }
  return mean ? total / active_groups : total;
}

cpu::Threads two_threads() {
  return {2, [](const std::function<void()>& worker) {
            std::thread other(worker);
            worker();
            other.join();
          }};
}

struct Outputs {
  double loss = 0;
  Numbers dlogits, dmask;
};

// fused: the gradient in the forward pass; else in a pass of its own, which takes dloss.
template <class T, class A>
Outputs run(const cpu::Kernels& table, DType dtype, const Inputs& in, const Options& o,
            int64_t cols, bool fused) {
  const cpu::Threads threads = two_threads();
  const std::vector<T> logits = as<T>(in.logits), probs = as<T>(in.probs);
  const std::vector<A> class_weight = as<A>(in.class_weight), mask = as<A>(in.mask);
  const std::vector<int32_t> narrow(in.target.begin(), in.target.end());
  const int64_t groups = o.reduction == Reduction::kSequenceMean ? kBatch : 1;
  std::vector<A> tokens(TokenField::kCount * kTokens);
  Numbers group(groups * GroupField::kCount);
  const DType wide_type = std::is_same_v<A, double> ? DType::kFloat64 : DType::kFloat32;

  WeighArgs weights{};
  weights.groups = {kTokens, groups, kTokens / groups, group.data(), GroupField::kCount,
                    nullptr, 0};
  weights.steps = kSteps;
  weights.skip_first = o.shift;
  if (!o.probs)
    weights.target = o.narrow_target ? static_cast<const void*>(narrow.data()) : in.target.data();
  weights.target_type = o.narrow_target ? DType::kInt32 : DType::kInt64;
  weights.classes = cols;
  weights.ignore_index = -100;
  weights.mask = mask.data();
  weights.mask_type = wide_type;
  weights.class_weight = o.class_weight && !o.probs ? class_weight.data() : nullptr;
  weights.reduction = o.reduction;
  weights.wide = std::is_same_v<A, double>;
  weights.weight = tokens.data();
  const int64_t bad = cpu::weigh(weights, threads);

  std::vector<T> gradient(kTokens * cols);
  for (T& x : gradient) set(7, &x);
  const A one(1);
  RowArgs args{};
  args.logits = logits.data();
  args.dtype = dtype;
  args.rows = kTokens;
  args.steps = kSteps;
  args.cols = args.classes = cols;
  args.batch_stride = args.grad_batch_stride = kSteps * cols;
  args.step_stride = args.grad_step_stride = cols;
  args.shift = o.shift;
  args.target = weights.target;
  args.target_type = weights.target_type;
  args.probs = o.probs ? probs.data() : nullptr;
  args.class_weight = o.class_weight ? class_weight.data() : nullptr;
  args.label_smoothing = o.smoothing;
  args.z_loss = o.z_loss;
  args.softcap = o.softcap;
  args.table = tokens.data();
  args.stats = args.forward = true;
  args.groups = weights.groups;
  args.dlogits = fused ? gradient.data() : nullptr;
  cpu::cross_entropy(args, threads, table);

  std::vector<A> losses(o.reduction == Reduction::kNone ? kTokens : 1);
  std::vector<double> stats(StatField::kCount);
  ReduceArgs reduce{};
  reduce.groups = weights.groups;
  reduce.reduction = o.reduction;
  reduce.table = tokens.data();
  reduce.wide = weights.wide;
  reduce.z_loss = o.z_loss;
  reduce.loss = losses.data();
  reduce.stats = stats.data();
  cpu::reduce(reduce, threads);

  if (!fused) {
    args.forward = args.stats = false;
    args.dlogits = gradient.data();
    args.upstream[0] = {&one, false};
    cpu::cross_entropy(args, threads, table);
  }
  std::vector<A> dmask(kTokens);
  MaskGradArgs of_mask{};
  of_mask.groups = weights.groups;
  of_mask.table = tokens.data();
  of_mask.wide = weights.wide;
  of_mask.z_loss = o.z_loss;
  of_mask.target = weights.target;
  of_mask.target_type = weights.target_type;
  of_mask.class_weight = weights.class_weight;
  of_mask.dloss.values = &one;
  of_mask.dmask = dmask.data();
  of_mask.mask_type = wide_type;
  cpu::mask_grad(of_mask, threads);

  Outputs out;
  out.loss = bad < 0 ? 0 : std::numeric_limits<double>::quiet_NaN();
  for (A loss : losses) out.loss += loss;
  for (T x : gradient) out.dlogits.push_back(number(x));
  for (A x : dmask) out.dmask.push_back(x);
  return out;
}

int failures = 0;

void expect_close(double got, double expected, double error, const char* isa, const char* type,
                  const Options& o, int64_t cols, const char* what) {
  if (std::abs(got - expected) <= error) return;
  ++failures;
  std::printf("%s %s %s, %lld columns: %s is %.9g, expected %.9g\n", isa, type, o.name,
              static_cast<long long>(cols), what, got, expected);
}

// d loss / d values[i], by differences.
double slope(Inputs in, Numbers Inputs::* values, size_t i, const Options& o, int64_t cols) {
  constexpr double kStep = 1e-4;
  (in.*values)[i] += kStep;
  const double above = loss_of(in, o, cols);
  (in.*values)[i] -= 2 * kStep;
  return (above - loss_of(in, o, cols)) / (2 * kStep);
}

// What the kernels should give, whichever and for whatever type.
Outputs truth_of(const Inputs& in, const Options& o, int64_t cols) {
  Outputs truth;
  truth.loss = loss_of(in, o, cols);
  for (size_t i = 0; i < in.logits.size(); ++i) {
    truth.dlogits.push_back(slope(in, &Inputs::logits, i, o, cols));
  }
  for (size_t i = 0; i < in.mask.size(); ++i) {  // a masked token's is 0 by definition
    truth.dmask.push_back(in.mask[i] != 0 ? slope(in, &Inputs::mask, i, o, cols) : 0);
  }
  return truth;
}

template <class T, class A>
void check(const cpu::Kernels& table, DType dtype, const char* type, double eps, const Options& o,
           int64_t cols, const Inputs& in, const Outputs& truth) {
  const double narrow = std::is_same_v<A, double> ? 1e-12 : 4e-6;
  for (bool fused : {true, false}) {
    if (fused && o.reduction == Reduction::kNone) continue;
    const Outputs out = run<T, A>(table, dtype, in, o, cols, fused);
    expect_close(out.loss, truth.loss, narrow * (1 + std::abs(truth.loss)), table.name, type, o,
                 cols, "loss");
    for (size_t i = 0; i < out.dlogits.size(); ++i) {
      const double d = truth.dlogits[i];
      expect_close(out.dlogits[i], d, eps * std::abs(d) + 3e-7, table.name, type, o, cols,
                   "a gradient");
    }
    for (size_t i = 0; i < out.dmask.size(); ++i) {
      const double d = truth.dmask[i];
      expect_close(out.dmask[i], d, 4e-6 * (1 + std::abs(d)), table.name, type, o, cols,
                   "a gradient of the mask");
    }
  }
}

// Losses computed elsewhere, there and back.
void check_values() {
  const cpu::Threads threads = two_threads();
  const std::vector<float> values{1, 2, NAN, 4}, mask{1, 0.5F, 0, 2};
  std::vector<float> tokens(2 * values.size()), dvalues(values.size());
  Numbers group(GroupField::kCount);
  WeighArgs weights{};
  weights.groups = {4, 1, 4, group.data(), GroupField::kCount, nullptr, 0};
  weights.steps = 4;
  weights.mask = mask.data();
  weights.mask_type = DType::kFloat32;
  weights.reduction = Reduction::kMean;
  weights.weight = tokens.data();
  cpu::weigh(weights, threads);
  ValuesArgs args{};
  args.groups = weights.groups;
  args.values = values.data();
  args.dtype = DType::kFloat32;
  args.table = tokens.data();
  args.dvalues = dvalues.data();
  cpu::load_values(args, threads);
  float loss = 0;
  ReduceArgs reduce{};
  reduce.groups = weights.groups;
  reduce.reduction = Reduction::kMean;
  reduce.table = tokens.data();
  reduce.loss = &loss;
  cpu::reduce(reduce, threads);
  cpu::values_grad(args, threads);
  const Options plain{"values"};
  expect_close(loss, 10 / 3.5, 1e-6, "every", "fp32", plain, 4, "loss");
  for (size_t i = 0; i < values.size(); ++i) {
    expect_close(dvalues[i], mask[i] / 3.5, 1e-7, "every", "fp32", plain, 4, "a gradient");
  }
}

}  // namespace

int main() {
  for (const Options& o : kOptions) {
    for (int64_t cols : {1, 3, 16, 17, 37, 130}) {
      const Inputs in = make_inputs(cols, static_cast<unsigned>(cols));
      const Outputs truth = truth_of(in, o, cols);
      for (const cpu::Kernels* table : cpu::available()) {
        check<double, double>(*table, DType::kFloat64, "fp64", 0, o, cols, in, truth);
        check<float, float>(*table, DType::kFloat32, "fp32", 0x1p-21, o, cols, in, truth);
        check<BFloat16, float>(*table, DType::kBFloat16, "bf16", 0x1p-8, o, cols, in, truth);
        check<Float16, float>(*table, DType::kFloat16, "fp16", 0x1p-11, o, cols, in, truth);
      }
    }
    std::printf("%s: checked\n", o.name);
  }
  check_values();
  std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}
