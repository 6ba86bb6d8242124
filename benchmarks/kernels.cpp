// SPDX-License-Identifier: BSD-3-Clause
// Runs one CPU kernel on ROWS rows of random logits, without torch, on one thread: for counting
// instructions, which are the same in every run. benchmarks/instructions.py runs it twice under
// valgrind; what more rows cost more is the kernel's.
//
//   kernels KERNEL fp64|fp32|bf16|fp16 ROWS COLS [LENGTH]
//   KERNEL: forward, step (forward and gradient), backward, masked, weigh, reduce, nothing; or
//           forward_kl, reverse_kl, jsd, skew_forward_kl, skew_reverse_kl: value and gradient
//   LENGTH: the rows are packed sequences of so many, with a mean of each; 0, which is without it:
//           one mean of all
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "kernels/cpu/backend.h"
#include "kernels/half.h"

using namespace masked_loss;

namespace {

void set(double x, double* out) { *out = x; }
void set(double x, float* out) { *out = static_cast<float>(x); }
void set(double x, BFloat16* out) { *out = to_bfloat16(static_cast<float>(x)); }
void set(double x, Float16* out) { *out = to_float16(static_cast<float>(x)); }

// About normal, with deviation 3; the same everywhere, unlike std::normal_distribution.
double draw() {
  static uint64_t state = 1;
  double sum = -1.5;
  for (int i = 0; i < 3; ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    sum += static_cast<double>(state >> 11) * 0x1p-53;
  }
  return 6 * sum;
}

constexpr const char* kKernels[] = {"forward", "step",   "backward", "masked",
                                    "weigh",   "reduce", "nothing"};
constexpr const char* kDivergences[] = {"forward_kl", "reverse_kl", "jsd", "skew_forward_kl",
                                        "skew_reverse_kl"};

constexpr const char* kTypes[] = {"fp64", "fp32", "bf16", "fp16"};

template <size_t N>
bool among(const std::string& name, const char* const (&names)[N]) {
  return std::find(names, names + N, name) != names + N;
}

template <class T, class A>
void run_divergence(int kind, DType dtype, int64_t rows, int64_t cols) {
  std::vector<T> logits(rows * cols), gradient(rows * cols);
  for (T& x : logits) set(draw(), &x);
  std::vector<A> tokens(DivergenceField::kSaved * rows, A(0)), scratch(cpu::pair_scratch(cols));
  for (int64_t row = 0; row < rows; ++row) tokens[DivergenceField::kWeight * rows + row] = A(1);
  std::vector<double> scale(GroupField::kCount, 1);
  DivergenceArgs args{};
  args.student = {logits.data(), dtype, 0, cols, 0, 1, nullptr};
  args.teacher = args.student;  // the instructions are the same for any
  args.rows = args.steps = rows;
  args.cols = args.grad_step_stride = cols;
  args.kind = static_cast<Divergence>(kind);
  args.beta = 0.5;
  args.wide = sizeof(A) == sizeof(double);
  args.table = tokens.data();
  args.forward = args.stream = true;
  args.groups = {rows, 1, rows, scale.data(), GroupField::kCount, nullptr, 0};
  args.dlogits = gradient.data();
  cpu::kernels().divergence(args, 0, rows, scratch.data());
}

template <class T, class A>
void run(const std::string& kernel, DType dtype, int64_t rows, int64_t cols, int64_t length) {
  for (int kind = 0; kind < 5; ++kind) {
    if (kernel == kDivergences[kind]) return run_divergence<T, A>(kind, dtype, rows, cols);
  }
  const cpu::Threads alone{1, [](const std::function<void()>& worker) { worker(); }};
  std::vector<T> logits(rows * cols), gradient(rows * cols);
  for (T& x : logits) set(draw(), &x);
  std::vector<int64_t> target(rows, cols / 2);
  std::vector<A> tokens(TokenField::kCount * rows, A(0));
  const int64_t bounds = length ? rows / length + 1 : 0;
  std::vector<double> table((bounds + 1) * (Groups::kBound + 1), 1);
  for (int64_t i = 0; i < bounds; ++i) {
    table[i * (Groups::kBound + 1) + Groups::kBound] = static_cast<double>(i * length);
  }
  Groups groups{rows, 1, rows, table.data(), GroupField::kCount, nullptr, 0};
  if (length) {
    const int64_t columns = Groups::kBound + 1;
    groups = {rows, bounds, 0, table.data(), columns, table.data() + Groups::kBound, columns};
  }
  const Reduction reduction = length ? Reduction::kSequenceMean : Reduction::kMean;
  for (int64_t row = 0; row < rows; ++row) {
    tokens[TokenField::kWeight * rows + row] = kernel == "masked" ? A(0) : A(1);
    tokens[TokenField::kTop * rows + row] = A(10);
    tokens[TokenField::kSum * rows + row] = A(2);
    tokens[TokenField::kTargetMass * rows + row] = A(1);
  }

  if (kernel == "weigh") {
    WeighArgs args{};
    args.groups = groups;
    if (length) args.sequences = groups;
    args.skip_first = length;
    args.steps = rows;
    args.target = target.data();
    args.target_type = DType::kInt64;
    args.classes = cols;
    args.ignore_index = -100;
    args.reduction = reduction;
    args.wide = sizeof(A) == sizeof(double);
    args.weight = tokens.data();
    cpu::weigh(args, alone);
  } else if (kernel == "reduce") {
    A loss;
    ReduceArgs args{};
    args.groups = groups;
    args.reduction = reduction;
    args.table = tokens.data();
    args.wide = sizeof(A) == sizeof(double);
    args.loss = &loss;
    cpu::reduce(args, alone);
  } else if (kernel != "nothing") {
    RowArgs args{};
    args.logits = logits.data();
    args.dtype = dtype;
    args.rows = args.steps = rows;
    args.cols = args.classes = args.step_stride = args.grad_step_stride = cols;
    args.target = target.data();
    args.target_type = DType::kInt64;
    args.table = tokens.data();
    args.forward = kernel != "backward";
    args.dlogits = kernel == "forward" ? nullptr : gradient.data();
    args.stream = true;
    args.groups = groups;
    cpu::kernels().rows[static_cast<int>(dtype)].run(args, 0, rows);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string kernel = argc > 1 ? argv[1] : "", type = argc > 2 ? argv[2] : "";
  const bool known = among(kernel, kKernels) || among(kernel, kDivergences);
  if ((argc != 5 && argc != 6) || !known || !among(type, kTypes)) {
    std::fprintf(stderr, "usage: kernels KERNEL DTYPE ROWS COLS [LENGTH], see kernels.cpp\n");
    return 2;
  }
  const int64_t rows = std::atoll(argv[3]), cols = std::atoll(argv[4]);
  const int64_t length = argc > 5 ? std::atoll(argv[5]) : 0;
  if (type == "fp64") run<double, double>(kernel, DType::kFloat64, rows, cols, length);
  if (type == "fp32") run<float, float>(kernel, DType::kFloat32, rows, cols, length);
  if (type == "bf16") run<BFloat16, float>(kernel, DType::kBFloat16, rows, cols, length);
  if (type == "fp16") run<Float16, float>(kernel, DType::kFloat16, rows, cols, length);
  std::printf("%s\n", cpu::kernels().name);
}
