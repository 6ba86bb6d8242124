// SPDX-License-Identifier: BSD-3-Clause
// A failed assertion stops a kernel, not the process. No guard: <cassert> includes this again.

namespace emulator {
[[noreturn]] void fail(const char* what);
}

#undef assert
#define assert(condition) \
  ((condition) ? void() : ::emulator::fail("device-side assert triggered: " #condition))
