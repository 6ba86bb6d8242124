// SPDX-License-Identifier: BSD-3-Clause
// How work is shared between threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>

namespace masked_loss::cpu {

// Threads that somebody else owns: run(worker) calls worker on up to `count` of them.
struct Threads {
  int64_t count;
  std::function<void(const std::function<void()>& worker)> run;
};

// Work smaller than this is done before another thread has woken up; a task is at least this large,
// and larger where a thread still gets many: within a task the next row is fetched ahead.
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

// f(begin, end) over all of [0, items), where `work` elements are gone through for an item.
template <class F>
void share(int64_t items, int64_t work, const Threads& threads, const F& f) {
  const int64_t size = std::max({int64_t{1}, kTaskElements / std::max<int64_t>(1, work),
                                 items / (kTasksPerThread * threads.count)});
  for_each_task((items + size - 1) / size, threads,
                [&](int64_t i) { f(i * size, std::min((i + 1) * size, items)); });
}

}  // namespace masked_loss::cpu
