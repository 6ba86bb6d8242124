// SPDX-License-Identifier: BSD-3-Clause
// The CPU kernels without torch, against double precision: every instruction set this machine has,
// every type, lengths around each vector width, misaligned rows, two threads. Meant to run under
// sanitizers: each row stands in an allocation of its own size, so that a step outside is seen.
#include <cmath>
#include <cstdio>
#include <random>
#include <thread>
#include <type_traits>
#include <vector>

#include "kernels/cpu/backend.h"
#include "numbers.h"

using namespace masked_loss;

namespace {

int failures = 0;

void expect(bool good, const char* isa, const char* type, int64_t cols, int64_t offset,
            const char* what, double error) {
  if (good) return;
  ++failures;
  std::printf("%s %s: %lld columns, offset %lld: %s is off by %g\n", isa, type,
              static_cast<long long>(cols), static_cast<long long>(offset), what, error);
}

cpu::Threads two_threads() {
  return {2, [](const std::function<void()>& worker) {
            std::thread other(worker);
            worker();
            other.join();
          }};
}

// Half the distance of the smallest numbers: what rounding to them may cost, whatever their size.
template <class T>
constexpr double kSubnormal = std::is_same_v<T, Float16> ? 0x1p-25 : 0;

template <class T, class A>
void check(const cpu::Kernels& table, DType dtype, const char* type, double epsilon, int64_t cols,
           int64_t offset, bool inplace) {
  constexpr int64_t kRows = 3;  // the second is masked, and full of NaN
  const int64_t stride = cols + offset;
  std::vector<T> logits(offset + kRows * stride), gradient(offset + kRows * stride);
  std::mt19937 random(static_cast<unsigned>(cols));
  std::normal_distribution<double> normal(0, 3);
  for (T& x : logits) set(normal(random), &x);
  for (int64_t j = 0; j < cols; ++j) set(NAN, &logits[offset + stride + j]);
  for (T& x : gradient) set(7, &x);
  const std::vector<T> before = logits;

  const int64_t target[kRows] = {0, cols, cols - 1};
  std::vector<A> tokens(TokenField::kCount * kRows, A(0));
  tokens[0] = A(1), tokens[2] = A(2);
  double group[GroupField::kCount] = {0.5, 0.5};
  RowArgs args{};
  args.logits = logits.data() + offset;
  args.dtype = dtype;
  args.rows = args.steps = kRows;
  args.cols = args.classes = cols;
  args.step_stride = args.grad_step_stride = stride;
  args.target = target;
  args.target_type = DType::kInt64;
  args.table = tokens.data();
  args.stats = args.forward = true;
  args.dlogits = inplace ? logits.data() + offset : gradient.data() + offset;
  args.stream = true;
  args.groups = {kRows, 1, kRows, group, GroupField::kCount, nullptr, 0};
  cpu::cross_entropy(args, two_threads(), table);

  const std::vector<T>& result = inplace ? logits : gradient;
  for (int64_t row = 0; row < kRows; ++row) {
    const T* x = &before[offset + row * stride];
    const T* dx = &result[offset + row * stride];
    const double weight = number(tokens[row]);
    double sum = 0, worst = 0;
    for (int64_t j = 0; j < cols; ++j) sum += std::exp(number(x[j]));
    for (int64_t j = 0; j < cols; ++j) {
      const double p = std::exp(number(x[j])) / sum, own = j == target[row];
      const double truth = weight == 0 ? 0 : 0.5 * weight * (p - own);
      // The rounding of y - top, as large as its distance is, stands in the exponent.
      const double scale = weight == 0 ? 1 : 0.5 * weight * (p * (1 - std::log(p)) + own);
      worst = std::max(worst, (std::abs(number(dx[j]) - truth) - kSubnormal<T>) / scale);
    }
    expect(worst <= 4 * epsilon, table.name, type, cols, offset, "a gradient", worst);
    if (weight == 0) continue;
    const double truth = std::log(sum) - number(x[target[row]]);
    const double loss = number(tokens[TokenField::kLoss * kRows + row]);
    const double error = std::abs(loss - truth) / (1 + std::abs(truth));
    expect(error <= 4 * static_cast<double>(std::numeric_limits<A>::epsilon()), table.name, type,
           cols, offset, "a loss", error);
  }
  for (int64_t row = 0; row + 1 < kRows; ++row) {
    for (int64_t gap = 0; gap < offset; ++gap) {
      const int64_t i = offset + row * stride + cols + gap;
      const double wanted = inplace ? number(before[i]) : 7;
      expect(number(result[i]) == wanted, table.name, type, cols, offset, "memory between rows",
             number(result[i]) - wanted);
    }
  }
}

}  // namespace

int main() {
  const float eps = std::numeric_limits<float>::epsilon();
  for (const cpu::Kernels* table : cpu::available()) {
    for (int64_t cols :
         {1,  2,   3,   7,   8,   9,   15,  16,   17,   31,    32,    33,    63,   64,
          65, 127, 128, 129, 255, 256, 257, 1000, 4099, 16383, 16384, 16385, 40000}) {
      for (int64_t offset : {0, 1, 3, 8}) {
        for (bool inplace : {false, true}) {
          check<float, float>(*table, DType::kFloat32, "fp32", eps, cols, offset, inplace);
          check<double, double>(*table, DType::kFloat64, "fp64", 1e-14, cols, offset, inplace);
          check<BFloat16, float>(*table, DType::kBFloat16, "bf16", 0x1p-8, cols, offset, inplace);
          check<Float16, float>(*table, DType::kFloat16, "fp16", 0x1p-11, cols, offset, inplace);
        }
      }
    }
    std::printf("%s: checked\n", table->name);
  }
  std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}
