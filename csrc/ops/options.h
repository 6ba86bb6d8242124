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
#define ML_INPUTS_OR(none)                                                                     \
  "Tensor target, Tensor? mask" none ", Tensor? normalizer" none ", Tensor? class_weight" none \
  ", Tensor? cu_seqlens" none ", Tensor? temperatures" none
#define ML_INPUTS ML_INPUTS_OR("")
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

// Which classes the columns of some logits are: the first of them, and of how many.
#define ML_SHARD "int first, int classes"
struct Shard {
  int64_t first, classes;
};
template <>
struct Fields<const Shard&> {
  using types = Types<int64_t, int64_t>;
};

// What the log-probability of a token means.
#define ML_SCORING \
  "float temperature=1.0, int ignore_index=-100, float? softcap=None, bool shift=False"
struct Scoring {
  double temperature;
  int64_t ignore_index;
  std::optional<double> softcap;
  bool shift;
};
template <>
struct Fields<const Scoring&> {
  using types = Types<double, int64_t, std::optional<double>, bool>;
};

// What a divergence compares with what.
#define ML_DIVERGENCE                                              \
  "float temperature=1.0, float teacher_temperature=1.0, "         \
  "str kind=\"forward_kl\", float beta=0.5, float? softcap=None, " \
  "float? teacher_softcap=None, bool shift=False"
struct DivergenceOptions {
  double temperature, teacher_temperature;
  std::string kind;
  double beta;
  std::optional<double> softcap, teacher_softcap;
  bool shift;
};
template <>
struct Fields<const DivergenceOptions&> {
  using types = Types<double, double, std::string, double, std::optional<double>,
                      std::optional<double>, bool>;
};

// The two sides of it.
#define ML_PAIR \
  "Tensor logits, Tensor teacher_logits, Tensor? temperatures, Tensor? teacher_temperatures"
struct Pair {
  Tensor logits, teacher_logits;
  OptionalTensor temperatures, teacher_temperatures;
};
template <>
struct Fields<const Pair&> {
  using types = Types<Tensor, Tensor, OptionalTensor, OptionalTensor>;
};

}  // namespace masked_loss
