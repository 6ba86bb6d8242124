// SPDX-License-Identifier: BSD-3-Clause
// Numbers compared with what they should be; a test's main() returns whether any failed.
#pragma once

#include <cmath>
#include <cstdio>
#include <string>

#include "numbers.h"

namespace masked_loss {

inline int failures = 0;

inline void compare(const Numbers& got, const Numbers& expected, double relative, double absolute,
                    const std::string& what) {
  for (size_t i = 0; i < expected.size(); ++i) {
    if (std::abs(got[i] - expected[i]) <= relative * std::abs(expected[i]) + absolute) continue;
    ++failures;
    std::printf("%s %zu is %.9g, expected %.9g\n", what.c_str(), i, got[i], expected[i]);
  }
}

}  // namespace masked_loss
