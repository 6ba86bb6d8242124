// SPDX-License-Identifier: BSD-3-Clause
// check -> allocate -> run.
#include "ops/ops.h"

#include <utility>

#include "kernels/cpu/backend.h"
#include "ops/backend_of.h"
#include "ops/check.h"
#if defined(MASKED_LOSS_WITH_CUDA)
#include "kernels/cuda/backend.h"
#endif

namespace masked_loss {
namespace {

constexpr const char* kCrossEntropy = "masked_cross_entropy";
constexpr const char* kMaskedReduce = "masked_reduce";
constexpr const char* kDivergence = "masked_divergence";
constexpr const char* kLinear = "linear_cross_entropy";

// The memory that a CUDA kernel's blocks hand each other their results in; the CPU asks for none.
// To be kept until the kernel is launched: what the stream does later, it does in order.
template <class Args>
OptionalTensor scratch_for(int64_t (*bytes_for)(const Args&), Args* args, const Tensor& like) {
  const int64_t bytes = bytes_for(*args);
  if (bytes == 0) return std::nullopt;
  Tensor scratch = empty(like, {(bytes + 7) / 8}, aoti_torch_dtype_float64());
  args->scratch = scratch.data_ptr();
  return scratch;
}

// Tables

// Token and group tables, filled by fill_tables(). The table of groups of any length has a row for
// each bound: see Groups.
struct Tables {
  Tensor tokens, groups;

  // As the kernels are told.
  Groups of(int64_t count) const {
    const int64_t rows = groups.size(0), columns = groups.size(1);
    double* const table = doubles(groups);
    if (columns > Groups::kBound) {
      return {count, rows, 0, table, columns, table + Groups::kBound, columns};
    }
    const int64_t group_count = std::max<int64_t>(1, rows);
    return {count, group_count, count / group_count, table, columns, nullptr, 0};
  }
};

// What the tokens of a loss are weighed by.
struct Weights {
  const OptionalTensor &mask, &normalizer, &cu_seqlens;
  bool per_sequence;  // a result for each sequence
};

Shape outer(const Shape& shape) {
  return Shape(shape.begin(), shape.empty() ? shape.end() : shape.end() - 1);
}

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

Tables fill_tables(const char* who, const Device& device, WeighArgs args, const Tensor& like,
                   int64_t fields, const Weights& weights, const Shape& token_shape) {
  const int64_t tokens = product(token_shape);
  if (weights.cu_seqlens) check::cu_seqlens(who, *weights.cu_seqlens, tokens);
  const Tables t{empty(like, {fields, tokens}, accumulation_id(args.wide)),
                 empty_groups(like, weights, args.reduction, token_shape)};
  const OptionalTensor mask = weights.mask ? OptionalTensor(as_mask(*weights.mask)) : std::nullopt;
  const OptionalTensor divisor = as_type(weights.normalizer, ScalarType::Double);
  const OptionalTensor bounds = as_type(weights.cu_seqlens, ScalarType::Double);
  args.groups = t.of(tokens);
  if (bounds) args.sequences = {tokens, bounds->numel(), 0, nullptr, 0, doubles(*bounds), 1};
  if (args.groups.bounds) {  // which the kernel copies into the table
    args.groups.bounds = args.sequences.bounds;
    args.groups.bound_step = 1;
  }
  args.steps = token_shape.empty() ? 1 : std::max<int64_t>(1, token_shape.back());
  args.mask = data(mask);
  args.mask_type = mask ? *check::dtype_of(*mask) : DType::kBool;
  args.normalizer = static_cast<const double*>(data(divisor));
  args.weight = t.tokens.data_ptr();
  const auto scratch = scratch_for(device.kernels.weigh_scratch, &args, like);
  const int64_t bad = device.kernels.weigh(args, device.queue());
  if (bad >= 0) {
    const int64_t value = args.target_type == DType::kInt64
                              ? static_cast<const int64_t*>(args.target)[bad]
                              : static_cast<const int32_t*>(args.target)[bad];
    check::out_of_range(who, bad, token_shape, value, args.classes, args.ignore_index);
  }
  return t;
}

void check_tables(const char* who, const Tables& tables, int64_t rows, bool wide, int64_t fields) {
  const Tensor &tokens = tables.tokens, &groups = tables.groups;
  if (tokens.dim() != 2 || tokens.size(0) < fields || tokens.size(1) != rows ||
      tokens.scalar_type() != accumulation_type(wide) || !tokens.is_contiguous()) {
    check::fail("ValueError", who, ": tokens must be the forward operator's table, got shape ",
                check::text(shape_of(tokens)));
  }
  const bool bounds = groups.dim() == 2 && groups.size(1) == Groups::kBound + 1;
  if (groups.dim() != 2 || (!bounds && groups.size(1) != GroupField::kCount) ||
      groups.scalar_type() != ScalarType::Double || !groups.is_contiguous() ||
      (rows && (groups.size(0) == 0 || (!bounds && rows % groups.size(0))))) {
    check::fail("ValueError", who, ": groups must be the forward operator's table, got shape ",
                check::text(shape_of(groups)));
  }
}

struct Reduced {
  Tensor loss, stats;
};
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

// One value, or one for each token or sequence.
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
// Results that there may be a dloss for; 0 where there is no token to have a gradient.
int64_t results_of(const Groups& groups, bool per_sequence) {
  if (!per_sequence || groups.tokens == 0) return groups.tokens;
  return groups.count - (groups.bounds != nullptr);
}

// Rows of logits

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
                     const OptionalTensor& temperatures) {
  const Formula formula = check::formula(kCrossEntropy, options);
  const bool probabilities = check::is_floating(check::dtype_of(target));
  check::cross_entropy(kCrossEntropy, logits, target, probabilities, options.shift);
  Problem p{rows_of(logits), as_contiguous(target), std::nullopt,
            std::nullopt,    shape_of(logits),      device};
  p.token_shape.pop_back();
  p.args.dtype = *check::dtype_of(logits);
  p.wide = p.args.dtype == DType::kFloat64;
  if (p.logits.cols == 0 && p.logits.rows > 0) {
    check::fail("ValueError", kCrossEntropy, ": logits must have at least one class, got shape ",
                check::text(shape_of(logits)));
  }
  if (class_weight) check::class_weight(kCrossEntropy, *class_weight, p.logits.cols);
  p.class_weight = as_type(class_weight, accumulation_type(p.wide));
  if (temperatures) check::temperatures(kCrossEntropy, *temperatures, p.token_shape);
  p.temperatures = as_type(temperatures, accumulation_type(p.wide));
  RowArgs& a = p.args;
  static_cast<Formula&>(a) = formula;
  a.logits = p.logits.tensor.data_ptr();
  a.rows = p.logits.rows;
  a.steps = std::max<int64_t>(1, p.logits.steps);
  a.cols = a.classes = p.logits.cols;
  a.batch_stride = p.logits.batch_stride;
  a.step_stride = p.logits.step_stride;
  a.shift = options.shift;
  a.target = probabilities ? nullptr : p.target.data_ptr();
  a.target_type = probabilities ? DType::kInt64 : *check::dtype_of(target);
  a.probs = probabilities ? p.target.data_ptr() : nullptr;
  a.class_weight = data(p.class_weight);
  a.temperatures = data(p.temperatures);
  return p;
}

// dlogits has rows like the logits', and may be the logits.
void set_gradient(Problem& p, const Tensor& dlogits, const Tensor& logits) {
  check::has_shape(kCrossEntropy, "dlogits", dlogits, shape_of(logits));
  check::same_dtype(kCrossEntropy, "dlogits", dlogits, "logits", logits);
  const std::optional<RowLayout> rows = rows_in_place(dlogits);
  if (!rows) {
    check::fail("ValueError", kCrossEntropy, ": dlogits must have contiguous classes and rows");
  }
  p.args.dlogits = dlogits.data_ptr();
  p.args.grad_batch_stride = rows->batch_stride;
  p.args.grad_step_stride = rows->step_stride;
  p.args.stream = dlogits.numel() * dlogits.element_size() > p.device.kernels.cache_bytes;
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
  if (dlogits) set_gradient(p, *dlogits, logits);
  p.run(p.device.kernels.cross_entropy);
  const Reduced results = reduced(p.device, tables, reduction, p.args.z_loss, p.token_shape, stats);
  return {results.loss, results.stats, tables.tokens, tables.groups};
}

}  // namespace

// Cross entropy

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

void cross_entropy_backward_out(Tensor dlogits, Tensor dloss, Tensor logits, const Saved& saved,
                                bool recompute_unless_one, const Options& options) {
  const Device device(logits);
  Problem p =
      make_problem(device, options, logits, saved.target, saved.class_weight, saved.temperatures);
  const Tables tables{saved.tokens, saved.groups};
  check_tables(kCrossEntropy, tables, p.args.rows, p.wide, TokenField::kSaved);
  const Tensor scale = upstream(kCrossEntropy, dloss, p.wide, p.args.rows);
  p.set_tables(tables);
  p.args.upstream[0] = dloss_of(scale, false);
  set_gradient(p, dlogits, logits);
  p.run(recompute_unless_one ? device.kernels.rescale : device.kernels.cross_entropy);
}

Tensor cross_entropy_backward(Tensor dloss, Tensor logits, const Saved& saved,
                              const Options& options) {
  Tensor dlogits = empty_as(logits);
  ask_for_large_pages(dlogits);
  cross_entropy_backward_out(dlogits, dloss, logits, saved, false, options);
  return dlogits;
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

void rows(Tensor logits, const Saved& saved, OptionalTensor dloss, bool forward, bool gradient,
          const Options& options) {
  const Device device(logits);
  Options of_rows = options;
  of_rows.shift = false;
  Problem p =
      make_problem(device, of_rows, logits, saved.target, saved.class_weight, saved.temperatures);
  const Tables tables{saved.tokens, saved.groups};
  check_tables(kLinear, tables, p.args.rows, p.wide, TokenField::kSaved);
  OptionalTensor scale;
  if (dloss) scale = upstream(kLinear, *dloss, p.wide, p.args.rows);
  p.set_tables(tables);
  if (scale) p.args.upstream[0] = dloss_of(*scale, false);
  p.args.forward = forward;
  p.args.stats = forward && tables.tokens.size(0) == TokenField::kCount;
  if (gradient) set_gradient(p, logits, logits);
  p.run(device.kernels.cross_entropy);
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

// Losses computed elsewhere

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

// Divergences

std::tuple<Tensor, Tensor> divergence_weigh(Tensor logits, OptionalTensor mask,
                                            OptionalTensor normalizer, OptionalTensor cu_seqlens,
                                            std::string reduction_name, bool shift, bool stats) {
  const DType dtype = check::floating(kDivergence, "logits", logits);
  Shape shape = shape_of(logits);
  if (shape.empty()) {
    check::fail("ValueError", kDivergence, ": logits must have shape [..., V], got []");
  }
  shape.pop_back();
  if (shift && shape.empty()) {
    check::fail("ValueError", kDivergence, ": shift needs logits [..., T, V], got ",
                check::text(shape_of(logits)));
  }
  if (mask) check::is_mask(kDivergence, *mask, shape);
  WeighArgs args{};
  args.skip_first = shift;
  args.reduction = check::reduction(kDivergence, reduction_name, shape.size(), normalizer);
  args.wide = dtype == DType::kFloat64;
  const Tables tables = fill_tables(kDivergence, Device(logits), args, logits,
                                    stats ? DivergenceField::kCount : DivergenceField::kSaved,
                                    {mask, normalizer, cu_seqlens, false}, shape);
  return {tables.tokens, tables.groups};
}

void divergence_rows(Tensor tokens, Tensor logits, Tensor teacher_logits, Tensor groups,
                     OptionalTensor dloss, OptionalTensor dlogits, OptionalTensor temperatures,
                     OptionalTensor teacher_temperatures, double temperature,
                     double teacher_temperature, std::string kind, double beta,
                     std::optional<double> softcap, std::optional<double> teacher_softcap,
                     bool shift, bool forward, bool unless_one) {
  const DType dtype = check::floating(kDivergence, "logits", logits);
  const bool wide = dtype == DType::kFloat64;
  check::floating(kDivergence, "teacher_logits", teacher_logits);
  check::has_shape(kDivergence, "teacher_logits", teacher_logits, shape_of(logits));
  check::temperature(kDivergence, "temperature", temperature);
  check::temperature(kDivergence, "teacher_temperature", teacher_temperature);
  // Kernels read doubles with doubles only.
  const bool mixed = wide != (teacher_logits.scalar_type() == ScalarType::Double);
  const RowLayout student = rows_of(logits);
  const RowLayout teacher =
      rows_of(mixed ? as_type(teacher_logits, accumulation_type(wide)) : teacher_logits);
  if (student.cols == 0 && student.rows > 0) {
    check::fail("ValueError", kDivergence, ": logits must have at least one class, got shape ",
                check::text(shape_of(logits)));
  }
  check_tables(kDivergence, {tokens, groups}, student.rows, wide, DivergenceField::kSaved);
  const auto per_token = [&](const OptionalTensor& t) {
    return t ? OptionalTensor(upstream(kDivergence, *t, wide, student.rows)) : std::nullopt;
  };
  const OptionalTensor scale = per_token(dloss), own = per_token(temperatures),
                       others = per_token(teacher_temperatures);

  DivergenceArgs args{};
  const auto side = [](const RowLayout& rows, double cap, double value,
                       const OptionalTensor& values) {
    return LogitRows{rows.tensor.data_ptr(),
                     *check::dtype_of(rows.tensor),
                     rows.batch_stride,
                     rows.step_stride,
                     cap,
                     value,
                     data(values)};
  };
  args.student = side(student, check::softcap(kDivergence, softcap), temperature, own);
  args.teacher =
      side(teacher, check::softcap(kDivergence, teacher_softcap), teacher_temperature, others);
  args.rows = student.rows;
  args.steps = std::max<int64_t>(1, student.steps);
  args.cols = student.cols;
  args.shift = shift;
  args.kind = check::divergence(kDivergence, kind, beta);
  args.beta = beta;
  args.wide = wide;
  args.table = tokens.data_ptr();
  args.stats = forward && tokens.size(0) == DivergenceField::kCount;
  args.forward = forward;
  args.groups = Tables{tokens, groups}.of(student.rows);
  args.dloss = data(scale);
  args.dloss_per_token = dloss && dloss->dim() != 0;
  args.unless_one = unless_one;
  const Device device(logits);
  if (dlogits) {
    check::has_shape(kDivergence, "dlogits", *dlogits, shape_of(logits));
    check::same_dtype(kDivergence, "dlogits", *dlogits, "logits", logits);
    const std::optional<RowLayout> rows = rows_in_place(*dlogits);
    if (!rows) {
      check::fail("ValueError", kDivergence, ": dlogits must have contiguous classes and rows");
    }
    args.dlogits = dlogits->data_ptr();
    args.grad_batch_stride = rows->batch_stride;
    args.grad_step_stride = rows->step_stride;
    args.stream = dlogits->numel() * dlogits->element_size() > device.kernels.cache_bytes;
  }
  device.kernels.divergence(args, device.queue());
}

void check_formula(std::string who, const Options& options) {
  check::formula(who.c_str(), options);
}

// What the library is made of

std::string cpu_capability() { return cpu::kernels().name; }

std::string cuda_architectures() {
#if defined(MASKED_LOSS_WITH_CUDA)
  return cuda::architectures();
#else
  return "";
#endif
}

std::tuple<int64_t, int64_t, int64_t, int64_t> table_sizes() {
  return {TokenField::kSaved, TokenField::kCount, GroupField::kCount, StatField::kCount};
}

}  // namespace masked_loss
