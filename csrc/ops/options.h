// SPDX-License-Identifier: BSD-3-Clause
// What the operators are given, as records: the part of a schema, the fields, and their types, in
// one order. masked_loss/options.py has the same options; check.h their ranges.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>

#include "ops/records.h"

namespace masked_loss {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// What a cross entropy means: every schema of one ends in this.
#define ML_OPTIONS                                                             \
  "str reduction=\"mean\", int ignore_index=-100, float label_smoothing=0.0, " \
  "float z_loss=0.0, float? softcap=None, float temperature=1.0, bool shift=False"
struct Options {
  std::string reduction;
  int64_t ignore_index;
  double label_smoothing, z_loss;
  std::optional<double> softcap;
  double temperature;
  bool shift;
};
template <>
struct Fields<const Options&> {
  using types = Types<std::string, int64_t, double, double, std::optional<double>, double, bool>;
};

// The tensors that it is computed of besides the logits.
#define ML_INPUTS                                                                               \
  "Tensor target, Tensor? mask, Tensor? normalizer, Tensor? class_weight, Tensor? cu_seqlens, " \
  "Tensor? temperatures"
#define ML_PUBLIC_INPUTS                                           \
  "Tensor target, Tensor? mask=None, *, Tensor? normalizer=None, " \
  "Tensor? class_weight=None, Tensor? cu_seqlens=None, Tensor? temperatures=None"
struct Inputs {
  Tensor target;
  OptionalTensor mask, normalizer, class_weight, cu_seqlens, temperatures;
};
template <>
struct Fields<const Inputs&> {
  using types =
      Types<Tensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor>;
};

// What is left of them when the tables are filled.
#define ML_SAVED \
  "Tensor target, Tensor tokens, Tensor groups, Tensor? class_weight, Tensor? temperatures"
struct Saved {
  Tensor target, tokens, groups;
  OptionalTensor class_weight, temperatures;
};
template <>
struct Fields<const Saved&> {
  using types = Types<Tensor, Tensor, Tensor, OptionalTensor, OptionalTensor>;
};

}  // namespace masked_loss
