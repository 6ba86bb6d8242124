// SPDX-License-Identifier: BSD-3-Clause
// Which blocks of a launch touch which bytes: two that touch the same one, of which one writes it,
// depend on an order that a device does not promise.
//
// Kernels built with -fsanitize=thread call these functions at each access of memory, and would
// find them in a sanitizer that knows of threads, not of blocks; here they find ours. What is
// private to a block is left out: its threads' stacks, its shared memory.
#include <cuda_runtime.h>
#include <link.h>

#include <cstddef>
#include <string>
#include <unordered_map>

namespace emulator {
namespace {

constexpr int kNone = -1, kSeveral = -2;

struct Byte {
  int reader = kNone, writer = kNone;  // blocks
};
std::unordered_map<uintptr_t, Byte> touched;
int64_t of_launch = 0;

struct Range {
  uintptr_t begin = 0, end = 0;
};

// This file's thread-local memory, which stands for shared memory.
Range shared_range() {
  Range found;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* result) {
        const auto self = reinterpret_cast<uintptr_t>(&shared_range);
        bool ours = false;
        size_t size = 0;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& header = info->dlpi_phdr[i];
          const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
          if (header.p_type == PT_LOAD) ours |= begin <= self && self < begin + header.p_memsz;
          if (header.p_type == PT_TLS) size = header.p_memsz;
        }
        if (!ours || !info->dlpi_tls_data) return 0;
        const auto begin = reinterpret_cast<uintptr_t>(info->dlpi_tls_data);
        *static_cast<Range*>(result) = {begin, begin + size};
        return 1;
      },
      &found);
  return found;
}

void note(uintptr_t address, bool write) {
  const int block = static_cast<int>(blockIdx.x);
  Byte& byte = touched[address];
  const auto other = [block](int who) { return who != kNone && who != block; };
  if (other(byte.writer) || (write && other(byte.reader))) {
    if (conflict.empty()) {
      conflict = "block " + std::to_string(block) + (write ? " writes" : " reads") +
                 " what another block of the launch " + (other(byte.writer) ? "writes" : "reads");
    }
  }
  if (write) {
    byte.writer = block;
  } else {
    byte.reader = byte.reader == kNone || byte.reader == block ? block : kSeveral;
  }
}

void access(const void* p, size_t bytes, bool write) {
  if (!in_kernel() || on_stack(p)) return;
  static const Range shared = shared_range();
  const auto address = reinterpret_cast<uintptr_t>(p);
  if (shared.begin <= address && address < shared.end) return;
  if (of_launch != launches) {
    of_launch = launches;
    touched.clear();
  }
  for (size_t i = 0; i < bytes; ++i) note(address + i, write);
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
