// SPDX-License-Identifier: BSD-3-Clause
// What the checks of any tensor are made of: the error itself, dtypes by name, devices, shapes.
//
// The stable ABI carries only a text. It begins with the Python type that the public functions
// raise it as.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/args.h"

namespace masked_loss::check {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::vector<int64_t>;

template <class... Parts>
[[noreturn]] inline void fail(const char* error, const Parts&... parts) {
  std::ostringstream text;
  text << error << ": ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

inline std::string text(const Shape& shape) {
  std::ostringstream out;
  out << '[';
  for (size_t i = 0; i < shape.size(); ++i) out << (i ? ", " : "") << shape[i];
  out << ']';
  return out.str();
}

inline Shape shape_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return Shape(sizes.begin(), sizes.end());
}

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return "float64";
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::UInt16:
      return "uint16";
    case ScalarType::UInt32:
      return "uint32";
    case ScalarType::UInt64:
      return "uint64";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    default:
      return "an unsupported dtype";
  }
}

inline std::optional<DType> dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Long:
      return DType::kInt64;
    case ScalarType::Int:
      return DType::kInt32;
    case ScalarType::Short:
      return DType::kInt16;
    case ScalarType::Char:
      return DType::kInt8;
    case ScalarType::Byte:
      return DType::kUInt8;
    case ScalarType::Bool:
      return DType::kBool;
    default:
      return std::nullopt;
  }
}

// Integers that the kernels do not read themselves.
inline bool is_wide_unsigned(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  return type == ScalarType::UInt16 || type == ScalarType::UInt32 || type == ScalarType::UInt64;
}

inline bool is_floating(std::optional<DType> type) { return type && *type <= DType::kFloat16; }

inline DType floating(const char* who, const char* what, const Tensor& t) {
  const auto type = dtype_of(t);
  if (!is_floating(type)) {
    fail("TypeError", who, ": ", what, " must be float64, float32, bfloat16 or float16, got ",
         name_of(t.scalar_type()));
  }
  return *type;
}

// The operator and its arguments by name, as a schema has them: "name(Type a, Type b=0, *, ...".
inline std::string operator_of(const std::string& schema) {
  return schema.substr(0, schema.find('('));
}
inline std::string argument_of(const std::string& schema, size_t index) {
  size_t begin = schema.find('(') + 1, end = 0;
  for (size_t i = 0;; begin = end + 2) {
    end = schema.find(", ", begin);
    if (schema[begin] != '*' && i++ == index) break;
  }
  const std::string argument = schema.substr(begin, std::min(end, schema.find(") ->")) - begin);
  const size_t name = argument.find(' ') + 1;
  return argument.substr(name, argument.find('=') - name);
}

inline std::string device_of(const Tensor& t) {
  return t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : "cpu";
}

// Every tensor is on the device of the first one that is only read: what is written, the caller may
// not know of. Null is an argument that is no tensor, or not given.
inline void devices(const char* schema, std::initializer_list<const Tensor*> arguments) {
  const Tensor* const* const begin = arguments.begin();
  const bool written = strncmp(strchr(schema, '('), "(Tensor(a!)", 11) == 0;
  const Tensor& expected = *begin[written];
  for (const Tensor* const* t = begin; t != arguments.end(); ++t) {
    if (!*t || ((*t)->is_cuda() == expected.is_cuda() &&
                (*t)->get_device_index() == expected.get_device_index())) {
      continue;
    }
    fail("ValueError", operator_of(schema), ": ", argument_of(schema, t - begin),
         " must be on the device of ", argument_of(schema, written), ", ", device_of(expected),
         ", got ", device_of(**t));
  }
}

inline void same_dtype(const char* who, const char* what, const Tensor& t, const char* other,
                       const Tensor& expected) {
  if (t.scalar_type() != expected.scalar_type()) {
    fail("TypeError", who, ": ", what, " must be ", name_of(expected.scalar_type()), " like ",
         other, ", got ", name_of(t.scalar_type()));
  }
}

inline void has_shape(const char* who, const char* what, const Tensor& t, const Shape& expected) {
  const Shape got = shape_of(t);
  if (got != expected) {
    fail("ValueError", who, ": ", what, " must have shape ", text(expected), ", got ", text(got));
  }
}

}  // namespace masked_loss::check
