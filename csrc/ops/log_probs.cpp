// SPDX-License-Identifier: BSD-3-Clause
// The operators of token_log_probs: check -> allocate -> run.
#include "ops/backend_of.h"
#include "ops/check.h"
#include "ops/ops.h"
#include "ops/tables.h"

namespace masked_loss {
namespace {

constexpr const char* kLogProbs = "token_log_probs";

// The targets of each token: one, or several in a dimension of their own.
struct Ids {
  Shape tokens;
  Tensor target;
  DType type;
  int64_t per_token;

  Ids(const Tensor& logits, const Tensor& target_, bool shift)
      : tokens(check::tokens_of(kLogProbs, logits, shift)),
        target(as_contiguous(target_)),
        type(check::class_indices(kLogProbs, target_)) {
    const Shape got = shape_of(target);
    Shape without_ids = got;
    if (got.size() == tokens.size() + 1) without_ids.pop_back();
    if (without_ids != tokens) {
      check::fail("ValueError", kLogProbs, ": target must have shape ", check::text(tokens),
                  ", or one dimension more, got ", check::text(got));
    }
    per_token = several() ? got.back() : 1;
  }

  bool several() const { return shape_of(target).size() > tokens.size(); }
};

// What forward and backward tell the kernels alike, and what keeps the memory alive meanwhile.
struct Problem {
  RowLayout logits;
  Ids ids;
  OptionalTensor temperatures;
  RowArgs args{};
  bool wide;

  Problem(const Tensor& logits_, const Tensor& target_, const OptionalTensor& temperatures_,
          const Scoring& options, const std::optional<Shard>& shard = std::nullopt)
      : logits(rows_of(checked(logits_, shard))),
        ids(logits_, target_, options.shift),
        wide(check::floating(kLogProbs, "logits", logits_) == DType::kFloat64) {
    check::temperature(kLogProbs, "temperature", options.temperature);
    check::temperatures(kLogProbs, temperatures_, ids.tokens);
    temperatures = as_type(temperatures_, accumulation_type(wide));
    args.loss = RowLoss::kLogProbs;
    set_rows(args, logits);
    set_shard(args, shard);
    args.shift = options.shift;
    args.target = ids.target.data_ptr();
    args.target_type = ids.type;
    args.ids = ids.per_token;
    args.ignore_index = options.ignore_index;
    args.softcap = check::softcap(kLogProbs, options.softcap);
    args.temperature = options.temperature;
    args.temperatures = data(temperatures);
  }

  void run(const Device& device) {
    const auto scratch = scratch_for(device.kernels.cross_entropy_scratch, &args, logits.tensor);
    device.kernels.cross_entropy(args, device.queue());
  }

 private:
  static const Tensor& checked(const Tensor& logits, const std::optional<Shard>& shard) {
    check::tokens_of(kLogProbs, logits, false);
    if (shard) {
      check::shard(kLogProbs, logits, *shard);
      return logits;
    }
    check::has_classes(kLogProbs, logits);
    check::fits_a_row(kLogProbs, "logits", shape_of(logits).back());
    return logits;
  }
};

// Of the table of tokens.
int64_t columns_of(bool entropy) {
  return entropy ? LogProbField::kCount : LogProbField::kEntropySum;
}

// Which tokens are masked, into the row `weight`. They are in no groups: only shift has to know
// where sequences begin. `keep_ignored`: also a token all of whose ids are ignored.
void weigh(const Device& device, const Ids& ids, const Weights& weights, const Tensor& like,
           WeighArgs args) {
  const int64_t tokens = product(ids.tokens);
  if (weights.mask) check::is_mask(kLogProbs, *weights.mask, ids.tokens);
  const Tensor groups = empty(like, {1, GroupField::kCount}, aoti_torch_dtype_float64());
  args.groups = {tokens, 1, tokens, doubles(groups), GroupField::kCount, nullptr, 0};
  args.target = ids.target.data_ptr();
  args.target_type = ids.type;
  args.ids = ids.per_token;
  args.reduction = Reduction::kNone;
  masked_loss::weigh(kLogProbs, device, args, like, weights, ids.tokens, shape_of(ids.target));
}

}  // namespace

Tensor log_probs_weigh(Tensor logits, Tensor target, OptionalTensor mask, OptionalTensor cu_seqlens,
                       int64_t classes, int64_t ignore_index, bool shift, bool keep_ignored) {
  const bool wide = check::floating(kLogProbs, "logits", logits) == DType::kFloat64;
  const Ids ids(logits, target, shift);
  const Tensor weights = empty(logits, {product(ids.tokens)}, accumulation_id(wide));
  WeighArgs args{};
  args.classes = classes;
  args.ignore_index = ignore_index;
  args.skip_first = shift;
  args.keep_ignored = keep_ignored;
  args.wide = wide;
  args.weight = weights.data_ptr();
  weigh(Device(logits), ids, {mask, std::nullopt, cu_seqlens, false}, logits, args);
  return weights;
}

std::tuple<Tensor, Tensor, Tensor> token_log_probs_forward(Tensor logits, Tensor target,
                                                           OptionalTensor mask,
                                                           OptionalTensor cu_seqlens,
                                                           OptionalTensor temperatures,
                                                           bool entropy, const Scoring& scoring) {
  const Device device(logits);
  Problem p(logits, target, temperatures, scoring);
  const int32_t number = accumulation_id(p.wide);
  const Tensor table = empty(logits, {columns_of(entropy), p.args.rows}, number);
  const Tensor log_probs = empty(logits, shape_of(p.ids.target), number);
  const Tensor entropies = empty(logits, entropy ? p.ids.tokens : Shape{0}, number);
  p.args.table = table.data_ptr();
  p.args.results[0] = log_probs.data_ptr();
  p.args.results[1] = entropy ? entropies.data_ptr() : nullptr;
  p.args.forward = true;
  // One target that is ignored masks its token; of several, they have to be all, and the entropy is
  // of the token, not of an id.
  WeighArgs weights{};
  weights.keep_ignored = entropy && p.ids.several();
  weights.classes = p.args.cols;
  weights.ignore_index = scoring.ignore_index;
  weights.skip_first = scoring.shift;
  weights.wide = p.wide;
  weights.weight = p.args.table;
  weigh(device, p.ids, {mask, std::nullopt, cu_seqlens, false}, logits, weights);
  p.run(device);
  return {log_probs, entropies, table};
}

Tensor token_log_probs(Tensor logits, Tensor target, OptionalTensor mask, OptionalTensor cu_seqlens,
                       OptionalTensor temperatures, bool, const Scoring& scoring) {
  return std::get<0>(
      token_log_probs_forward(logits, target, mask, cu_seqlens, temperatures, false, scoring));
}

std::tuple<Tensor, Tensor> token_log_probs_entropy(Tensor logits, Tensor target,
                                                   OptionalTensor mask, OptionalTensor cu_seqlens,
                                                   OptionalTensor temperatures, bool,
                                                   const Scoring& scoring) {
  const auto results =
      token_log_probs_forward(logits, target, mask, cu_seqlens, temperatures, true, scoring);
  return {std::get<0>(results), std::get<1>(results)};
}

namespace {

void backward(const Tensor& dlogits, const Tensor& dlog_probs, const OptionalTensor& dentropy,
              const Tensor& logits, const Tensor& target, const Tensor& tokens,
              const OptionalTensor& temperatures, const std::optional<Shard>& shard,
              const Scoring& scoring) {
  const Device device(logits);
  Problem p(logits, target, temperatures, scoring, shard);
  check_tokens(kLogProbs, tokens, p.args.rows, p.wide, columns_of(dentropy.has_value()));
  check::has_shape(kLogProbs, "dlog_probs", dlog_probs, shape_of(target));
  if (dentropy) check::has_shape(kLogProbs, "dentropy", *dentropy, p.ids.tokens);
  set_gradient(kLogProbs, p.args, device, dlogits, logits);
  const Tensor of_ids = as_type(dlog_probs, accumulation_type(p.wide));
  const OptionalTensor of_entropy = as_type(dentropy, accumulation_type(p.wide));
  p.args.table = tokens.data_ptr();
  p.args.upstream[0] = {of_ids.data_ptr(), true, false};
  p.args.upstream[1] = {data(of_entropy), true, false};
  p.run(device);
}

}  // namespace

void token_log_probs_backward_out(Tensor dlogits, Tensor dlog_probs, OptionalTensor dentropy,
                                  Tensor logits, Tensor target, Tensor tokens,
                                  OptionalTensor temperatures, const Scoring& scoring) {
  backward(dlogits, dlog_probs, dentropy, logits, target, tokens, temperatures, std::nullopt,
           scoring);
}

Tensor token_log_probs_backward(Tensor dlog_probs, OptionalTensor dentropy, Tensor logits,
                                Tensor target, Tensor tokens, OptionalTensor temperatures,
                                const Scoring& scoring) {
  const Tensor dlogits = empty_as(logits);
  ask_for_large_pages(dlogits);
  token_log_probs_backward_out(dlogits, dlog_probs, dentropy, logits, target, tokens, temperatures,
                               scoring);
  return dlogits;
}

// Shards of the classes

Tensor token_log_probs_partial(Tensor logits, Tensor target, Tensor tokens,
                               OptionalTensor temperatures, bool entropy, const Shard& shard,
                               const Scoring& scoring) {
  const Device device(logits);
  Problem p(logits, target, temperatures, scoring, shard);
  check_tokens(kLogProbs, tokens, p.args.rows, p.wide, columns_of(entropy));
  p.args.table = tokens.data_ptr();
  p.args.stats = entropy;
  const Tensor part = empty(logits, {part_numbers(p.args), p.args.rows}, accumulation_id(p.wide));
  tell(p.args, device, part);
  return part;
}

std::tuple<Tensor, Tensor> token_log_probs_merge(Tensor parts, Tensor target, Tensor tokens,
                                                 Tensor bounds, bool entropy,
                                                 const Scoring& scoring) {
  const Device device(parts);
  const bool wide = parts.scalar_type() == ScalarType::Double;
  const Tensor ids = as_contiguous(target);
  MergeArgs args{};
  args.loss = RowLoss::kLogProbs;
  args.rows = tokens.size(1);
  check_tokens(kLogProbs, tokens, args.rows, wide, columns_of(entropy));
  args.table = tokens.data_ptr();
  args.target = ids.data_ptr();
  args.target_type = check::class_indices(kLogProbs, ids);
  args.ids = args.rows ? ids.numel() / args.rows : 1;
  args.ignore_index = scoring.ignore_index;
  args.stats = entropy;
  const Tensor log_probs = empty(parts, shape_of(target), accumulation_id(wide));
  const Tensor entropies = empty(parts, {entropy ? args.rows : 0}, accumulation_id(wide));
  args.results[0] = log_probs.data_ptr();
  args.results[1] = entropy ? entropies.data_ptr() : nullptr;
  merge(kLogProbs, args, device, parts, bounds);
  return {log_probs, entropies};
}

void token_log_probs_shard_backward_out(Tensor dlogits, Tensor dlog_probs, OptionalTensor dentropy,
                                        Tensor logits, Tensor target, Tensor tokens,
                                        OptionalTensor temperatures, const Shard& shard,
                                        const Scoring& scoring) {
  backward(dlogits, dlog_probs, dentropy, logits, target, tokens, temperatures, shard, scoring);
}

Tensor token_log_probs_shard_backward(Tensor dlog_probs, OptionalTensor dentropy, Tensor logits,
                                      Tensor target, Tensor tokens, OptionalTensor temperatures,
                                      const Shard& shard, const Scoring& scoring) {
  const Tensor dlogits = empty_as(logits);
  ask_for_large_pages(dlogits);
  backward(dlogits, dlog_probs, dentropy, logits, target, tokens, temperatures, shard, scoring);
  return dlogits;
}

}  // namespace masked_loss
