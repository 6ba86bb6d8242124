// SPDX-License-Identifier: BSD-3-Clause
#include "ops/tables.h"

#include "ops/check.h"

namespace masked_loss {

Shape outer(const Shape& shape) {
  return Shape(shape.begin(), shape.empty() ? shape.end() : shape.end() - 1);
}

namespace {

// A row for each group: one for all tokens, or one for each sequence. At least one, also of an
// empty batch.
Tensor empty_groups(const Tensor& like, const Weights& weights, Reduction reduction,
                    const Shape& token_shape) {
  int64_t rows = 1, columns = GroupField::kCount;
  if (weights.per_sequence || reduction == Reduction::kSequenceMean) {
    if (weights.cu_seqlens) {
      rows = weights.cu_seqlens->numel();
      columns = Groups::kBound + 1;
    } else if (weights.per_sequence || product(token_shape) > 0) {
      rows = std::max<int64_t>(1, product(outer(token_shape)));
    }
  }
  return empty(like, {rows, columns}, aoti_torch_dtype_float64());
}

}  // namespace

Tables fill_tables(const char* who, const Device& device, WeighArgs args, const Tensor& like,
                   int64_t fields, const Weights& weights, const Shape& token_shape) {
  const int64_t tokens = product(token_shape);
  const Tables t{empty(like, {fields, tokens}, accumulation_id(args.wide)),
                 empty_groups(like, weights, args.reduction, token_shape)};
  args.groups = t.of(tokens);
  args.weight = t.tokens.data_ptr();
  weigh(who, device, args, like, weights, token_shape, token_shape);
  return t;
}

void weigh(const char* who, const Device& device, WeighArgs args, const Tensor& like,
           const Weights& weights, const Shape& token_shape, const Shape& targets) {
  const int64_t tokens = product(token_shape);
  if (weights.cu_seqlens) check::cu_seqlens(who, *weights.cu_seqlens, tokens);
  const OptionalTensor mask = weights.mask ? OptionalTensor(as_mask(*weights.mask)) : std::nullopt;
  const OptionalTensor divisor = as_type(weights.normalizer, ScalarType::Double);
  const OptionalTensor bounds = as_type(weights.cu_seqlens, ScalarType::Double);
  if (bounds) args.sequences = {tokens, bounds->numel(), 0, nullptr, 0, doubles(*bounds), 1};
  if (args.groups.bounds) {  // which the kernel copies into the table
    args.groups.bounds = args.sequences.bounds;
    args.groups.bound_step = 1;
  }
  args.steps = token_shape.empty() ? 1 : std::max<int64_t>(1, token_shape.back());
  args.mask = data(mask);
  args.mask_type = mask ? *check::dtype_of(*mask) : DType::kBool;
  args.normalizer = static_cast<const double*>(data(divisor));
  const auto scratch = scratch_for(device.kernels.weigh_scratch, &args, like);
  const int64_t bad = device.kernels.weigh(args, device.queue());
  if (bad >= 0) {
    const int64_t value = args.target_type == DType::kInt64
                              ? static_cast<const int64_t*>(args.target)[bad]
                              : static_cast<const int32_t*>(args.target)[bad];
    check::out_of_range(who, bad, targets, value, args.classes, args.ignore_index);
  }
}

void check_tokens(const char* who, const Tensor& tokens, int64_t rows, bool wide, int64_t fields) {
  if (tokens.dim() != 2 || tokens.size(0) < fields || tokens.size(1) != rows ||
      tokens.scalar_type() != accumulation_type(wide) || !tokens.is_contiguous()) {
    check::fail("ValueError", who, ": tokens must be the forward operator's table, got shape ",
                check::text(shape_of(tokens)));
  }
}

void check_tables(const char* who, const Tables& tables, int64_t rows, bool wide, int64_t fields) {
  check_tokens(who, tables.tokens, rows, wide, fields);
  const Tensor& groups = tables.groups;
  const bool bounds = groups.dim() == 2 && groups.size(1) == Groups::kBound + 1;
  if (groups.dim() != 2 || (!bounds && groups.size(1) != GroupField::kCount) ||
      groups.scalar_type() != ScalarType::Double || !groups.is_contiguous() ||
      (rows && (groups.size(0) == 0 || (!bounds && rows % groups.size(0))))) {
    check::fail("ValueError", who, ": groups must be the forward operator's table, got shape ",
                check::text(shape_of(groups)));
  }
}

Reduced reduced(const Device& device, const Tables& tables, const Shape& shape, ReduceArgs args,
                bool stats) {
  const int64_t stat_count = stats ? static_cast<int64_t>(StatField::kCount) : 0;
  const Reduced results{empty(tables.tokens, shape, accumulation_id(args.wide)),
                        empty(tables.tokens, {stat_count}, aoti_torch_dtype_float64())};
  if (args.per_group && results.loss.numel() == 0) return results;
  args.table = tables.tokens.data_ptr();
  args.loss = results.loss.data_ptr();
  args.stats = stats ? doubles(results.stats) : nullptr;
  const auto scratch = scratch_for(device.kernels.reduce_scratch, &args, results.loss);
  device.kernels.reduce(args, device.queue());
  return results;
}
Reduced reduced(const Device& device, const Tables& tables, Reduction reduction, double z_loss,
                const Shape& token_shape, bool stats) {
  ReduceArgs args{};
  args.groups = tables.of(product(token_shape));
  args.reduction = reduction;
  args.wide = tables.tokens.scalar_type() == ScalarType::Double;
  args.z_loss = z_loss;
  return reduced(device, tables, reduction == Reduction::kNone ? token_shape : Shape(), args,
                 stats);
}

void tell(RowArgs& args, const Device& device, const Tensor& part) {
  args.part = part.data_ptr();
  args.numbers = part_numbers(args);
  args.forward = true;
  if (args.rows > 0 && args.cols > 0) device.kernels.cross_entropy(args, device.queue());
}
void merge(const char* who, MergeArgs& args, const Device& device, const Tensor& parts,
           const Tensor& bounds) {
  args.dtype = parts.scalar_type() == ScalarType::Double ? DType::kFloat64 : DType::kFloat32;
  check::bounds(who, bounds);
  args.shards = bounds.numel() - 1;
  args.numbers = part_numbers(args);
  check::parts(who, parts, {args.shards, args.numbers, args.rows});
  args.parts = parts.data_ptr();
  args.bounds = static_cast<const int64_t*>(bounds.data_ptr());
  if (args.rows > 0) device.kernels.merge(args, device.queue());
}

Tensor upstream(const char* who, const Tensor& dloss, bool wide, int64_t count) {
  if (dloss.dim() != 0 && dloss.numel() != count && count != 0) {
    check::fail("ValueError", who, ": dloss must be a scalar or one value for each of ", count,
                " results, got shape ", check::text(shape_of(dloss)));
  }
  return as_type(dloss, accumulation_type(wide));
}
Upstream dloss_of(const Tensor& values, bool per_sequence) {
  const bool each = values.dim() != 0;
  return {values.data_ptr(), each && !per_sequence, each && per_sequence};
}
int64_t results_of(const Groups& groups, bool per_sequence) {
  if (!per_sequence || groups.tokens == 0) return groups.tokens;
  return groups.count - (groups.bounds != nullptr);
}

}  // namespace masked_loss
