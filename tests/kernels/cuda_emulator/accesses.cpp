// SPDX-License-Identifier: BSD-3-Clause
// Which blocks of a launch touch which bytes, and which threads of a block which bytes of its
// shared memory: two that touch the same one, of which one writes it, depend on an order that a
// device does not promise, unless a barrier of both lies between.
//
// Kernels built with -fsanitize=thread call these functions at each access of memory, and would
// find them in a sanitizer that knows of threads, not of blocks; here they find ours. What is
// private to a thread, its stack, is left out.
#include <cuda_runtime.h>

#include <cstddef>
#include <string>
#include <unordered_map>

namespace emulator {
namespace {

constexpr int kNone = -1, kSeveral = -2, kWarp = 32;

struct Access {
  int block = kNone, warp = kNone, thread = kNone;
  int64_t block_barriers = 0, warp_barriers = 0;  // that lie behind it
  int cluster = kNone;
  int64_t cluster_barriers = 0;
};
// The latest ones of a byte.
struct Byte {
  Access read, write;
};
std::unordered_map<uintptr_t, Byte> touched;
int64_t of_launch = 0;

// A barrier of the warp orders what its own lanes do, one of the block what all threads do, one of
// the cluster what all of its blocks do.
bool is_before(const Access& then, const Access& now) {
  if (then.cluster == now.cluster && then.cluster_barriers < now.cluster_barriers) return true;
  if (then.block != now.block) return false;
  if (then.block_barriers < now.block_barriers) return true;
  return then.warp == now.warp && then.warp_barriers < now.warp_barriers;
}

bool is_race(const Access& then, const Access& now) {
  if (then.block == kNone || is_before(then, now)) return false;
  return then.block != now.block || then.thread != now.thread;
}

Access both(const Access& then, Access now) {
  if (then.block == kNone || is_before(then, now)) return now;
  if (then.cluster != now.cluster) now.cluster = kSeveral;
  if (then.block != now.block) now.block = kSeveral;
  if (then.warp != now.warp) now.warp = kSeveral;
  if (then.thread != now.thread) now.thread = kSeveral;
  return now;
}

std::string name_of(int number) { return number == kSeveral ? "several" : std::to_string(number); }

void complain(const Access& then, const Access& now, bool wrote, bool writes, bool shared) {
  if (!conflict.empty()) return;
  const auto who = [](const Access& a) {
    return "thread " + name_of(a.thread) + " of block " + name_of(a.block);
  };
  conflict = who(now) + (writes ? " writes " : " reads ") + (shared ? "shared" : "global") +
             " memory that " + who(then) + (wrote ? " wrote" : " read") +
             ", and no barrier of both lies between";
}

void note(uintptr_t address, bool write, bool shared) {
  const int thread = static_cast<int>(threadIdx.x);
  // Shared memory is every block's own; between one block and the next lies a barrier, here.
  const int block = shared ? 0 : static_cast<int>(blockIdx.x);
  const Access now{block,
                   thread / kWarp,
                   thread,
                   barriers_of_block(),
                   barriers_of_warp(),
                   cluster_of_block(),
                   barriers_of_cluster()};
  Byte& byte = touched[address];
  if (is_race(byte.write, now)) complain(byte.write, now, true, write, shared);
  if (write && is_race(byte.read, now)) complain(byte.read, now, false, write, shared);
  if (write) {
    byte.write = now;
  } else {
    byte.read = both(byte.read, now);
  }
}

void access(const void* p, size_t bytes, bool write) {
  if (!in_kernel() || on_stack(p)) return;
  static const Range range = shared_range();
  const auto address = reinterpret_cast<uintptr_t>(p);
  const bool shared = range.begin <= address && address < range.end;
  if (of_launch != launches) {
    of_launch = launches;
    touched.clear();
  }
  for (size_t i = 0; i < bytes; ++i) note(address + i, write, shared);
}

}  // namespace
}  // namespace emulator

#define WATCH(bytes)                                                                \
  void __tsan_read##bytes(void* p) { emulator::access(p, bytes, false); }           \
  void __tsan_write##bytes(void* p) { emulator::access(p, bytes, true); }           \
  void __tsan_unaligned_read##bytes(void* p) { emulator::access(p, bytes, false); } \
  void __tsan_unaligned_write##bytes(void* p) { emulator::access(p, bytes, true); } \
  void __tsan_volatile_read##bytes(void* p) { emulator::access(p, bytes, false); }  \
  void __tsan_volatile_write##bytes(void* p) { emulator::access(p, bytes, true); }

extern "C" {
WATCH(1)
WATCH(2)
WATCH(4)
WATCH(8)
WATCH(16)
void __tsan_read_range(void* p, size_t bytes) { emulator::access(p, bytes, false); }
void __tsan_write_range(void* p, size_t bytes) { emulator::access(p, bytes, true); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
