// SPDX-License-Identifier: BSD-3-Clause
// The options of the losses, as masked_loss/options.py has them: every schema of a cross entropy
// ends in ML_OPTIONS, and its function begins with Options.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#define ML_OPTIONS                                                             \
  "str reduction=\"mean\", int ignore_index=-100, float label_smoothing=0.0, " \
  "float z_loss=0.0, float? softcap=None, bool shift=False"

namespace masked_loss {

struct Options {
  std::string reduction;
  int64_t ignore_index;
  double label_smoothing, z_loss;
  std::optional<double> softcap;
  bool shift;
};

// A function as the dispatcher calls it: with the options one by one, behind the other arguments.
template <class Result, class... Args>
struct Plain {
  template <auto function>
  static Result call(Args... args) {
    return function(std::move(args)...);
  }
};
template <class Result, class... Args>
struct WithOptions {
  template <auto function>
  static Result call(Args... args, std::string reduction, int64_t ignore_index,
                     double label_smoothing, double z_loss, std::optional<double> softcap,
                     bool shift) {
    return function({std::move(reduction), ignore_index, label_smoothing, z_loss, softcap, shift},
                    std::move(args)...);
  }
};
template <class Result, class... Args>
Plain<Result, Args...> kind_of(Result (*)(Args...));
template <class Result, class... Args>
WithOptions<Result, Args...> kind_of(Result (*)(const Options&, Args...));

template <auto function>
constexpr auto flat = &decltype(kind_of(function))::template call<function>;

}  // namespace masked_loss
