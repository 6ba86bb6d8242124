// SPDX-License-Identifier: BSD-3-Clause
// The operators of token_log_probs: check -> allocate -> run.
#include "ops/backend_of.h"
#include "ops/check.h"
#include "ops/ops.h"
#include "ops/tensors.h"

namespace masked_loss {
namespace {

constexpr const char* kLogProbs = "token_log_probs";

struct LogProbOptions {
  double temperature;
  int64_t ignore_index;
  std::optional<double> softcap;
  bool shift;
};

// What forward and backward tell the kernels alike, and what keeps the memory alive meanwhile.
struct Problem {
  Shape tokens;
  RowLayout logits;
  Tensor target;
  OptionalTensor temperatures, scratch;
  RowArgs args{};
  bool wide;

  Problem(const Tensor& logits_, const Tensor& target_, const OptionalTensor& temperatures_,
          const LogProbOptions& options)
      : tokens(shape_of(logits_)),
        logits(rows_of(checked(logits_))),
        target(as_contiguous(target_)),
        wide(check::floating(kLogProbs, "logits", logits_) == DType::kFloat64) {
    tokens.pop_back();
    check_target(options);
    if (!(options.temperature > 0 && std::isfinite(options.temperature))) {
      check::fail("ValueError", kLogProbs, ": temperature must be greater than 0 and finite, got ",
                  options.temperature);
    }
    if (temperatures_) {
      check::floating(kLogProbs, "temperature", *temperatures_);
      check::has_shape(kLogProbs, "temperature", *temperatures_, tokens);
      temperatures = as_type(temperatures_, accumulation_type(wide));
    }
    args.loss = RowLoss::kLogProbs;
    args.logits = logits.tensor.data_ptr();
    args.dtype = *check::dtype_of(logits_);
    args.rows = logits.rows;
    args.steps = std::max<int64_t>(1, logits.steps);
    args.cols = args.classes = logits.cols;
    args.batch_stride = logits.batch_stride;
    args.step_stride = logits.step_stride;
    args.shift = options.shift;
    args.target = target.data_ptr();
    args.target_type = check::class_indices(kLogProbs, target_);
    args.ids = shape_of(target).size() == tokens.size() ? 1 : shape_of(target).back();
    args.ignore_index = options.ignore_index;
    args.softcap = check::softcap(kLogProbs, options.softcap);
    args.temperature = options.temperature;
    args.temperatures = data(temperatures);
  }

  bool has_ids() const { return shape_of(target).size() > tokens.size(); }

  void run(const Device& device) {
    if (const int64_t bytes = device.kernels.cross_entropy_scratch(args)) {
      scratch = empty(logits.tensor, {(bytes + 7) / 8}, aoti_torch_dtype_float64());
      args.scratch = scratch->data_ptr();
    }
    device.kernels.cross_entropy(args, device.queue());
  }

 private:
  static const Tensor& checked(const Tensor& logits) {
    constexpr int64_t kMostClasses = 1 << 29;  // a CUDA kernel's index into a row is an int
    check::floating(kLogProbs, "logits", logits);
    const Shape shape = shape_of(logits);
    if (shape.empty()) check::fail("ValueError", kLogProbs, ": logits must have shape [..., V]");
    if (logits.numel() == 0 && shape.back() == 0 && product({shape.begin(), shape.end() - 1}) > 0) {
      check::fail("ValueError", kLogProbs, ": logits must have at least one class, got shape ",
                  check::text(shape));
    }
    if (shape.back() > kMostClasses) {
      check::fail("ValueError", kLogProbs, ": logits must have at most ", kMostClasses,
                  " classes, got ", shape.back());
    }
    return logits;
  }

  void check_target(const LogProbOptions& options) {
    check::class_indices(kLogProbs, target);
    const Shape got = shape_of(target);
    Shape without_ids = got;
    if (got.size() == tokens.size() + 1) without_ids.pop_back();
    if (without_ids != tokens) {
      check::fail("ValueError", kLogProbs, ": target must have shape ", check::text(tokens),
                  ", or one dimension more, got ", check::text(got));
    }
    if (options.shift && tokens.empty()) {
      check::fail("ValueError", kLogProbs, ": shift needs logits [..., T, V], got [", logits.cols,
                  "]");
    }
  }
};

[[noreturn]] void out_of_range(const Problem& p, int64_t token, int64_t ignore_index) {
  for (int64_t k = token * p.args.ids;; ++k) {
    const int64_t id = p.args.target_type == DType::kInt64
                           ? static_cast<const int64_t*>(p.args.target)[k]
                           : static_cast<const int32_t*>(p.args.target)[k];
    if (id == ignore_index || (id >= 0 && id < p.args.cols)) continue;
    check::out_of_range(kLogProbs, k, shape_of(p.target), id, p.args.cols, ignore_index);
  }
}

// Which tokens are masked, into the first column of the table.
void weigh(const Device& device, const Problem& p, const OptionalTensor& mask, bool keep_ignored) {
  const OptionalTensor flat = mask ? OptionalTensor(as_mask(*mask)) : std::nullopt;
  const Tensor groups = empty(p.logits.tensor, {1, GroupField::kCount}, aoti_torch_dtype_float64());
  WeighArgs args{};
  args.groups = {p.args.rows, 1, p.args.rows, doubles(groups), GroupField::kCount, nullptr, 0};
  args.steps = p.args.steps;
  args.skip_first = p.args.shift;
  args.target = p.args.target;
  args.target_type = p.args.target_type;
  args.ids = p.args.ids;
  args.keep_ignored = keep_ignored;
  args.classes = p.args.cols;
  args.ignore_index = p.args.ignore_index;
  args.mask = data(flat);
  args.mask_type = flat ? *check::dtype_of(*flat) : DType::kBool;
  args.reduction = Reduction::kNone;
  args.wide = p.wide;
  args.weight = p.args.table;
  OptionalTensor scratch;
  if (const int64_t bytes = device.kernels.weigh_scratch(args)) {
    scratch = empty(p.logits.tensor, {(bytes + 7) / 8}, aoti_torch_dtype_float64());
    args.scratch = scratch->data_ptr();
  }
  const int64_t bad = device.kernels.weigh(args, device.queue());
  if (bad >= 0) out_of_range(p, bad, p.args.ignore_index);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> token_log_probs_forward(Tensor logits, Tensor target,
                                                           OptionalTensor mask,
                                                           OptionalTensor temperatures,
                                                           double temperature, int64_t ignore_index,
                                                           std::optional<double> softcap,
                                                           bool shift, bool entropy) {
  const Device device(logits);
  Problem p(logits, target, temperatures, {temperature, ignore_index, softcap, shift});
  if (mask) check::is_mask(kLogProbs, *mask, p.tokens);
  const int32_t number = accumulation_id(p.wide);
  const int64_t columns = entropy ? LogProbField::kCount : LogProbField::kEntropySum;
  const Tensor table = empty(logits, {columns, p.args.rows}, number);
  const Tensor log_probs = empty(logits, shape_of(p.target), number);
  const Tensor entropies = empty(logits, entropy ? p.tokens : Shape{0}, number);
  p.args.table = table.data_ptr();
  p.args.results[0] = log_probs.data_ptr();
  p.args.results[1] = entropy ? entropies.data_ptr() : nullptr;
  p.args.forward = true;
  // One target that is ignored masks its token; of several, they have to be all, and the entropy is
  // of the token, not of an id.
  weigh(device, p, mask, entropy && p.has_ids());
  p.run(device);
  return {log_probs, entropies, table};
}

Tensor token_log_probs(Tensor logits, Tensor target, OptionalTensor mask,
                       OptionalTensor temperatures, double temperature, int64_t ignore_index,
                       std::optional<double> softcap, bool shift, bool) {
  return std::get<0>(token_log_probs_forward(logits, target, mask, temperatures, temperature,
                                             ignore_index, softcap, shift, false));
}

std::tuple<Tensor, Tensor> token_log_probs_entropy(Tensor logits, Tensor target,
                                                   OptionalTensor mask, OptionalTensor temperatures,
                                                   double temperature, int64_t ignore_index,
                                                   std::optional<double> softcap, bool shift,
                                                   bool) {
  const auto results = token_log_probs_forward(logits, target, mask, temperatures, temperature,
                                               ignore_index, softcap, shift, true);
  return {std::get<0>(results), std::get<1>(results)};
}

void token_log_probs_backward_out(Tensor dlogits, Tensor dlog_probs, OptionalTensor dentropy,
                                  Tensor logits, Tensor target, Tensor tokens,
                                  OptionalTensor temperatures, double temperature,
                                  int64_t ignore_index, std::optional<double> softcap, bool shift) {
  const Device device(logits);
  Problem p(logits, target, temperatures, {temperature, ignore_index, softcap, shift});
  const int64_t columns = dentropy ? LogProbField::kCount : LogProbField::kEntropySum;
  if (tokens.dim() != 2 || tokens.size(0) < columns || tokens.size(1) != p.args.rows ||
      tokens.scalar_type() != accumulation_type(p.wide) || !tokens.is_contiguous()) {
    check::fail("ValueError", kLogProbs,
                ": tokens must be the forward operator's table, got shape ",
                check::text(shape_of(tokens)));
  }
  check::has_shape(kLogProbs, "dlog_probs", dlog_probs, shape_of(target));
  if (dentropy) check::has_shape(kLogProbs, "dentropy", *dentropy, p.tokens);
  check::has_shape(kLogProbs, "dlogits", dlogits, shape_of(logits));
  check::same_dtype(kLogProbs, "dlogits", dlogits, "logits", logits);
  const std::optional<RowLayout> rows = rows_in_place(dlogits);
  if (!rows) {
    check::fail("ValueError", kLogProbs, ": dlogits must have contiguous classes and rows");
  }
  const Tensor of_ids = as_type(dlog_probs, accumulation_type(p.wide));
  const OptionalTensor of_entropy = as_type(dentropy, accumulation_type(p.wide));
  p.args.table = tokens.data_ptr();
  p.args.upstream[0] = {of_ids.data_ptr(), true, false};
  p.args.upstream[1] = {data(of_entropy), true, false};
  p.args.dlogits = dlogits.data_ptr();
  p.args.grad_batch_stride = rows->batch_stride;
  p.args.grad_step_stride = rows->step_stride;
  p.args.stream = dlogits.numel() * dlogits.element_size() > device.kernels.cache_bytes;
  p.run(device);
}

Tensor token_log_probs_backward(Tensor dlog_probs, OptionalTensor dentropy, Tensor logits,
                                Tensor target, Tensor tokens, OptionalTensor temperatures,
                                double temperature, int64_t ignore_index,
                                std::optional<double> softcap, bool shift) {
  const Tensor dlogits = empty_as(logits);
  ask_for_large_pages(dlogits);
  token_log_probs_backward_out(dlogits, dlog_probs, dentropy, logits, target, tokens, temperatures,
                               temperature, ignore_index, softcap, shift);
  return dlogits;
}

}  // namespace masked_loss
