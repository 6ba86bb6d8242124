// SPDX-License-Identifier: BSD-3-Clause
// Chooses the instruction set once, and shares rows out to threads.
#include "kernels/cpu/backend.h"

#include <algorithm>
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

// Rows so few that a thread each would leave threads idle: their segments are shared out.
void share_segments(const RowArgs& args, const RowKernels& kernels, const Threads& threads) {
  const int64_t segments = (args.cols + kSegment - 1) / kSegment;
  const int64_t tasks = args.rows * segments;
  if (args.forward) {
    std::vector<char> partials(tasks * kPartialBytes);
    const auto partial = [&](int64_t row) { return &partials[row * segments * kPartialBytes]; };
    for_each_task(tasks, threads, [&](int64_t i) {
      kernels.look(args, i / segments, i % segments, partial(i / segments));
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
    return *found.front();  // unset, or not supported here: the best
  }();
  return chosen;
}

void cross_entropy(const RowArgs& args, const Threads& threads, const Kernels& table) {
  const RowKernels& rows = table.rows[static_cast<int>(args.dtype)];
  if (args.rows < 4 * threads.count && args.cols >= 2 * kSegment) {
    return share_segments(args, rows, threads);
  }
  share(args.rows, args.cols, threads,
        [&](int64_t begin, int64_t end) { rows.run(args, begin, end); });
}

void rescale(const RowArgs& args, const Threads& threads) {
  const bool one = args.dtype == DType::kFloat64
                       ? *static_cast<const double*>(args.upstream[0].values) == 1
                       : *static_cast<const float*>(args.upstream[0].values) == 1;
  if (!one) cross_entropy(args, threads);
}

void divergence(const DivergenceArgs& args, const Threads& threads, const Kernels& table) {
  const bool one = args.unless_one && (args.wide ? *static_cast<const double*>(args.dloss) == 1
                                                 : *static_cast<const float*>(args.dloss) == 1);
  if (one) return;
  // A row is never shared out: 150,000 classes take a third of a millisecond, their head's product
  // a multiple of that, and what trains has more rows than threads.
  const int64_t bytes = pair_scratch(args.cols) * (args.wide ? sizeof(double) : sizeof(float));
  share(args.rows, 2 * args.cols, threads, [&](int64_t begin, int64_t end) {
    // Kept: pages that come fresh from the system would take longer than the rows.
    static thread_local std::vector<char> scratch;
    if (static_cast<int64_t>(scratch.size()) < bytes) scratch.resize(bytes);
    table.divergence(args, begin, end, scratch.data());
  });
}

namespace {

template <auto kernel, class Args>
auto on_threads(const Args& args, Queue queue) {
  return kernel(args, *static_cast<const Threads*>(queue));
}
void rows_of_this_machine(const RowArgs& args, const Threads& threads) {
  cross_entropy(args, threads);
}
void pairs_of_this_machine(const DivergenceArgs& args, const Threads& threads) {
  divergence(args, threads);
}
template <class Args>
int64_t no_scratch(const Args&) {
  return 0;
}

}  // namespace

const Backend kBackend = {on_threads<&weigh>,
                          on_threads<&rows_of_this_machine>,
                          on_threads<&merge>,
                          on_threads<&rescale>,
                          on_threads<&pairs_of_this_machine>,
                          on_threads<&load_values>,
                          on_threads<&reduce>,
                          on_threads<&mask_grad>,
                          on_threads<&values_grad>,
                          on_threads<&scale>,
                          no_scratch,
                          no_scratch,
                          no_scratch,
                          4 << 20};

}  // namespace masked_loss::cpu
