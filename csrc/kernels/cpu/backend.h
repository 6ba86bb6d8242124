// SPDX-License-Identifier: BSD-3-Clause
// The CPU backend: what ops call, and the table of kernels that each instruction set fills.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/args.h"
#include "kernels/backend.h"
#include "kernels/cpu/schedule.h"

namespace masked_loss::cpu {

// Columns that one step of a row takes. Part of the result: it fixes the order of every sum.
constexpr int64_t kSegment = 16384;

// What a look at a segment tells of it, at most.
constexpr int64_t kPartialBytes = 4 * sizeof(double);

// Kernels on rows [begin, end), or on one segment of one row.
struct RowKernels {
  void (*run)(const RowArgs& args, int64_t begin, int64_t end);
  void (*look)(const RowArgs& args, int64_t row, int64_t segment, void* partial);
  void (*finish)(const RowArgs& args, int64_t row, const void* partial);
  void (*grad)(const RowArgs& args, int64_t row, int64_t segment);
};

// Columns of a pair of rows that are looked at together: ten rows of them fit into a first cache.
constexpr int64_t kPairBlock = 1024;
constexpr int64_t pair_blocks(int64_t cols) { return (cols + kPairBlock - 1) / kPairBlock; }

// What looks at a pair leave for the next: three rows, and two numbers a block.
constexpr int64_t pair_scratch(int64_t cols) { return 3 * cols + 2 * pair_blocks(cols); }

struct Kernels {
  const char* name;
  RowKernels rows[4];  // by DType: fp64, fp32, bf16, fp16
  // Of pairs of rows; scratch: pair_scratch(cols) numbers of the accumulation type.
  void (*divergence)(const DivergenceArgs& args, int64_t begin, int64_t end, void* scratch);
};

// The instruction sets that this machine has, best first.
std::vector<const Kernels*> available();

// The best of them that ATEN_CPU_CAPABILITY (default, avx2, avx512) allows.
const Kernels& kernels();

// Weights and scales. Returns where the first target is out of range, or -1.
int64_t weigh(const WeighArgs& args, const Threads& threads);
void cross_entropy(const RowArgs& args, const Threads& threads, const Kernels& table = kernels());
void divergence(const DivergenceArgs& args, const Threads& threads,
                const Kernels& table = kernels());
void merge(const MergeArgs& args, const Threads& threads);
// The gradient anew where dloss is not 1, for which args.dlogits holds it already.
void rescale(const RowArgs& args, const Threads& threads);
void load_values(const ValuesArgs& args, const Threads& threads);
void reduce(const ReduceArgs& args, const Threads& threads);
void mask_grad(const MaskGradArgs& args, const Threads& threads);
void values_grad(const ValuesArgs& args, const Threads& threads);
void scale(const ScaleArgs& args, const Threads& threads);

// All of these; the queue is a const Threads.
extern const Backend kBackend;

}  // namespace masked_loss::cpu
