// SPDX-License-Identifier: BSD-3-Clause
// check -> allocate -> run. What touches tensors, devices, threads and streams is here and nowhere
// else.
#include "ops/ops.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <utility>
#include <vector>

#include "kernels/cpu/backend.h"
#include "ops/backend_of.h"
#include "ops/check.h"
#if defined(MASKED_LOSS_WITH_CUDA)
#include "kernels/cuda/backend.h"
#endif

namespace masked_loss {
namespace {

using check::Shape;
using check::shape_of;
using torch::headeronly::ScalarType;

constexpr const char* kCrossEntropy = "cross_entropy";
constexpr const char* kMaskedReduce = "masked_reduce";
constexpr const char* kDivergence = "masked_divergence";
constexpr const char* kLinear = "linear_cross_entropy";

// Straight through the C shim: the dispatcher's new_empty costs more than a small loss.
Tensor empty(const Tensor& like, const Shape& shape, int32_t dtype) {
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
int32_t dtype_id(const Tensor& t) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}
int32_t accumulation_id(bool wide) {
  return wide ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}
ScalarType accumulation_type(bool wide) { return wide ? ScalarType::Double : ScalarType::Float; }

Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}
Tensor as_type(const Tensor& t, ScalarType type) {
  return as_contiguous(t.scalar_type() == type ? t : torch::stable::to(t, type));
}
Tensor as_mask(const Tensor& t) {
  return check::is_wide_unsigned(t) ? as_type(t, ScalarType::Double) : as_contiguous(t);
}
const void* data(const std::optional<Tensor>& t) { return t ? t->data_ptr() : nullptr; }

int64_t product(const Shape& shape) {
  int64_t n = 1;
  for (int64_t size : shape) n *= size;
  return n;
}

// Rows of logits as base + batch * batch_stride + step * step_stride; what has more structure than
// that, or classes that are not contiguous, is copied. The strides of an empty tensor mean nothing:
// PyTorch calls it contiguous whatever they are.
struct Rows {
  Tensor tensor;
  int64_t rows, steps, cols, batch_stride, step_stride;
};
std::optional<Rows> rows_in_place(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  const int64_t dims = static_cast<int64_t>(sizes.size());
  Rows r{t, 1, 1, sizes[dims - 1], 0, 0};
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
Rows rows_of(const Tensor& t) {
  if (auto rows = rows_in_place(t)) return *rows;
  return *rows_in_place(torch::stable::contiguous(t));
}

struct Options {
  double label_smoothing, z_loss, softcap;
  bool shift;
};

// Everything about a call that the kernels are told, and what keeps the memory alive meanwhile.
struct Problem {
  Rows logits;
  Tensor target;
  std::optional<Tensor> class_weight;
  Shape token_shape;
  const Device& device;
  RowArgs args{};
  bool wide;
};

Problem make_problem(const Device& device, const Tensor& logits, const Tensor& target,
                     const std::optional<Tensor>& class_weight, const Options& options) {
  check::numbers(kCrossEntropy, options.label_smoothing, options.z_loss);
  const bool probabilities = check::is_floating(check::dtype_of(target));
  check::cross_entropy(kCrossEntropy, logits, target, probabilities, options.shift);
  Problem p{rows_of(logits), as_contiguous(target), std::nullopt, shape_of(logits), device};
  p.token_shape.pop_back();
  p.args.dtype = *check::dtype_of(logits);
  p.wide = p.args.dtype == DType::kFloat64;
  if (p.logits.cols == 0 && p.logits.rows > 0) {
    check::fail("ValueError", kCrossEntropy, ": logits must have at least one class, got shape ",
                check::text(shape_of(logits)));
  }
  if (class_weight) {
    check::class_weight(kCrossEntropy, *class_weight, p.logits.cols);
    p.class_weight = as_type(*class_weight, accumulation_type(p.wide));
  }
  RowArgs& a = p.args;
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
  a.label_smoothing = options.label_smoothing;
  a.z_loss = options.z_loss;
  a.softcap = options.softcap;
  return p;
}

// At least one, also of an empty batch.
int64_t groups_of(Reduction reduction, int64_t tokens, int64_t steps) {
  if (reduction != Reduction::kSequenceMean || tokens == 0) return 1;
  return tokens / steps;
}

// The memory that a CUDA kernel's blocks hand each other their results in; the CPU asks for none.
// To be kept until the kernel is launched: what the stream does later, it does in order.
template <class Args>
std::optional<Tensor> scratch_for(int64_t (*bytes_for)(const Args&), Args* args,
                                  const Tensor& like) {
  const int64_t bytes = bytes_for(*args);
  if (bytes == 0) return std::nullopt;
  Tensor scratch = empty(like, {(bytes + 7) / 8}, aoti_torch_dtype_float64());
  args->scratch = scratch.data_ptr();
  return scratch;
}

// Token and group tables, filled by weigh().
struct Tables {
  Tensor tokens, groups;

  // As the kernels are told.
  Groups of(int64_t count) const {
    const int64_t groups_count = std::max<int64_t>(1, groups.size(0));
    return {count, groups_count, count / groups_count, nullptr,
            static_cast<double*>(groups.data_ptr())};
  }
};

Tables weigh(const char* who, const Device& device, WeighArgs args, const Tensor& like,
             int64_t fields, const std::optional<Tensor>& mask,
             const std::optional<Tensor>& normalizer, const Shape& token_shape) {
  const int64_t tokens = product(token_shape);
  const int64_t groups = groups_of(args.reduction, tokens, args.steps);
  const Tables t{empty(like, {fields, tokens}, accumulation_id(args.wide)),
                 empty(like, {groups, GroupField::kCount}, aoti_torch_dtype_float64())};
  const std::optional<Tensor> flat_mask =
      mask ? std::optional<Tensor>(as_mask(*mask)) : std::nullopt;
  const std::optional<Tensor> divisor =
      normalizer ? std::optional<Tensor>(as_type(*normalizer, ScalarType::Double)) : std::nullopt;
  args.groups = t.of(tokens);
  args.mask = data(flat_mask);
  args.mask_type = flat_mask ? *check::dtype_of(*flat_mask) : DType::kBool;
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

Tensor reduced(const Device& device, const Tables& tables, Reduction reduction, bool wide,
               double z_loss, const Shape& token_shape, const std::optional<Tensor>& stats) {
  const Shape shape = reduction == Reduction::kNone ? token_shape : Shape();
  Tensor loss = empty(tables.tokens, shape, accumulation_id(wide));
  ReduceArgs args{};
  args.groups = tables.of(product(token_shape));
  args.reduction = reduction;
  args.table = tables.tokens.data_ptr();
  args.wide = wide;
  args.z_loss = z_loss;
  args.loss = loss.data_ptr();
  args.stats = stats ? stats->data_ptr() : nullptr;
  const auto scratch = scratch_for(device.kernels.reduce_scratch, &args, loss);
  device.kernels.reduce(args, device.queue());
  return loss;
}

// dlogits has rows like the logits', and may be the logits.
void set_gradient(Problem& p, const Tensor& dlogits, const Tensor& logits) {
  check::shape(kCrossEntropy, "dlogits", dlogits, shape_of(logits));
  check::same_dtype(kCrossEntropy, "dlogits", dlogits, "logits", logits);
  const std::optional<Rows> rows = rows_in_place(dlogits);
  if (!rows) {
    check::fail("ValueError", kCrossEntropy, ": dlogits must have contiguous classes and rows");
  }
  p.args.dlogits = dlogits.data_ptr();
  p.args.grad_batch_stride = rows->batch_stride;
  p.args.grad_step_stride = rows->step_stride;
  p.args.stream = dlogits.numel() * dlogits.element_size() > p.device.kernels.cache_bytes;
}

void run_rows(Problem* p) {
  const Backend& kernels = p->device.kernels;
  const auto scratch = scratch_for(kernels.cross_entropy_scratch, &p->args, p->logits.tensor);
  kernels.cross_entropy(p->args, p->device.queue());
}

void set_tables(Problem* p, const Tables& tables) {
  const Groups groups = tables.of(p->args.rows);
  p->args.table = tables.tokens.data_ptr();
  p->args.groups = groups.table;
  p->args.group_size = groups.size;
}

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // loss, stats, tokens, groups

Forward forward(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& mask,
                const std::string& reduction_name, const std::optional<Tensor>& normalizer,
                int64_t ignore_index, const std::optional<Tensor>& class_weight,
                const Options& options, bool stats, const std::optional<Tensor>& dlogits) {
  const Device device(logits);
  Problem p = make_problem(device, logits, target, class_weight, options);
  if (mask) check::mask(kCrossEntropy, *mask, p.token_shape);
  const Reduction reduction = check::reduction(
      kCrossEntropy, reduction_name, static_cast<int64_t>(p.token_shape.size()), normalizer);
  if (dlogits && reduction == Reduction::kNone) {
    check::fail("ValueError", kCrossEntropy,
                ": the fused operator needs a scalar reduction, got \"none\"");
  }
  WeighArgs weights{};
  weights.steps = p.args.steps;
  weights.skip_first = options.shift;
  weights.target = p.args.target;
  weights.target_type = p.args.target_type;
  weights.classes = p.args.cols;
  weights.ignore_index = ignore_index;
  weights.class_weight = p.args.probs ? nullptr : p.args.class_weight;
  weights.reduction = reduction;
  weights.wide = p.wide;
  const int64_t fields = stats ? TokenField::kCount : TokenField::kSaved;
  const Tables tables =
      weigh(kCrossEntropy, p.device, weights, logits, fields, mask, normalizer, p.token_shape);
  const int64_t stat_count = stats ? static_cast<int64_t>(StatField::kCount) : 0;
  const Tensor stat_sums = empty(logits, {stat_count}, accumulation_id(p.wide));
  set_tables(&p, tables);
  p.args.stats = stats;
  p.args.forward = true;
  if (dlogits) set_gradient(p, *dlogits, logits);
  run_rows(&p);
  const Tensor loss = reduced(device, tables, reduction, p.wide, options.z_loss, p.token_shape,
                              stats ? std::optional<Tensor>(stat_sums) : std::nullopt);
  return {loss, stat_sums, tables.tokens, tables.groups};
}

// One value, or one for each token.
Tensor upstream(const char* who, const Tensor& dloss, bool wide, int64_t tokens) {
  const int64_t numel = dloss.numel();
  if (dloss.dim() != 0 && numel != tokens) {
    check::fail("ValueError", who, ": dloss must be a scalar or one value for each of ", tokens,
                " tokens, got shape ", check::text(shape_of(dloss)));
  }
  return as_type(dloss, accumulation_type(wide));
}

void check_tables(const char* who, const Tensor& tokens, const Tensor& groups, int64_t rows,
                  bool wide, int64_t fields) {
  if (tokens.dim() != 2 || tokens.size(0) < fields || tokens.size(1) != rows ||
      tokens.scalar_type() != accumulation_type(wide) || !tokens.is_contiguous()) {
    check::fail("ValueError", who, ": tokens must be the forward operator's table, got shape ",
                check::text(shape_of(tokens)));
  }
  if (groups.dim() != 2 || groups.size(1) != GroupField::kCount ||
      groups.scalar_type() != ScalarType::Double || !groups.is_contiguous() ||
      (rows && (groups.size(0) == 0 || rows % groups.size(0)))) {
    check::fail("ValueError", who, ": groups must be the forward operator's table, got shape ",
                check::text(shape_of(groups)));
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy_forward(
    Tensor logits, Tensor target, OptionalTensor mask, OptionalTensor normalizer,
    OptionalTensor class_weight, std::string reduction, int64_t ignore_index,
    double label_smoothing, double z_loss, std::optional<double> softcap, bool shift, bool stats) {
  return forward(logits, target, mask, reduction, normalizer, ignore_index, class_weight,
                 {label_smoothing, z_loss, check::softcap(kCrossEntropy, softcap), shift}, stats,
                 std::nullopt);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy_fused(
    Tensor dlogits, Tensor logits, Tensor target, OptionalTensor mask, OptionalTensor normalizer,
    OptionalTensor class_weight, std::string reduction, int64_t ignore_index,
    double label_smoothing, double z_loss, std::optional<double> softcap, bool shift, bool stats) {
  return forward(logits, target, mask, reduction, normalizer, ignore_index, class_weight,
                 {label_smoothing, z_loss, check::softcap(kCrossEntropy, softcap), shift}, stats,
                 dlogits);
}

Tensor cross_entropy(Tensor logits, Tensor target, OptionalTensor mask, std::string reduction,
                     OptionalTensor normalizer, int64_t ignore_index, OptionalTensor class_weight,
                     double label_smoothing, double z_loss, std::optional<double> softcap,
                     bool shift, bool) {
  return std::get<0>(cross_entropy_forward(logits, target, mask, normalizer, class_weight,
                                           reduction, ignore_index, label_smoothing, z_loss,
                                           softcap, shift, false));
}

std::tuple<Tensor, Tensor> cross_entropy_stats(Tensor logits, Tensor target, OptionalTensor mask,
                                               std::string reduction, OptionalTensor normalizer,
                                               int64_t ignore_index, OptionalTensor class_weight,
                                               double label_smoothing, double z_loss,
                                               std::optional<double> softcap, bool shift, bool) {
  const Forward result =
      cross_entropy_forward(logits, target, mask, normalizer, class_weight, reduction, ignore_index,
                            label_smoothing, z_loss, softcap, shift, true);
  return {std::get<0>(result), std::get<1>(result)};
}

void cross_entropy_backward_out(Tensor dlogits, Tensor dloss, Tensor logits, Tensor target,
                                Tensor tokens, Tensor groups, OptionalTensor class_weight,
                                double label_smoothing, double z_loss,
                                std::optional<double> softcap, bool shift, bool unless_one) {
  const Device device(logits);
  Problem p =
      make_problem(device, logits, target, class_weight,
                   {label_smoothing, z_loss, check::softcap(kCrossEntropy, softcap), shift});
  check_tables(kCrossEntropy, tokens, groups, p.args.rows, p.wide, TokenField::kSaved);
  const Tensor scale = upstream(kCrossEntropy, dloss, p.wide, p.args.rows);
  set_tables(&p, {tokens, groups});
  p.args.upstream[0] = {scale.data_ptr(), dloss.dim() != 0};
  set_gradient(p, dlogits, logits);
  const auto run = unless_one ? device.kernels.rescale : device.kernels.cross_entropy;
  run(p.args, device.queue());
}

Tensor cross_entropy_backward(Tensor dloss, Tensor logits, Tensor target, Tensor tokens,
                              Tensor groups, OptionalTensor class_weight, double label_smoothing,
                              double z_loss, std::optional<double> softcap, bool shift) {
  Tensor dlogits = empty(logits, shape_of(logits), dtype_id(logits));
  ask_for_large_pages(dlogits);
  cross_entropy_backward_out(dlogits, dloss, logits, target, tokens, groups, class_weight,
                             label_smoothing, z_loss, softcap, shift, false);
  return dlogits;
}

Tensor mask_grad(Tensor dloss, Tensor mask, Tensor tokens, Tensor groups, OptionalTensor target,
                 OptionalTensor class_weight, double z_loss) {
  const DType mask_type = check::floating("mask_grad", "mask", mask);
  const bool wide = tokens.scalar_type() == ScalarType::Double;
  const int64_t count = mask.numel();
  check_tables("mask_grad", tokens, groups, count, wide,
               z_loss != 0 ? TokenField::kSaved : TokenField::kTop);
  const Tensor scale = upstream("mask_grad", dloss, wide, count);
  const auto weight = class_weight
                          ? std::optional<Tensor>(as_type(*class_weight, accumulation_type(wide)))
                          : std::nullopt;
  const auto index = target ? std::optional<Tensor>(as_contiguous(*target)) : std::nullopt;
  Tensor dmask = empty(mask, shape_of(mask), dtype_id(mask));
  MaskGradArgs args{};
  args.groups = Tables{tokens, groups}.of(count);
  args.table = tokens.data_ptr();
  args.wide = wide;
  args.z_loss = z_loss;
  args.target = data(index);
  args.target_type = index ? check::class_indices("mask_grad", *index) : DType::kInt64;
  args.class_weight = index ? data(weight) : nullptr;
  args.dloss = scale.data_ptr();
  args.dloss_per_token = dloss.dim() != 0;
  args.dmask = dmask.data_ptr();
  args.mask_type = mask_type;
  const Device device(mask);
  device.kernels.mask_grad(args, device.queue());
  return dmask;
}

std::tuple<Tensor, Tensor> linear_weigh(Tensor target, OptionalTensor mask,
                                        OptionalTensor normalizer, OptionalTensor class_weight,
                                        std::string reduction_name, int64_t ignore_index,
                                        int64_t classes, double label_smoothing, double z_loss,
                                        std::optional<double> softcap, bool wide, bool shift,
                                        bool stats) {
  const Shape shape = shape_of(target);
  check::numbers(kLinear, label_smoothing, z_loss);
  check::softcap(kLinear, softcap);
  WeighArgs args{};
  args.target_type = check::class_indices(kLinear, target);
  if (shift && shape.empty()) {
    check::fail("ValueError", kLinear, ": shift needs a time dimension, got a scalar target");
  }
  if (mask) check::mask(kLinear, *mask, shape);
  args.reduction =
      check::reduction(kLinear, reduction_name, static_cast<int64_t>(shape.size()), normalizer);
  std::optional<Tensor> weight;
  if (class_weight) {
    check::class_weight(kLinear, *class_weight, classes);
    weight = as_type(*class_weight, accumulation_type(wide));
  }
  const Tensor flat = as_contiguous(target);
  args.steps = shape.empty() ? 1 : shape.back();
  args.skip_first = shift;
  args.target = flat.data_ptr();
  args.classes = classes;
  args.ignore_index = ignore_index;
  args.class_weight = data(weight);
  args.wide = wide;
  const int64_t fields = stats ? TokenField::kCount : TokenField::kSaved;
  const Tables tables =
      weigh(kLinear, Device(target), args, target, fields, mask, normalizer, shape);
  return {tables.tokens, tables.groups};
}

void linear_chunk(Tensor logits, Tensor target, Tensor tokens, Tensor groups,
                  OptionalTensor class_weight, OptionalTensor dloss, double label_smoothing,
                  double z_loss, std::optional<double> softcap, bool forward, bool gradient) {
  const Device device(logits);
  Problem p = make_problem(device, logits, target, class_weight,
                           {label_smoothing, z_loss, check::softcap(kLinear, softcap), false});
  check_tables(kLinear, tokens, groups, p.args.rows, p.wide, TokenField::kSaved);
  std::optional<Tensor> scale;
  if (dloss) scale = upstream(kLinear, *dloss, p.wide, p.args.rows);
  set_tables(&p, {tokens, groups});
  p.args.upstream[0] = {data(scale), dloss && dloss->dim() != 0};
  p.args.forward = forward;
  p.args.stats = forward && tokens.size(0) == TokenField::kCount;
  if (gradient) set_gradient(p, logits, logits);
  run_rows(&p);
}

std::tuple<Tensor, Tensor> linear_reduce(Tensor tokens, Tensor groups, Tensor target,
                                         std::string reduction_name, double z_loss, bool stats) {
  const Shape shape = shape_of(target);
  const int64_t count = product(shape);
  const bool wide = tokens.scalar_type() == ScalarType::Double;
  const Reduction reduction =
      check::reduction(kLinear, reduction_name, static_cast<int64_t>(shape.size()), std::nullopt);
  check_tables(kLinear, tokens, groups, count, wide,
               stats ? static_cast<int64_t>(TokenField::kCount) : TokenField::kSaved);
  const Tensor sums =
      empty(tokens, {stats ? static_cast<int64_t>(StatField::kCount) : 0}, accumulation_id(wide));
  const Tensor loss = reduced(Device(tokens), {tokens, groups}, reduction, wide, z_loss, shape,
                              stats ? std::optional<Tensor>(sums) : std::nullopt);
  return {loss, sums};
}

std::tuple<Tensor, Tensor, Tensor> masked_reduce_forward(Tensor values, OptionalTensor mask,
                                                         OptionalTensor normalizer,
                                                         std::string reduction_name) {
  const DType dtype = check::floating(kMaskedReduce, "values", values);
  const Shape shape = shape_of(values);
  if (mask) check::mask(kMaskedReduce, *mask, shape);
  const Reduction reduction = check::reduction(kMaskedReduce, reduction_name,
                                               static_cast<int64_t>(shape.size()), normalizer);
  const Device device(values);
  const Tensor flat = as_contiguous(values);
  WeighArgs weights{};
  weights.steps = shape.empty() ? 1 : shape.back();
  weights.reduction = reduction;
  weights.wide = dtype == DType::kFloat64;
  const Tables tables =
      weigh(kMaskedReduce, device, weights, values, TokenField::kTop, mask, normalizer, shape);
  ValuesArgs args{};
  args.groups = tables.of(product(shape));
  args.values = flat.data_ptr();
  args.dtype = dtype;
  args.table = tables.tokens.data_ptr();
  args.wide = weights.wide;
  device.kernels.load_values(args, device.queue());
  Tensor loss = reduced(device, tables, reduction, weights.wide, 0, shape, std::nullopt);
  return {loss, tables.tokens, tables.groups};
}

Tensor masked_reduce(Tensor values, OptionalTensor mask, std::string reduction,
                     OptionalTensor normalizer) {
  return std::get<0>(masked_reduce_forward(values, mask, normalizer, reduction));
}

Tensor masked_reduce_backward(Tensor dloss, Tensor values, Tensor tokens, Tensor groups) {
  const DType dtype = check::floating(kMaskedReduce, "values", values);
  const int64_t count = values.numel();
  const bool wide = dtype == DType::kFloat64;
  check_tables(kMaskedReduce, tokens, groups, count, wide, TokenField::kTop);
  const Tensor scale = upstream(kMaskedReduce, dloss, wide, count);
  Tensor dvalues = empty(values, shape_of(values), dtype_id(values));
  ValuesArgs args{};
  args.groups = Tables{tokens, groups}.of(count);
  args.dtype = dtype;
  args.table = tokens.data_ptr();
  args.wide = wide;
  args.dloss = scale.data_ptr();
  args.dloss_per_token = dloss.dim() != 0;
  args.dvalues = dvalues.data_ptr();
  const Device device(values);
  device.kernels.values_grad(args, device.queue());
  return dvalues;
}

std::tuple<Tensor, Tensor> divergence_weigh(Tensor logits, OptionalTensor mask,
                                            OptionalTensor normalizer, std::string reduction_name,
                                            bool shift, bool stats) {
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
  if (mask) check::mask(kDivergence, *mask, shape);
  WeighArgs args{};
  args.steps = shape.empty() ? 1 : shape.back();
  args.skip_first = shift;
  args.reduction =
      check::reduction(kDivergence, reduction_name, static_cast<int64_t>(shape.size()), normalizer);
  args.wide = dtype == DType::kFloat64;
  const int64_t fields = stats ? DivergenceField::kCount : DivergenceField::kSaved;
  const Tables tables =
      weigh(kDivergence, Device(logits), args, logits, fields, mask, normalizer, shape);
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
  check::shape(kDivergence, "teacher_logits", teacher_logits, shape_of(logits));
  check::temperature(kDivergence, "temperature", temperature);
  check::temperature(kDivergence, "teacher_temperature", teacher_temperature);
  // Kernels read doubles with doubles only.
  const bool mixed = wide != (teacher_logits.scalar_type() == ScalarType::Double);
  const Rows student = rows_of(logits);
  const Rows teacher =
      rows_of(mixed ? as_type(teacher_logits, accumulation_type(wide)) : teacher_logits);
  if (student.cols == 0 && student.rows > 0) {
    check::fail("ValueError", kDivergence, ": logits must have at least one class, got shape ",
                check::text(shape_of(logits)));
  }
  check_tables(kDivergence, tokens, groups, student.rows, wide, DivergenceField::kSaved);
  const auto per_token = [&](const OptionalTensor& t) {
    return t ? OptionalTensor(upstream(kDivergence, *t, wide, student.rows)) : std::nullopt;
  };
  const OptionalTensor scale = per_token(dloss), own = per_token(temperatures),
                       others = per_token(teacher_temperatures);

  DivergenceArgs args{};
  const auto side = [](const Rows& rows, double cap, double value, const OptionalTensor& values) {
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
    check::shape(kDivergence, "dlogits", *dlogits, shape_of(logits));
    check::same_dtype(kDivergence, "dlogits", *dlogits, "logits", logits);
    const std::optional<Rows> rows = rows_in_place(*dlogits);
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
