// SPDX-License-Identifier: BSD-3-Clause
// The operators of the cross entropies, and the stages that other losses share: check -> allocate
// -> run.

#include "ops/backend_of.h"
#include "ops/check.h"
#include "ops/ops.h"
#include "ops/tables.h"

namespace masked_loss {
namespace {

constexpr const char* kCrossEntropy = "masked_cross_entropy";
constexpr const char* kLinear = "linear_cross_entropy";

// Everything about a call that the kernels are told, and what keeps the memory alive meanwhile.
struct Problem {
  RowLayout logits;
  Tensor target;
  OptionalTensor class_weight, temperatures;
  Shape token_shape;
  const Device& device;
  RowArgs args{};
  bool wide;

  void run(void (*kernel)(const RowArgs&, Queue)) {
    const auto scratch = scratch_for(device.kernels.cross_entropy_scratch, &args, logits.tensor);
    kernel(args, device.queue());
  }
  void set_tables(const Tables& tables) {
    args.table = tables.tokens.data_ptr();
    args.groups = tables.of(args.rows);
  }
};

Problem make_problem(const Device& device, const Options& options, const Tensor& logits,
                     const Tensor& target, const OptionalTensor& class_weight,
                     const OptionalTensor& temperatures,
                     const std::optional<Shard>& shard = std::nullopt) {
  const Formula formula = check::formula(kCrossEntropy, options);
  const bool probabilities = !shard && check::is_floating(check::dtype_of(target));
  check::cross_entropy(kCrossEntropy, logits, target, probabilities, options.shift);
  if (shard) {
    check::shard(kCrossEntropy, logits, *shard);
  } else {
    check::has_classes(kCrossEntropy, logits);
  }
  Problem p{rows_of(logits), as_contiguous(target),   std::nullopt,
            std::nullopt,    outer(shape_of(logits)), device};
  p.wide = logits.scalar_type() == ScalarType::Double;
  const int64_t classes = shard ? shard->classes : p.logits.cols;
  if (class_weight) check::class_weight(kCrossEntropy, *class_weight, classes);
  p.class_weight = as_type(class_weight, accumulation_type(p.wide));
  check::temperatures(kCrossEntropy, temperatures, p.token_shape);
  p.temperatures = as_type(temperatures, accumulation_type(p.wide));
  RowArgs& a = p.args;
  static_cast<Formula&>(a) = formula;
  set_rows(a, p.logits);
  set_shard(a, shard);
  a.shift = options.shift;
  a.target = probabilities ? nullptr : p.target.data_ptr();
  a.target_type = probabilities ? DType::kInt64 : *check::dtype_of(target);
  a.probs = probabilities ? p.target.data_ptr() : nullptr;
  a.class_weight = data(p.class_weight);
  a.temperatures = data(p.temperatures);
  return p;
}

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // loss, stats, tokens, groups

Forward forward(const Tensor& logits, const Inputs& inputs, bool stats, const Options& options,
                const OptionalTensor& dlogits) {
  const Device device(logits);
  Problem p = make_problem(device, options, logits, inputs.target, inputs.class_weight,
                           inputs.temperatures);
  const Weights weights{inputs.mask, inputs.normalizer, inputs.cu_seqlens, false};
  if (weights.mask) check::is_mask(kCrossEntropy, *weights.mask, p.token_shape);
  const Reduction reduction =
      check::reduction(kCrossEntropy, options.reduction, p.token_shape.size(), weights.normalizer);
  if (dlogits && reduction == Reduction::kNone) {
    check::fail("ValueError", kCrossEntropy,
                ": the fused operator needs a scalar reduction, got \"none\"");
  }
  WeighArgs args{};
  args.skip_first = options.shift;
  args.target = p.args.target;
  args.target_type = p.args.target_type;
  args.classes = p.args.cols;
  args.ignore_index = options.ignore_index;
  args.class_weight = p.args.probs ? nullptr : p.args.class_weight;
  args.reduction = reduction;
  args.wide = p.wide;
  const Tables tables =
      fill_tables(kCrossEntropy, p.device, args, logits,
                  stats ? TokenField::kCount : TokenField::kSaved, weights, p.token_shape);
  p.set_tables(tables);
  p.args.stats = stats;
  p.args.forward = true;
  if (dlogits) set_gradient(kCrossEntropy, p.args, p.device, *dlogits, logits);
  p.run(p.device.kernels.cross_entropy);
  const Reduced results = reduced(p.device, tables, reduction, p.args.z_loss, p.token_shape, stats);
  return {results.loss, results.stats, tables.tokens, tables.groups};
}

}  // namespace

Forward cross_entropy_forward(Tensor logits, const Inputs& inputs, bool stats,
                              const Options& options) {
  return forward(logits, inputs, stats, options, std::nullopt);
}

Forward cross_entropy_fused(Tensor dlogits, Tensor logits, const Inputs& inputs, bool stats,
                            const Options& options) {
  return forward(logits, inputs, stats, options, dlogits);
}

Tensor cross_entropy(Tensor logits, const Inputs& inputs, bool, const Options& options) {
  return std::get<0>(cross_entropy_forward(logits, inputs, false, options));
}

std::tuple<Tensor, Tensor> cross_entropy_stats(Tensor logits, const Inputs& inputs, bool,
                                               const Options& options) {
  const Forward results = cross_entropy_forward(logits, inputs, true, options);
  return {std::get<0>(results), std::get<1>(results)};
}

namespace {

void backward(const Tensor& dlogits, const Tensor& dloss, const Tensor& logits, const Saved& saved,
              const std::optional<Shard>& shard, bool recompute_unless_one,
              const Options& options) {
  const Device device(logits);
  Problem p = make_problem(device, options, logits, saved.target, saved.class_weight,
                           saved.temperatures, shard);
  const Tables tables{saved.tokens, saved.groups};
  check_tables(kCrossEntropy, tables, p.args.rows, p.wide, TokenField::kSaved);
  const Tensor scale = upstream(kCrossEntropy, dloss, p.wide, p.args.rows);
  p.set_tables(tables);
  p.args.upstream[0] = dloss_of(scale, false);
  set_gradient(kCrossEntropy, p.args, device, dlogits, logits);
  p.run(recompute_unless_one ? device.kernels.rescale : device.kernels.cross_entropy);
}

}  // namespace

void cross_entropy_backward_out(Tensor dlogits, Tensor dloss, Tensor logits, const Saved& saved,
                                bool recompute_unless_one, const Options& options) {
  backward(dlogits, dloss, logits, saved, std::nullopt, recompute_unless_one, options);
}

Tensor cross_entropy_backward(Tensor dloss, Tensor logits, const Saved& saved,
                              const Options& options) {
  Tensor dlogits = empty_as(logits);
  ask_for_large_pages(dlogits);
  cross_entropy_backward_out(dlogits, dloss, logits, saved, false, options);
  return dlogits;
}

// The stages

std::tuple<Tensor, Tensor> weigh(Tensor target, OptionalTensor mask, OptionalTensor normalizer,
                                 OptionalTensor class_weight, OptionalTensor cu_seqlens,
                                 int64_t classes, bool wide, bool stats, const Options& options) {
  const Shape shape = shape_of(target);
  check::formula(kLinear, options);
  WeighArgs args{};
  args.target_type = check::class_indices(kLinear, target);
  if (options.shift && shape.empty()) {
    check::fail("ValueError", kLinear, ": shift needs a time dimension, got a scalar target");
  }
  if (mask) check::is_mask(kLinear, *mask, shape);
  args.reduction = check::reduction(kLinear, options.reduction, shape.size(), normalizer);
  if (class_weight) check::class_weight(kLinear, *class_weight, classes);
  const OptionalTensor weight = as_type(class_weight, accumulation_type(wide));
  const Tensor flat = as_contiguous(target);
  args.skip_first = options.shift;
  args.target = flat.data_ptr();
  args.classes = classes;
  args.ignore_index = options.ignore_index;
  args.class_weight = data(weight);
  args.wide = wide;
  const Tables tables = fill_tables(kLinear, Device(target), args, target,
                                    stats ? TokenField::kCount : TokenField::kSaved,
                                    {mask, normalizer, cu_seqlens, false}, shape);
  return {tables.tokens, tables.groups};
}

void rows(Tensor logits, const Saved& saved, OptionalTensor dloss, const Shard& shard, bool forward,
          bool gradient, const Options& options) {
  const Device device(logits);
  Options of_rows = options;
  of_rows.shift = false;
  Problem p = make_problem(device, of_rows, logits, saved.target, saved.class_weight,
                           saved.temperatures, shard);
  const Tables tables{saved.tokens, saved.groups};
  check_tables(kLinear, tables, p.args.rows, p.wide, TokenField::kSaved);
  OptionalTensor scale;
  if (dloss) scale = upstream(kLinear, *dloss, p.wide, p.args.rows);
  p.set_tables(tables);
  if (scale) p.args.upstream[0] = dloss_of(*scale, false);
  p.args.forward = forward;
  p.args.stats = forward && tables.tokens.size(0) == TokenField::kCount;
  if (gradient) set_gradient(kLinear, p.args, device, logits, logits);
  p.run(device.kernels.cross_entropy);
}

void scale(Tensor scaled, Tensor gradient, Tensor factor) {
  constexpr const char* who = "scale";
  ScaleArgs args{};
  args.dtype = check::floating(who, "gradient", gradient);
  args.scaled_type = check::floating(who, "scaled", scaled);
  check::scaled(who, scaled, gradient, factor);
  const Tensor number = as_type(factor, accumulation_type(args.dtype == DType::kFloat64));
  args.gradient = gradient.data_ptr();
  args.count = gradient.numel();
  args.factor = number.data_ptr();
  args.scaled = scaled.data_ptr();
  const Device device(gradient);
  device.kernels.scale(args, device.queue());
}

std::tuple<Tensor, Tensor> reduce(Tensor tokens, Tensor groups, Tensor target, bool stats,
                                  const Options& options) {
  const Shape shape = shape_of(target);
  const Reduction reduction =
      check::reduction(kLinear, options.reduction, shape.size(), std::nullopt);
  const Tables tables{tokens, groups};
  check_tables(kLinear, tables, product(shape), tokens.scalar_type() == ScalarType::Double,
               stats ? TokenField::kCount : TokenField::kSaved);
  const Reduced results = reduced(Device(tokens), tables, reduction, options.z_loss, shape, stats);
  return {results.loss, results.stats};
}

// Shards of the classes

Tensor cross_entropy_partial(Tensor logits, const Saved& saved, const Shard& shard,
                             const Options& options) {
  const Device device(logits);
  Problem p = make_problem(device, options, logits, saved.target, saved.class_weight,
                           saved.temperatures, shard);
  check_tokens(kCrossEntropy, saved.tokens, p.args.rows, p.wide, TokenField::kSaved);
  p.args.table = saved.tokens.data_ptr();
  p.args.stats = saved.tokens.size(0) == TokenField::kCount;
  const Tensor part = empty(logits, {part_numbers(p.args), p.args.rows}, accumulation_id(p.wide));
  tell(p.args, device, part);
  return part;
}

void cross_entropy_merge(Tensor parts, const Saved& saved, Tensor bounds, const Options& options) {
  const Device device(parts);
  MergeArgs args{};
  static_cast<Formula&>(args) = check::formula(kCrossEntropy, options);
  const Tensor target = as_contiguous(saved.target);
  const OptionalTensor class_weight = as_type(saved.class_weight, parts.scalar_type());
  args.target = target.data_ptr();
  args.target_type = check::class_indices(kCrossEntropy, target);
  args.rows = target.numel();
  args.class_weight = data(class_weight);
  args.stats = saved.tokens.size(0) == TokenField::kCount;
  const bool wide = parts.scalar_type() == ScalarType::Double;
  check_tokens(kCrossEntropy, saved.tokens, args.rows, wide, TokenField::kSaved);
  args.table = saved.tokens.data_ptr();
  merge(kCrossEntropy, args, device, parts, bounds);
}

void cross_entropy_shard_backward_out(Tensor dlogits, Tensor dloss, Tensor logits,
                                      const Saved& saved, const Shard& shard,
                                      const Options& options) {
  backward(dlogits, dloss, logits, saved, shard, false, options);
}

Tensor cross_entropy_shard_backward(Tensor dloss, Tensor logits, const Saved& saved,
                                    const Shard& shard, const Options& options) {
  Tensor dlogits = empty_as(logits);
  ask_for_large_pages(dlogits);
  backward(dlogits, dloss, logits, saved, shard, false, options);
  return dlogits;
}

}  // namespace masked_loss
