// SPDX-License-Identifier: BSD-3-Clause
// Chooses the instruction set once, and shares rows out to threads.
#include "kernels/cpu/backend.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <string_view>
#include <vector>

namespace masked_loss::cpu {

namespace isa_default {
extern const Kernels kKernels;
}
#if defined(__x86_64__)
namespace isa_avx2 {
extern const Kernels kKernels;
}
namespace isa_avx512 {
extern const Kernels kKernels;
}
#endif

namespace {

// Work smaller than this is not worth waking a thread for; a task is at least this large, and
// larger where a thread still gets many: within a task the next row is fetched ahead.
constexpr int64_t kTaskElements = 1 << 16;
constexpr int64_t kTasksPerThread = 32;

// Tasks are taken, not dealt: masked rows cost nothing, so equal shares would not be equal work.
template <class F>
void for_each_task(int64_t tasks, const Threads& threads, const F& task) {
  if (tasks <= 1 || threads.count <= 1) {
    for (int64_t i = 0; i < tasks; ++i) task(i);
    return;
  }
  std::atomic<int64_t> next{0};
  threads.run([&] {
    for (int64_t i = next++; i < tasks; i = next++) task(i);
  });
}

// Rows so few that a thread each would leave threads idle: their segments are shared out.
void share_segments(const CrossEntropyArgs& args, const RowKernels& kernels,
                    const Threads& threads) {
  const int64_t segments = (args.cols + kSegment - 1) / kSegment;
  const int64_t tasks = args.rows * segments;
  if (args.forward) {
    constexpr int64_t kPartialBytes = 2 * sizeof(double);
    std::vector<char> partials(tasks * kPartialBytes);
    const auto partial = [&](int64_t row) { return &partials[row * segments * kPartialBytes]; };
    for_each_task(tasks, threads, [&](int64_t i) {
      kernels.lse(args, i / segments, i % segments, partial(i / segments));
    });
    for_each_task(args.rows, threads,
                  [&](int64_t row) { kernels.finish(args, row, partial(row)); });
  }
  if (args.dlogits) {
    for_each_task(tasks, threads,
                  [&](int64_t i) { kernels.grad(args, i / segments, i % segments); });
  }
}

}  // namespace

std::vector<const Kernels*> available() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512) found.push_back(&isa_avx512::kKernels);
  if (avx2) found.push_back(&isa_avx2::kKernels);
#endif
  found.push_back(&isa_default::kKernels);
  return found;
}

const Kernels& kernels() {
  static const Kernels& chosen = [&]() -> const Kernels& {
    const std::vector<const Kernels*> found = available();
    const char* asked = std::getenv("ATEN_CPU_CAPABILITY");
    for (const Kernels* table : found) {
      if (asked && std::string_view(asked) == table->name) return *table;
    }
    return *found.front();  // not asked for, or not to be had here: the best
  }();
  return chosen;
}

void cross_entropy(const CrossEntropyArgs& args, const Threads& threads, const Kernels& table) {
  const RowKernels& rows = table.rows[static_cast<int>(args.dtype)];
  if (args.rows < 4 * threads.count && args.cols >= 2 * kSegment) {
    return share_segments(args, rows, threads);
  }
  const int64_t size = std::max({int64_t{1}, kTaskElements / std::max<int64_t>(1, args.cols),
                                 args.rows / (kTasksPerThread * threads.count)});
  for_each_task((args.rows + size - 1) / size, threads,
                [&](int64_t i) { rows.run(args, i * size, std::min((i + 1) * size, args.rows)); });
}

void rescale(const CrossEntropyArgs& args, const Threads& threads) {
  const bool one = args.dtype == DType::kFloat64 ? *static_cast<const double*>(args.dloss) == 1
                                                 : *static_cast<const float*>(args.dloss) == 1;
  if (!one) cross_entropy(args, threads);
}

}  // namespace masked_loss::cpu
