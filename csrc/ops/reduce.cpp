// SPDX-License-Identifier: BSD-3-Clause
// The operators of losses computed elsewhere, and the gradient of every mask.

#include "ops/backend_of.h"
#include "ops/check.h"
#include "ops/ops.h"
#include "ops/tables.h"

namespace masked_loss {
namespace {

constexpr const char* kMaskedReduce = "masked_reduce";

}  // namespace

std::tuple<Tensor, Tensor, Tensor> masked_reduce_forward(Tensor values, OptionalTensor mask,
                                                         OptionalTensor normalizer,
                                                         OptionalTensor cu_seqlens,
                                                         bool per_sequence,
                                                         std::string reduction_name) {
  const Shape shape = shape_of(values);
  ValuesArgs args{};
  args.dtype = check::floating(kMaskedReduce, "values", values);
  args.wide = args.dtype == DType::kFloat64;
  if (mask) check::is_mask(kMaskedReduce, *mask, shape);
  const Reduction reduction =
      check::reduction(kMaskedReduce, reduction_name, shape.size(), normalizer);
  if (per_sequence) check::per_sequence(kMaskedReduce, reduction, reduction_name, shape.size());
  const Device device(values);
  const Tensor flat = as_contiguous(values);
  WeighArgs weights{};
  weights.reduction = reduction;
  weights.wide = args.wide;
  const Tables tables = fill_tables(kMaskedReduce, device, weights, values, TokenField::kTop,
                                    {mask, normalizer, cu_seqlens, per_sequence}, shape);
  args.groups = tables.of(product(shape));
  args.values = flat.data_ptr();
  args.table = tables.tokens.data_ptr();
  device.kernels.load_values(args, device.queue());
  Shape result = reduction == Reduction::kNone ? shape : Shape();
  if (per_sequence) result = cu_seqlens ? Shape{cu_seqlens->numel() - 1} : outer(shape);
  ReduceArgs sums{};
  sums.groups = args.groups;
  sums.reduction = reduction;
  sums.per_group = per_sequence;
  sums.wide = args.wide;
  return {reduced(device, tables, result, sums, false).loss, tables.tokens, tables.groups};
}

Tensor masked_reduce(Tensor values, OptionalTensor mask, OptionalTensor normalizer,
                     OptionalTensor cu_seqlens, bool per_sequence, std::string reduction) {
  return std::get<0>(
      masked_reduce_forward(values, mask, normalizer, cu_seqlens, per_sequence, reduction));
}

Tensor masked_reduce_backward(Tensor dloss, Tensor values, Tensor tokens, Tensor groups,
                              bool per_sequence) {
  ValuesArgs args{};
  args.dtype = check::floating(kMaskedReduce, "values", values);
  args.wide = args.dtype == DType::kFloat64;
  const Tables tables{tokens, groups};
  check_tables(kMaskedReduce, tables, values.numel(), args.wide, TokenField::kTop);
  args.groups = tables.of(values.numel());
  const Tensor scale =
      upstream(kMaskedReduce, dloss, args.wide, results_of(args.groups, per_sequence));
  Tensor dvalues = empty_as(values);
  args.table = tokens.data_ptr();
  args.dloss = dloss_of(scale, per_sequence);
  args.dvalues = dvalues.data_ptr();
  const Device device(values);
  device.kernels.values_grad(args, device.queue());
  return dvalues;
}

Tensor mask_grad(Tensor dloss, Tensor mask, Tensor tokens, Tensor groups, OptionalTensor target,
                 OptionalTensor class_weight, double z_loss, bool per_sequence) {
  constexpr const char* who = "mask_grad";
  MaskGradArgs args{};
  args.mask_type = check::floating(who, "mask", mask);
  args.wide = tokens.scalar_type() == ScalarType::Double;
  const Tables tables{tokens, groups};
  check_tables(who, tables, mask.numel(), args.wide,
               z_loss != 0 ? TokenField::kSaved : TokenField::kTop);
  args.groups = tables.of(mask.numel());
  const Tensor scale = upstream(who, dloss, args.wide, results_of(args.groups, per_sequence));
  const OptionalTensor weight = as_type(class_weight, accumulation_type(args.wide));
  const OptionalTensor index = target ? OptionalTensor(as_contiguous(*target)) : std::nullopt;
  Tensor dmask = empty_as(mask);
  args.table = tokens.data_ptr();
  args.z_loss = z_loss;
  args.target = data(index);
  args.target_type = index ? check::class_indices(who, *index) : DType::kInt64;
  args.class_weight = index ? data(weight) : nullptr;
  args.dloss = dloss_of(scale, per_sequence);
  args.dmask = dmask.data_ptr();
  const Device device(mask);
  device.kernels.mask_grad(args, device.queue());
  return dmask;
}

}  // namespace masked_loss
