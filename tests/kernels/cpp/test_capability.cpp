// SPDX-License-Identifier: BSD-3-Clause
// ATEN_CPU_CAPABILITY chooses among the instruction sets that this machine has, as in PyTorch: a
// name that is not one of them is as none, and gives the best. On aarch64 "default", which is NEON,
// is all there is.
//
//   test_capability [VALUE]     VALUE is what ATEN_CPU_CAPABILITY was set to
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "kernels/cpu/backend.h"

using namespace masked_loss;

namespace {

int failures = 0;

void expect(const std::string& got, const std::string& expected, const char* what) {
  if (got == expected) return;
  ++failures;
  std::printf("%s is %s, expected %s\n", what, got.c_str(), expected.c_str());
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<std::string> names;
  for (const cpu::Kernels* table : cpu::available()) names.push_back(table->name);
  expect(names.back(), "default", "the last instruction set");
#if !defined(__x86_64__)
  expect(names.front(), "default", "the best instruction set");
#endif
  std::string chosen = names.front();
  for (const std::string& name : names) {
    if (argc > 1 && name == argv[1]) chosen = name;
  }
  if (argc > 1) expect(cpu::kernels().name, chosen, argv[1]);
  std::printf("%s of", cpu::kernels().name);
  for (const std::string& name : names) std::printf(" %s", name.c_str());
  std::printf("\n%d failures\n", failures);
  return failures ? 1 : 0;
}
