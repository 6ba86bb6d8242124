// SPDX-License-Identifier: BSD-3-Clause
// Which block a pair of rows gets: threads and shared memory.
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/numbers.cuh"
#include "kernels/cuda/pairs.h"

namespace masked_loss::cuda {
namespace {

// Threads by the bytes of both rows, whatever their number: a token has the same bits in every
// batch. The first entry whose pairs are long enough serves one.
struct Block {
  int64_t up_to;
  int threads;
};
constexpr Block kBlocks[] = {{2 << 10, 32},   {16 << 10, 64},   {32 << 10, 128},
                             {64 << 10, 256}, {232 << 10, 512}, {INT64_MAX, 1024}};

// On a multiprocessor, as pairs.inl.cuh bounds their registers.
constexpr int64_t kThreadsPlanned = 1024;
constexpr int64_t kMaxBlocks = 32;

// Shared memory that a kernel and the system want for themselves.
constexpr int64_t kReservedShared = 4 << 10;

PairPlan plan_pairs(const DivergenceArgs& args) {
  const int64_t classes = size_of(args.student.dtype) + size_of(args.teacher.dtype);
  const int64_t bytes = args.cols * classes;
  const Block* entry = kBlocks;
  while (bytes > entry->up_to) ++entry;
  const int64_t blocks = std::min(kThreadsPlanned / entry->threads, kMaxBlocks);
  PairPlan plan{entry->threads, blocks * chip().multiprocessors, 0};
  if (args.forward) {
    const int64_t share =
        std::min(chip().shared_of_multiprocessor / blocks, chip().shared_of_block);
    plan.shared = std::max<int64_t>(0, share - kReservedShared);
  }
  return plan;
}

}  // namespace

void divergence(const DivergenceArgs& args, Stream stream) {
  if (args.rows == 0 || args.cols == 0) return;
  const bool half = args.student.dtype == DType::kBFloat16 || args.student.dtype == DType::kFloat16;
  const auto launch_pairs = half ? launch_half_pairs : launch_full_pairs;
  launch_pairs(args, plan_pairs(args), stream);
}

}  // namespace masked_loss::cuda
