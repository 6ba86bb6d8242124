// SPDX-License-Identifier: BSD-3-Clause
// The operators that divergences are made of, before reduce.

#include "ops/backend_of.h"
#include "ops/check.h"
#include "ops/ops.h"
#include "ops/tables.h"

namespace masked_loss {
namespace {

constexpr const char* kDivergence = "masked_divergence";

// One side's rows, of the accumulation type where this is double for only one of both: kernels read
// doubles with doubles only.
RowLayout rows_like(const Tensor& logits, bool wide) {
  const bool mixed = wide != (logits.scalar_type() == ScalarType::Double);
  return rows_of(mixed ? as_type(logits, accumulation_type(wide)) : logits);
}

LogitRows side(const RowLayout& rows, double softcap, double temperature,
               const OptionalTensor& temperatures) {
  return {rows.tensor.data_ptr(),
          *check::dtype_of(rows.tensor),
          rows.batch_stride,
          rows.step_stride,
          softcap,
          temperature,
          data(temperatures)};
}

}  // namespace

std::tuple<Tensor, Tensor> divergence_weigh(Tensor logits, OptionalTensor mask,
                                            OptionalTensor normalizer, OptionalTensor cu_seqlens,
                                            std::string reduction_name, bool shift, bool stats) {
  const Shape shape = check::tokens_of(kDivergence, logits, shift);
  if (mask) check::is_mask(kDivergence, *mask, shape);
  WeighArgs args{};
  args.skip_first = shift;
  args.reduction = check::reduction(kDivergence, reduction_name, shape.size(), normalizer);
  args.wide = logits.scalar_type() == ScalarType::Double;
  const Tables tables = fill_tables(kDivergence, Device(logits), args, logits,
                                    stats ? DivergenceField::kCount : DivergenceField::kSaved,
                                    {mask, normalizer, cu_seqlens, false}, shape);
  return {tables.tokens, tables.groups};
}

void divergence_rows(Tensor tokens, const Pair& pair, Tensor groups, OptionalTensor dloss,
                     OptionalTensor dlogits, bool forward, bool unless_one,
                     const DivergenceOptions& options) {
  const Tensor &logits = pair.logits, &teacher_logits = pair.teacher_logits;
  const Shape shape = check::tokens_of(kDivergence, logits, options.shift);
  check::has_classes(kDivergence, logits);
  check::floating(kDivergence, "teacher_logits", teacher_logits);
  check::has_shape(kDivergence, "teacher_logits", teacher_logits, shape_of(logits));
  check::temperature(kDivergence, "temperature", options.temperature);
  check::temperature(kDivergence, "teacher_temperature", options.teacher_temperature);
  check::temperatures(kDivergence, pair.temperatures, shape);
  check::temperatures(kDivergence, pair.teacher_temperatures, shape, "teacher_temperatures");
  const bool wide = logits.scalar_type() == ScalarType::Double;
  const RowLayout student = rows_of(logits), teacher = rows_like(teacher_logits, wide);
  const Tables tables{tokens, groups};
  check_tables(kDivergence, tables, student.rows, wide, DivergenceField::kSaved);
  const OptionalTensor own = as_type(pair.temperatures, accumulation_type(wide));
  const OptionalTensor others = as_type(pair.teacher_temperatures, accumulation_type(wide));
  OptionalTensor scale;
  if (dloss) scale = upstream(kDivergence, *dloss, wide, student.rows);

  DivergenceArgs args{};
  args.student =
      side(student, check::softcap(kDivergence, options.softcap), options.temperature, own);
  args.teacher = side(teacher, check::softcap(kDivergence, options.teacher_softcap),
                      options.teacher_temperature, others);
  args.rows = student.rows;
  args.steps = std::max<int64_t>(1, student.steps);
  args.cols = student.cols;
  args.shift = options.shift;
  args.kind = check::divergence(kDivergence, options.kind, options.beta);
  args.beta = options.beta;
  args.wide = wide;
  args.table = tokens.data_ptr();
  args.stats = forward && tokens.size(0) == DivergenceField::kCount;
  args.forward = forward;
  args.groups = tables.of(student.rows);
  args.dloss = data(scale);
  args.dloss_per_token = dloss && dloss->dim() != 0;
  args.unless_one = unless_one;
  const Device device(logits);
  if (dlogits) set_gradient(kDivergence, args, device, *dlogits, logits);
  device.kernels.divergence(args, device.queue());
}

}  // namespace masked_loss
