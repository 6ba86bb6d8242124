// SPDX-License-Identifier: BSD-3-Clause
// Log-probabilities and entropies without torch: the kernels of rows, forward and backward, on
// every instruction set and for every type, against the formulas in double precision. Meant to run
// under sanitizers, as test_kernels.cpp.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "compare.h"
#include "kernels/cpu/backend.h"

using namespace masked_loss;

namespace {

constexpr int64_t kBatch = 2, kSteps = 3, kTokens = kBatch * kSteps;
constexpr int64_t kIgnored = -100;

struct Options {
  const char* name;
  int64_t ids = 1;
  bool entropy = false, shift = false, temperatures = false;
  double softcap = 0;
};

constexpr Options kOptions[] = {
    {"plain"},
    {"entropy", 1, true},
    {"many ids", 3},
    {"more ids than lie on the stack", 70, true},
    {"shift", 1, false, true},
    {"temperatures", 1, true, false, true},
    {"softcap", 2, true, false, false, 3},
    {"everything", 3, true, true, true, 3},
};

struct Inputs {
  Numbers logits, temperatures, of_ids, of_entropy;  // the last two: upstream gradients
  std::vector<int64_t> target;
  std::vector<uint8_t> mask;
};

Inputs make_inputs(const Options& o, int64_t cols) {
  std::mt19937 random(static_cast<unsigned>(cols));
  std::normal_distribution<double> normal(0, 2);
  Inputs in;
  // Small multiples of 1/16: every type holds them.
  const auto draw = [&] { return std::round(normal(random) * 16) / 16; };
  for (int64_t i = 0; i < kTokens * cols; ++i) in.logits.push_back(draw());
  for (int64_t i = 0; i < kTokens; ++i) {
    in.temperatures.push_back(o.temperatures ? 0.5 + 0.25 * static_cast<double>(i) : 1);
    in.of_entropy.push_back(draw());
    in.mask.push_back(i != 2);
    for (int64_t k = 0; k < o.ids; ++k) {
      // One that is ignored, and where it is the token's only one masks it; twice the same.
      in.target.push_back(i == 4 && k == 0 ? kIgnored : (i * 5 + k / 2) % cols);
      in.of_ids.push_back(draw());
    }
  }
  return in;
}

struct Outputs {
  Numbers log_probs, entropies, dlogits;
};

Outputs truth_of(const Inputs& in, const Options& o, int64_t cols) {
  Outputs truth{Numbers(kTokens * o.ids), Numbers(kTokens), Numbers(kTokens * cols)};
  for (int64_t n = 0; n < kTokens; ++n) {
    const int64_t* const ids = &in.target[n * o.ids];
    const bool no_id = std::all_of(ids, ids + o.ids, [](int64_t id) { return id == kIgnored; });
    if (!in.mask[n] || (no_id && o.ids == 1) || (o.shift && n % kSteps == 0)) continue;
    const int64_t row = o.shift ? n - 1 : n;
    const double* const x = &in.logits[row * cols];
    const double t = in.temperatures[n];
    Numbers y(x, x + cols);
    double sum = 0, entropy = 0;
    for (double& v : y) v = (o.softcap ? o.softcap * std::tanh(v / o.softcap) : v) / t;
    for (double v : y) sum += std::exp(v);
    for (double v : y) entropy += std::exp(v) / sum * (std::log(sum) - v);
    double* const dx = &truth.dlogits[row * cols];
    const double of_entropy = o.entropy ? in.of_entropy[n] : 0;
    for (int64_t j = 0; j < cols; ++j) {
      const double log_p = y[j] - std::log(sum);
      dx[j] = -of_entropy * std::exp(log_p) * (log_p + entropy);
    }
    for (int64_t k = 0; k < o.ids; ++k) {
      if (ids[k] == kIgnored) continue;
      truth.log_probs[n * o.ids + k] = y[ids[k]] - std::log(sum);
      const double g = in.of_ids[n * o.ids + k];
      for (int64_t j = 0; j < cols; ++j) dx[j] += g * ((j == ids[k]) - std::exp(y[j]) / sum);
    }
    if (o.entropy) truth.entropies[n] = entropy;
    for (int64_t j = 0; j < cols; ++j) {
      const double tanh = o.softcap ? std::tanh(x[j] / o.softcap) : 0;
      dx[j] *= (1 - tanh * tanh) / t;
    }
  }
  return truth;
}

template <class T, class A>
Outputs run(const cpu::Kernels& table, DType dtype, const Inputs& in, const Options& o,
            int64_t cols) {
  const cpu::Threads threads{2, [](const std::function<void()>& worker) {
                               std::thread other(worker);
                               worker();
                               other.join();
                             }};
  const std::vector<T> logits = as<T>(in.logits);
  const std::vector<A> temperatures = as<A>(in.temperatures), of_ids = as<A>(in.of_ids),
                       of_entropy = as<A>(in.of_entropy);
  std::vector<A> tokens(LogProbField::kCount * kTokens), log_probs(kTokens * o.ids),
      entropies(kTokens);
  std::vector<T> gradient(kTokens * cols);
  for (T& x : gradient) set(7, &x);
  Numbers group(GroupField::kCount);

  WeighArgs weights{};
  weights.groups = {kTokens, 1, kTokens, group.data(), GroupField::kCount, nullptr, 0};
  weights.steps = kSteps;
  weights.skip_first = o.shift;
  weights.target = in.target.data();
  weights.target_type = DType::kInt64;
  weights.ids = o.ids;
  weights.keep_ignored = o.entropy && o.ids > 1;
  weights.classes = cols;
  weights.ignore_index = kIgnored;
  weights.mask = in.mask.data();
  weights.mask_type = DType::kBool;
  weights.reduction = Reduction::kNone;
  weights.wide = std::is_same_v<A, double>;
  weights.weight = tokens.data();
  cpu::weigh(weights, threads);

  RowArgs args{};
  args.loss = RowLoss::kLogProbs;
  args.logits = logits.data();
  args.dtype = dtype;
  args.rows = kTokens;
  args.steps = kSteps;
  args.cols = args.classes = cols;
  args.batch_stride = args.grad_batch_stride = kSteps * cols;
  args.step_stride = args.grad_step_stride = cols;
  args.shift = o.shift;
  args.target = in.target.data();
  args.target_type = DType::kInt64;
  args.ids = o.ids;
  args.ignore_index = kIgnored;
  args.softcap = o.softcap;
  args.temperatures = o.temperatures ? temperatures.data() : nullptr;
  args.table = tokens.data();
  args.forward = true;
  args.results[0] = log_probs.data();
  args.results[1] = o.entropy ? entropies.data() : nullptr;
  cpu::cross_entropy(args, threads, table);

  args.forward = false;
  args.dlogits = gradient.data();
  args.upstream[0] = {of_ids.data(), true, false};
  if (o.entropy) args.upstream[1] = {of_entropy.data(), true, false};
  cpu::cross_entropy(args, threads, table);

  Outputs out;
  for (A x : log_probs) out.log_probs.push_back(x);
  for (A x : entropies) out.entropies.push_back(x);
  for (T x : gradient) out.dlogits.push_back(number(x));
  return out;
}

// eps: a rounding of the gradient's type.
template <class T, class A>
void check(const cpu::Kernels& table, DType dtype, const char* type, double eps, const Options& o,
           int64_t cols) {
  const Inputs in = make_inputs(o, cols);
  const Outputs truth = truth_of(in, o, cols), out = run<T, A>(table, dtype, in, o, cols);
  const double narrow = std::is_same_v<A, double> ? 1e-13 : 3e-7;
  const std::string of = std::string(table.name) + ' ' + type + ' ' + o.name + ", " +
                         std::to_string(cols) + " columns: ";
  compare(out.log_probs, truth.log_probs, narrow, narrow, of + "result");
  compare(out.entropies, truth.entropies, narrow, narrow, of + "entropy");
  compare(out.dlogits, truth.dlogits, eps, narrow * static_cast<double>(2 * o.ids),
          of + "gradient");
}

}  // namespace

int main() {
  for (const cpu::Kernels* table : cpu::available()) {
    for (const Options& o : kOptions) {
      for (int64_t cols : {1, 3, 16, 17, 37, 130}) {
        check<double, double>(*table, DType::kFloat64, "fp64", 1e-13, o, cols);
        check<float, float>(*table, DType::kFloat32, "fp32", 0x1p-21, o, cols);
        check<BFloat16, float>(*table, DType::kBFloat16, "bf16", 0x1p-8, o, cols);
        check<Float16, float>(*table, DType::kFloat16, "fp16", 0x1p-11, o, cols);
      }
    }
    std::printf("%s: checked\n", table->name);
  }
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
