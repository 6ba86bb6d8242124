// SPDX-License-Identifier: BSD-3-Clause
// The masked loss in a C++ program: load the library, look the operator up, call it. Forward only:
// the autograd formulas are masked_loss/_op/cross_entropy.py.
//   masked_cross_entropy build/cmake/libmasked_loss.so     (or masked_loss/_C.so)
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <dlfcn.h>

#include <iostream>

int main(int argc, char** argv) {
  if (argc != 2 || !dlopen(argv[1], RTLD_NOW)) {
    std::cerr << "usage: masked_cross_entropy LIBRARY\n" << (argc == 2 ? dlerror() : "") << '\n';
    return 1;
  }
  auto op = c10::Dispatcher::singleton().findSchemaOrThrow("masked_loss::cross_entropy", "");
  at::Tensor logits = at::zeros({2, 3, 7}), target = at::ones({2, 3}, at::kLong);
  at::Tensor mask = at::tensor({1, 1, 0, 1, 0, 0}).view({2, 3});
  std::vector<c10::IValue> arguments{logits, target, mask};
  op.schema().checkAndNormalizeInputs(arguments, {{"reduction", "mean"}});
  op.callBoxed(&arguments);
  std::cout << arguments[0].toTensor().item<double>() << '\n';  // equal logits: log 7 = 1.94591
}
