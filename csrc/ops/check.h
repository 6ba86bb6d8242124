// SPDX-License-Identifier: BSD-3-Clause
// Every argument check of the operators: who, what was expected, what came. The fakes say the same
// of tensors on the meta device, in masked_loss/_op/checks.py; a test compares the texts.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>

#include "kernels/args.h"
#include "ops/check_tensor.h"
#include "ops/options.h"

namespace masked_loss::check {

inline DType class_indices(const char* who, const Tensor& target) {
  const auto type = dtype_of(target);
  if (type != DType::kInt64 && type != DType::kInt32) {
    fail("TypeError", who, ": target must be int64 or int32 class indices, got ",
         name_of(target.scalar_type()));
  }
  return *type;
}

inline void is_mask(const char* who, const Tensor& mask, const Shape& expected) {
  if (!dtype_of(mask) && !is_wide_unsigned(mask)) {
    fail("TypeError", who, ": mask must be bool, integer or floating, got ",
         name_of(mask.scalar_type()));
  }
  has_shape(who, "mask", mask, expected);
}

inline Reduction reduction(const char* who, const std::string& name, int64_t target_dims,
                           const std::optional<Tensor>& normalizer) {
  const Reduction parsed = name == "none"            ? Reduction::kNone
                           : name == "sum"           ? Reduction::kSum
                           : name == "mean"          ? Reduction::kMean
                           : name == "sequence_mean" ? Reduction::kSequenceMean
                                                     : Reduction(-1);
  if (parsed == Reduction(-1)) {
    fail("ValueError", who,
         ": reduction must be \"none\", \"sum\", \"mean\" or \"sequence_mean\", got \"", name,
         "\"");
  }
  if (parsed == Reduction::kSequenceMean && target_dims == 0) {
    fail("ValueError", who, ": reduction=\"sequence_mean\" needs a time dimension, got a scalar");
  }
  if (normalizer) {
    if (parsed == Reduction::kNone) {
      fail("ValueError", who, ": normalizer goes with a reduction, got reduction=\"none\"");
    }
    if (normalizer->dim() != 0) {
      fail("ValueError", who, ": normalizer must be a number or a 0-dim tensor, got shape ",
           text(shape_of(*normalizer)));
    }
  }
  return parsed;
}

// A result for each sequence: of the last dimension, or of cu_seqlens.
inline void per_sequence(const char* who, Reduction reduction, const std::string& name,
                         int64_t dims) {
  if (reduction != Reduction::kSum && reduction != Reduction::kMean) {
    fail("ValueError", who,
         ": a result for each sequence needs reduction=\"mean\" or \"sum\", got \"", name, "\"");
  }
  if (dims == 0) {
    fail("ValueError", who, ": a result for each sequence needs a time dimension, got a scalar");
  }
}

// [S + 1] bounds of the sequences in the flattened tokens. On CUDA the values are asserted where
// they are read: to look at them here, the host would wait.
inline void cu_seqlens(const char* who, const Tensor& bounds, int64_t tokens) {
  const auto type = dtype_of(bounds);
  if (type != DType::kInt64 && type != DType::kInt32) {
    fail("TypeError", who, ": cu_seqlens must be int64 or int32, got ",
         name_of(bounds.scalar_type()));
  }
  if (bounds.dim() != 1 || bounds.numel() == 0) {
    fail("ValueError", who, ": cu_seqlens must have shape [S + 1], got ", text(shape_of(bounds)));
  }
  if (!bounds.is_cpu()) return;
  const int64_t step = bounds.strides()[0];
  int64_t before = 0;
  for (int64_t i = 0; i < bounds.numel(); ++i) {
    const int64_t bound = type == DType::kInt64
                              ? static_cast<const int64_t*>(bounds.data_ptr())[i * step]
                              : static_cast<const int32_t*>(bounds.data_ptr())[i * step];
    if (i == 0 ? bound != 0 : bound < before || bound > tokens) {
      fail("ValueError", who, ": cu_seqlens must ascend from 0 to at most ", tokens,
           ", the number of tokens; got cu_seqlens[", i, "] = ", bound,
           i == 0 ? "" : " after " + std::to_string(before));
    }
    before = bound;
  }
}

inline void class_weight(const char* who, const Tensor& weight, int64_t classes) {
  floating(who, "class_weight", weight);
  has_shape(who, "class_weight", weight, {classes});
}

// As the kernels take it: 0 for none.
inline double softcap(const char* who, const std::optional<double>& softcap) {
  if (softcap && !(*softcap > 0 && std::isfinite(*softcap))) {
    fail("ValueError", who, ": softcap must be greater than 0 and finite, got ", *softcap);
  }
  return softcap.value_or(0);
}

inline void temperature(const char* who, const char* what, double value) {
  if (!(value > 0 && std::isfinite(value))) {
    fail("ValueError", who, ": ", what, " must be greater than 0 and finite, got ", value);
  }
}

inline void temperatures(const char* who, const OptionalTensor& t, const Shape& tokens,
                         const char* what = "temperatures") {
  if (!t) return;
  floating(who, what, *t);
  has_shape(who, what, *t, tokens);
}

// As the kernels take it.
inline Formula formula(const char* who, const Options& options) {
  const double cap = softcap(who, options.softcap);
  const double label_smoothing = options.label_smoothing, z_loss = options.z_loss;
  if (!(label_smoothing >= 0 && label_smoothing <= 1)) {
    fail("ValueError", who, ": label_smoothing must be between 0 and 1, got ", label_smoothing);
  }
  if (!(z_loss >= 0 && std::isfinite(z_loss))) {
    fail("ValueError", who, ": z_loss must be at least 0 and finite, got ", z_loss);
  }
  temperature(who, "temperature", options.temperature);
  return {label_smoothing, z_loss, cap, options.temperature};
}

// The parameters of a divergence. A skew of 0 is none.
inline Divergence divergence(const char* who, const std::string& name, double beta) {
  const Divergence kind = name == "forward_kl"        ? Divergence::kForwardKl
                          : name == "reverse_kl"      ? Divergence::kReverseKl
                          : name == "jsd"             ? Divergence::kJsd
                          : name == "skew_forward_kl" ? Divergence::kSkewForwardKl
                          : name == "skew_reverse_kl" ? Divergence::kSkewReverseKl
                                                      : Divergence(-1);
  if (kind == Divergence(-1)) {
    fail("ValueError", who,
         ": kind must be one of forward_kl, reverse_kl, jsd, skew_forward_kl, skew_reverse_kl, "
         "got \"",
         name, "\"");
  }
  if (kind == Divergence::kJsd && !(beta > 0 && beta < 1)) {
    fail("ValueError", who, ": beta must be above 0 and below 1 for \"jsd\", got ", beta,
         ": it tends to 0 there; the KL divergences are kind=\"forward_kl\" and "
         "kind=\"reverse_kl\"");
  }
  const bool skewed = kind == Divergence::kSkewForwardKl || kind == Divergence::kSkewReverseKl;
  if (skewed && !(beta >= 0 && beta < 1)) {
    fail("ValueError", who, ": beta must be at least 0 and below 1 for \"", name, "\", got ", beta);
  }
  if (beta == 0 && kind == Divergence::kSkewForwardKl) return Divergence::kForwardKl;
  if (beta == 0 && kind == Divergence::kSkewReverseKl) return Divergence::kReverseKl;
  return kind;
}

// The tokens' shape of rows of logits.
inline Shape tokens_of(const char* who, const Tensor& logits, bool shift) {
  floating(who, "logits", logits);
  Shape shape = shape_of(logits);
  if (shape.empty()) fail("ValueError", who, ": logits must have shape [..., V], got []");
  shape.pop_back();
  if (shift && shape.empty()) {
    fail("ValueError", who, ": shift needs logits [..., T, V], got ", text(shape_of(logits)));
  }
  return shape;
}

inline void has_classes(const char* who, const Tensor& logits) {
  const Shape shape = shape_of(logits);
  const bool some_row = std::find(shape.begin(), shape.end() - 1, 0) == shape.end() - 1;
  if (shape.back() == 0 && some_row) {
    fail("ValueError", who, ": logits must have at least one class, got shape ", text(shape));
  }
}

// Of rows that are not cut into parts: a CUDA kernel's index into one is an int.
inline void fits_a_row(const char* who, const char* what, int64_t classes) {
  constexpr int64_t kMost = 1 << 29;
  if (classes > kMost) {
    fail("ValueError", who, ": ", what, " must have at most ", kMost, " classes, got ", classes);
  }
}

// Columns of logits as a shard of the classes, which may be none.
inline void shard(const char* who, const Tensor& logits, const Shard& shard) {
  const int64_t columns = shape_of(logits).back();
  fits_a_row(who, "a shard", columns);
  if (shard.first < 0 || shard.first + columns > shard.classes) {
    fail("ValueError", who, ": a shard of ", columns, " classes from ", shard.first,
         " on must lie within all ", shard.classes);
  }
}

// Where the shards' classes begin, and where the last ones end.
inline void bounds(const char* who, const Tensor& bounds) {
  if (bounds.scalar_type() != ScalarType::Long) {
    fail("TypeError", who, ": bounds must be int64, got ", name_of(bounds.scalar_type()));
  }
  if (bounds.dim() != 1 || bounds.numel() < 2 || !bounds.is_contiguous()) {
    fail("ValueError", who, ": bounds must be a contiguous [R + 1], got shape ",
         text(shape_of(bounds)));
  }
}

// What the shards tell, in the accumulation type.
inline void parts(const char* who, const Tensor& parts, const Shape& expected) {
  const ScalarType type = parts.scalar_type();
  if (type != ScalarType::Double && type != ScalarType::Float) {
    fail("TypeError", who, ": parts must be float64 or float32, got ", name_of(type));
  }
  has_shape(who, "parts", parts, expected);
  if (!parts.is_contiguous()) fail("ValueError", who, ": parts must be contiguous");
}

// A gradient and what it is multiplied into: of its own type, or of a half one where it is float32.
inline void scaled(const char* who, const Tensor& scaled, const Tensor& gradient,
                   const Tensor& factor) {
  const bool may_differ =
      gradient.scalar_type() == ScalarType::Float && scaled.scalar_type() != ScalarType::Double;
  if (!may_differ) same_dtype(who, "scaled", scaled, "gradient", gradient);
  has_shape(who, "scaled", scaled, shape_of(gradient));
  has_shape(who, "factor", factor, {});
  if (!scaled.is_contiguous() || !gradient.is_contiguous()) {
    fail("ValueError", who, ": gradient and scaled must be contiguous");
  }
}

inline void cross_entropy(const char* who, const Tensor& logits, const Tensor& target,
                          bool probabilities, bool shift) {
  const Shape tokens = tokens_of(who, logits, shift && !probabilities);
  if (probabilities) {
    if (shift) fail("ValueError", who, ": shift needs class indices, got class probabilities");
    same_dtype(who, "a target of class probabilities", target, "logits", logits);
  } else {
    class_indices(who, target);
  }
  has_shape(who, "target", target, probabilities ? shape_of(logits) : tokens);
}

// The position of a flat index in a shape, as it is written in Python.
inline std::string position(const char* name, int64_t index, const Shape& shape) {
  std::string inside;
  for (size_t d = shape.size(); d-- > 0; index /= shape[d]) {
    inside = std::to_string(index % shape[d]) + (inside.empty() ? "" : ", ") + inside;
  }
  return inside.empty() ? name : std::string(name) + "[" + inside + "]";
}

[[noreturn]] inline void out_of_range(const char* who, int64_t index, const Shape& shape,
                                      int64_t value, int64_t classes, int64_t ignore_index) {
  fail("IndexError", who, ": ", position("target", index, shape), " is ", value,
       ", expected 0 <= target < ", classes, " (or ignore_index ", ignore_index, ")");
}

}  // namespace masked_loss::check
