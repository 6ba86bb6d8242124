// SPDX-License-Identifier: BSD-3-Clause
// Tensors as kernels take them: allocated, converted, described by strides.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

#include "ops/check.h"

namespace masked_loss {

using check::Shape;
using check::shape_of;
using torch::headeronly::ScalarType;

// Straight through the C shim: the dispatcher's new_empty costs more than a small loss.
inline Tensor empty(const Tensor& like, const Shape& shape, int32_t dtype) {
  Shape strides(shape.size());
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(1, shape[d]);
  }
  int32_t device_type, device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()),
                                                         shape.data(), strides.data(), dtype,
                                                         device_type, device_index, &handle));
  return Tensor(handle);
}
inline Tensor empty_as(const Tensor& t) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return empty(t, shape_of(t), dtype);
}
inline int32_t accumulation_id(bool wide) {
  return wide ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}
inline ScalarType accumulation_type(bool wide) {
  return wide ? ScalarType::Double : ScalarType::Float;
}

inline Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}
inline Tensor as_type(const Tensor& t, ScalarType type) {
  return as_contiguous(t.scalar_type() == type ? t : torch::stable::to(t, type));
}
inline OptionalTensor as_type(const OptionalTensor& t, ScalarType type) {
  return t ? OptionalTensor(as_type(*t, type)) : std::nullopt;
}
inline Tensor as_mask(const Tensor& t) {
  return check::is_wide_unsigned(t) ? as_type(t, ScalarType::Double) : as_contiguous(t);
}
inline const void* data(const OptionalTensor& t) { return t ? t->data_ptr() : nullptr; }
inline double* doubles(const Tensor& t) { return static_cast<double*>(t.data_ptr()); }

inline int64_t product(const Shape& shape) {
  int64_t n = 1;
  for (int64_t size : shape) n *= size;
  return n;
}

// Rows of logits as base + batch * batch_stride + step * step_stride; what has more structure than
// that, or classes that are not contiguous, is copied. The strides of an empty tensor mean nothing:
// PyTorch calls it contiguous whatever they are.
struct RowLayout {
  Tensor tensor;
  int64_t rows, steps, cols, batch_stride, step_stride;
};
inline std::optional<RowLayout> rows_in_place(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  const int64_t dims = static_cast<int64_t>(sizes.size());
  RowLayout r{t, 1, 1, sizes[dims - 1], 0, 0};
  for (int64_t d = 0; d < dims - 1; ++d) r.rows *= sizes[d];
  if (dims >= 2) r.steps = sizes[dims - 2], r.step_stride = strides[dims - 2];
  if (r.rows == 0 || r.cols == 0) return r;
  if (r.cols > 1 && strides[dims - 1] != 1) return std::nullopt;
  int64_t expected = -1;  // the stride with which the next outer dimension joins the batch
  for (int64_t d = dims - 3; d >= 0; --d) {
    if (sizes[d] == 1) continue;
    if (expected < 0) {
      r.batch_stride = strides[d];
    } else if (strides[d] != expected) {
      return std::nullopt;
    }
    expected = strides[d] * sizes[d];
  }
  return r;
}
inline RowLayout rows_of(const Tensor& t) {
  if (auto rows = rows_in_place(t)) return *rows;
  return *rows_in_place(torch::stable::contiguous(t));
}

}  // namespace masked_loss
