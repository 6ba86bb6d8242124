// SPDX-License-Identifier: BSD-3-Clause
// A failed assertion stops a kernel, not the process. No guard: <cassert> includes this again.

namespace emulator {
[[noreturn]] void fail(const char* what);
}

#undef assert
#if defined(NDEBUG)
#define assert(condition) void()
#else
#define assert(condition) \
  ((condition) ? void() : ::emulator::fail("device-side assert triggered: " #condition))
#endif
