// SPDX-License-Identifier: BSD-3-Clause
// What memory can give: a read that does nothing with the data, a copy that writes around the
// caches. benchmarks/timing.py compiles this file and calls it through ctypes.
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace {

constexpr int64_t kLine = 64;
constexpr int64_t kAhead = 32 * kLine;
using Vector = uint64_t __attribute__((vector_size(kLine)));

// OpenMP, as in PyTorch: its threads are there already and stay on their cores.
template <class F>
void share(int64_t bytes, int threads, const F& f) {
  const int64_t part = bytes / threads / (8 * kLine) * (8 * kLine);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int i = 0; i < threads; ++i) f(i * part, (i + 1) * part, i);
}

}  // namespace

// Both take memory that is aligned to a line and leave out what does not divide evenly.
// What is read is fetched `ahead` bytes before. Far ahead, the addresses of small pages are looked
// up in time; in huge pages, nearer is faster.
extern "C" uint64_t read_memory(const char* from, int64_t bytes, int threads, int64_t ahead) {
  std::vector<Vector> seen(threads);
  share(bytes, threads, [&](int64_t begin, int64_t end, int thread) {
    Vector x[8] = {};
    for (const char* p = from + begin; p < from + end; p += sizeof(x)) {
      for (int i = 0; i < 8; ++i) {
        __builtin_prefetch(p + i * kLine + ahead, 0, 2);
        x[i] |= *reinterpret_cast<const Vector*>(p + i * kLine);
      }
    }
    for (const Vector& v : x) seen[thread] |= v;
  });
  return seen[0][0];
}

extern "C" void copy_memory(char* to, const char* from, int64_t bytes, int threads) {
  share(bytes, threads, [&](int64_t begin, int64_t end, int) {
#if defined(__SSE2__)
    for (int64_t i = begin; i < end; i += kLine) {
      __builtin_prefetch(from + i + kAhead);
      for (int j = 0; j < kLine; j += 16) {
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + i + j),
                         _mm_load_si128(reinterpret_cast<const __m128i*>(from + i + j)));
      }
    }
    _mm_sfence();
#else
    std::memcpy(to + begin, from + begin, end - begin);
#endif
  });
}
