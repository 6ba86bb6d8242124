// SPDX-License-Identifier: BSD-3-Clause
// The options of the losses, as masked_loss/options.py has them: every schema of a cross entropy
// ends in ML_OPTIONS, and its function begins with Options. check::formula has their ranges.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#define ML_OPTIONS                                                             \
  "str reduction=\"mean\", int ignore_index=-100, float label_smoothing=0.0, " \
  "float z_loss=0.0, float? softcap=None, float temperature=1.0, bool shift=False"

namespace masked_loss {

struct Options {
  std::string reduction;
  int64_t ignore_index;
  double label_smoothing, z_loss;
  std::optional<double> softcap;
  double temperature;
  bool shift;
};

template <class...>
struct Types {};
// Of the fields of Options, which the dispatcher gives one by one.
using OptionTypes =
    Types<std::string, int64_t, double, double, std::optional<double>, double, bool>;

// A function as the dispatcher calls it: with the options one by one, behind the other arguments.
template <class Result, class... Args>
struct Plain {
  template <auto function>
  static Result call(Args... args) {
    return function(std::move(args)...);
  }
};
template <class Result, class Args, class Each>
struct WithOptions;
template <class Result, class... Args, class... Each>
struct WithOptions<Result, Types<Args...>, Types<Each...>> {
  template <auto function>
  static Result call(Args... args, Each... options) {
    return function(Options{std::move(options)...}, std::move(args)...);
  }
};
template <class Result, class... Args>
Plain<Result, Args...> kind_of(Result (*)(Args...));
template <class Result, class... Args>
WithOptions<Result, Types<Args...>, OptionTypes> kind_of(Result (*)(const Options&, Args...));

template <auto function>
constexpr auto flat = &decltype(kind_of(function))::template call<function>;

}  // namespace masked_loss
