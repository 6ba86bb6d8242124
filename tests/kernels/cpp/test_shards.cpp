// SPDX-License-Identifier: BSD-3-Clause
// Rows whose columns are shared out to shards, without torch: what the shards tell, merged, makes
// the table that whole rows make, and their gradients side by side are the whole gradient. On every
// instruction set and for every type; meant to run under sanitizers, as test_kernels.cpp.
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "compare.h"
#include "kernels/cpu/backend.h"

using namespace masked_loss;

namespace {

constexpr int64_t kTokens = 5, kMasked = 2, kIgnored = -100;

struct Options {
  const char* name;
  bool log_probs = false, stats = false;
  int64_t ids = 1;
  double label_smoothing = 0, softcap = 0, temperature = 1;
  bool class_weight = false;
};
constexpr Options kOptions[] = {
    {"cross entropy"},
    {"statistics", false, true},
    {"everything", false, true, 1, 0.1, 3, 0.7, true},
    {"log-probabilities", true},
    {"with entropy", true, true, 3, 0, 3, 0.7},
};

struct Outputs {
  Numbers table, results, dlogits;
};

const cpu::Threads kThreads{1, [](const std::function<void()>& worker) { worker(); }};

template <class T, class A>
struct Problem {
  const cpu::Kernels& kernels;
  const Options& o;
  int64_t cols;
  std::vector<T> logits;
  std::vector<A> weight, class_weight, upstream;
  std::vector<int64_t> target;
  Numbers group;

  Problem(const cpu::Kernels& kernels, const Options& o, int64_t cols)
      : kernels(kernels), o(o), cols(cols), group(GroupField::kCount, 1) {
    std::mt19937 random(static_cast<unsigned>(cols));
    std::normal_distribution<double> normal(0, 2);
    Numbers x;
    for (int64_t i = 0; i < kTokens * cols; ++i) x.push_back(std::round(normal(random) * 16) / 16);
    for (int64_t j = 0; j < cols; ++j) x[kMasked * cols + j] = std::nan("");  // never read
    logits = as<T>(x);
    for (int64_t i = 0; i < kTokens; ++i) {
      weight.push_back(i == kMasked ? A(0) : A(1 + 0.25 * static_cast<double>(i)));
      for (int64_t k = 0; k < o.ids; ++k) {
        target.push_back(k == 1 && i == 0 ? kIgnored : (5 * i + 3 * k) % cols);
        upstream.push_back(A(0.5 + 0.25 * static_cast<double>(i + k)));
      }
    }
    for (int64_t j = 0; j < cols; ++j) class_weight.push_back(A(0.5 + 0.125 * (j % 5)));
  }

  int64_t fields() const {
    if (o.log_probs) return o.stats ? LogProbField::kCount : LogProbField::kEntropySum;
    return o.stats ? TokenField::kCount : TokenField::kSaved;
  }

  // Of the columns from `first` on.
  RowArgs args_of(std::vector<A>* table, int64_t first, int64_t columns) {
    RowArgs args{};
    args.loss = o.log_probs ? RowLoss::kLogProbs : RowLoss::kCrossEntropy;
    args.label_smoothing = o.label_smoothing;
    args.softcap = o.softcap;
    args.temperature = o.temperature;
    args.logits = logits.data() + first;
    args.dtype = std::is_same_v<T, double>     ? DType::kFloat64
                 : std::is_same_v<T, float>    ? DType::kFloat32
                 : std::is_same_v<T, BFloat16> ? DType::kBFloat16
                                               : DType::kFloat16;
    args.rows = args.steps = kTokens;
    args.cols = columns;
    args.step_stride = args.grad_step_stride = cols;
    args.first = first;
    args.classes = cols;
    args.target = target.data();
    args.target_type = DType::kInt64;
    args.ids = o.ids;
    args.ignore_index = kIgnored;
    args.class_weight = o.class_weight ? class_weight.data() : nullptr;
    args.table = table->data();
    args.stats = o.stats && !o.log_probs;
    args.groups = {kTokens, 1, kTokens, group.data(), GroupField::kCount, nullptr, 0};
    return args;
  }

  Outputs run(const std::vector<int64_t>& bounds, bool whole) {
    const int64_t shards = static_cast<int64_t>(bounds.size()) - 1;
    std::vector<A> table(fields() * kTokens), results(kTokens * (o.ids + 1));
    std::copy(weight.begin(), weight.end(), table.begin());
    std::vector<T> gradient(kTokens * cols);
    const auto with_results = [&](RowArgs& args) {
      args.results[0] = results.data();
      if (o.stats) args.results[1] = results.data() + kTokens * o.ids;
    };
    if (whole) {
      RowArgs args = args_of(&table, 0, cols);
      args.forward = true;
      if (o.log_probs) with_results(args);
      cpu::cross_entropy(args, kThreads, kernels);
    } else {
      MergeArgs merged{};
      static_cast<RowArgs&>(merged) = args_of(&table, 0, cols);
      merged.stats = o.stats;
      merged.numbers = part_numbers(merged);
      merged.dtype = std::is_same_v<A, double> ? DType::kFloat64 : DType::kFloat32;
      const int64_t size = merged.numbers * kTokens;
      std::vector<A> parts(shards * size, std::numeric_limits<A>::quiet_NaN());
      for (int64_t r = 0; r < shards; ++r) {
        RowArgs args = args_of(&table, bounds[r], bounds[r + 1] - bounds[r]);
        args.stats = o.stats;
        args.forward = true;
        args.part = parts.data() + r * size;
        args.numbers = merged.numbers;
        cpu::cross_entropy(args, kThreads, kernels);
      }
      merged.parts = parts.data();
      merged.bounds = bounds.data();
      merged.shards = shards;
      if (o.log_probs) with_results(merged);
      cpu::merge(merged, kThreads);
    }
    for (int64_t r = 0; r < shards; ++r) {
      RowArgs args = args_of(&table, bounds[r], bounds[r + 1] - bounds[r]);
      args.stats = false;
      args.dlogits = gradient.data() + bounds[r];
      if (o.log_probs) args.upstream[0] = {upstream.data(), true, false};
      if (o.log_probs && o.stats) args.upstream[1] = {upstream.data(), true, false};
      cpu::cross_entropy(args, kThreads, kernels);
    }
    Outputs out;
    for (A x : table) out.table.push_back(x);
    for (A x : results) out.results.push_back(x);
    for (T x : gradient) out.dlogits.push_back(number(x));
    return out;
  }
};

// eps: two roundings of the gradient's type.
template <class T, class A>
void check(const cpu::Kernels& kernels, const Options& o, const std::vector<int64_t>& bounds,
           double eps) {
  const int64_t cols = bounds.back();
  Problem<T, A> problem(kernels, o, cols);
  const Outputs whole = problem.run({0, cols}, true), shards = problem.run(bounds, false);
  const double wide = std::is_same_v<A, double> ? 1e-14 : 1e-6;
  const std::string of =
      std::string(kernels.name) + ' ' + o.name + ", " + std::to_string(cols) + " columns: ";
  compare(shards.table, whole.table, wide, wide, of + "table");
  compare(shards.results, whole.results, wide, wide, of + "result");
  compare(shards.dlogits, whole.dlogits, eps, wide / 100, of + "gradient");
}

}  // namespace

int main() {
  const std::vector<std::vector<int64_t>> splits = {
      {0, 1}, {0, 0, 1}, {0, 3, 3, 4, 37}, {0, 37}, {0, 16, 33, 130}, {0, 1, 16500, 40009}};
  for (const cpu::Kernels* kernels : cpu::available()) {
    for (const Options& o : kOptions) {
      for (const std::vector<int64_t>& bounds : splits) {
        check<double, double>(*kernels, o, bounds, 1e-14);
        check<float, float>(*kernels, o, bounds, 1e-6);
        check<BFloat16, float>(*kernels, o, bounds, 0x1p-8);
        check<Float16, float>(*kernels, o, bounds, 0x1p-10);
      }
    }
    std::printf("%s: checked\n", kernels->name);
  }
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
