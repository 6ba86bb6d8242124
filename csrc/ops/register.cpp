// SPDX-License-Identifier: BSD-3-Clause
// The operators of masked_loss: the schema and the function of each.
//
// Of ML_OPERATORS the public ones are differentiable, of the others their autograd formulas
// (masked_loss/_op/) are made. ML_PYTHON_OPERATORS have their kernels there too.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <stdexcept>
#include <utility>

#include "ops/check.h"
#include "ops/ops.h"

#if !defined(_WIN32)
// PyTorch has it from 2.13 on. Bound weakly, it lets the same library load into an older one.
extern "C" const char* torch_exception_get_what_without_backtrace();
#pragma weak torch_exception_get_what_without_backtrace
#endif

#define ML_PUBLIC \
  "(Tensor logits, " ML_PUBLIC_INPUTS ", bool inplace_backward=False, " ML_OPTIONS ") -> "
// With defaults, so that a call need not give them: PyTorch looks at each argument that it gets.
#define ML_FORWARD \
  "Tensor logits, " ML_INPUTS_OR("=None") ", bool stats=False, " ML_OPTIONS ") -> " ML_TABLES
#define ML_TABLES "(Tensor loss, Tensor stats, Tensor tokens, Tensor groups"

// Which classes the ranks of a group have.
#define ML_SHARDS "str vocab_group, int[] bounds, "
#define ML_HEAD_SHARDS "str vocab_group=\"\", int[] bounds=[], bool reduce_hidden=True, "
#define ML_SHARDED_PUBLIC                                                                    \
  "(Tensor logits, " ML_PUBLIC_INPUTS ", bool inplace_backward=False, " ML_SHARDS ML_OPTIONS \
  ") "                                                                                       \
  "-> "

#define ML_PUBLIC_CHUNKS \
  "int? chunk_tokens=None, ScalarType? accumulation_dtype=None, bool pack=True, "
#define ML_CHUNKS ", int? chunk_tokens, ScalarType? accumulation_dtype, bool pack, "
#define ML_CHUNKING ML_CHUNKS "bool[3] needs, "
#define ML_HEAD "Tensor hidden, Tensor weight, Tensor? bias, "
#define ML_LINEAR_PUBLIC                             \
  "(Tensor hidden, Tensor weight, " ML_PUBLIC_INPUTS \
  ", Tensor? bias=None, " ML_PUBLIC_CHUNKS ML_HEAD_SHARDS ML_OPTIONS ") -> "
#define ML_HEAD_GRADIENTS "Tensor dhidden, Tensor dweight, Tensor dbias)"

#define ML_LOG_PROBS_INPUTS                                                        \
  "(Tensor logits, Tensor target, Tensor? mask=None, *, Tensor? cu_seqlens=None, " \
  "Tensor? temperatures=None, bool inplace_backward=False, "
#define ML_LOG_PROBS_PUBLIC ML_LOG_PROBS_INPUTS ML_SCORING ") -> "
#define ML_SHARDED_LOG_PROBS ML_LOG_PROBS_INPUTS ML_SHARDS ML_SCORING ") -> "
#define ML_LOG_PROBS_BACKWARD                                                          \
  "Tensor dlog_probs, Tensor? dentropy, Tensor logits, Tensor target, Tensor tokens, " \
  "Tensor? temperatures, "
#define ML_HEADS ML_HEAD "Tensor teacher_hidden, Tensor teacher_weight, Tensor? teacher_bias, "
#define ML_COMPARED                                                          \
  "Tensor? mask=None, *, Tensor? normalizer=None, Tensor? cu_seqlens=None, " \
  "Tensor? temperatures=None, Tensor? teacher_temperatures=None, "
#define ML_COMPARED_FORWARD                                                      \
  "Tensor? mask, Tensor? normalizer, Tensor? cu_seqlens, Tensor? temperatures, " \
  "Tensor? teacher_temperatures, str reduction, bool stats"

#define ML_LINEAR_SCORED                                                                    \
  "(Tensor hidden, Tensor weight, Tensor target, Tensor? mask=None, *, Tensor? bias=None, " \
  "Tensor? cu_seqlens=None, Tensor? temperatures=None, " ML_PUBLIC_CHUNKS                   \
      ML_HEAD_SHARDS ML_SCORING ") -> "
#define ML_DIVERGENCE_PUBLIC                            \
  "(Tensor logits, Tensor teacher_logits, " ML_COMPARED \
  "str reduction=\"mean\", bool inplace_backward=False, " ML_DIVERGENCE ") -> "
#define ML_LINEAR_COMPARED                                                                    \
  "(Tensor hidden, Tensor weight, Tensor teacher_hidden, Tensor teacher_weight, " ML_COMPARED \
  "Tensor? bias=None, Tensor? teacher_bias=None, str "                                        \
  "reduction=\"mean\", " ML_PUBLIC_CHUNKS ML_DIVERGENCE ") -> "

#define ML_OPERATORS(_)                                                                           \
  _(cross_entropy, ML_PUBLIC "Tensor")                                                            \
  _(cross_entropy_stats, ML_PUBLIC "(Tensor loss, Tensor stats)")                                 \
  _(cross_entropy_forward, "(" ML_FORWARD ")")                                                    \
  _(cross_entropy_fused, "(Tensor(a!) dlogits, " ML_FORWARD ")")                                  \
  _(cross_entropy_backward,                                                                       \
    "(Tensor dloss, Tensor logits, " ML_SAVED ", " ML_OPTIONS ") -> Tensor")                      \
  _(cross_entropy_backward_out, "(Tensor(a!) dlogits, Tensor dloss, Tensor logits, " ML_SAVED     \
                                ", bool recompute_unless_one, " ML_OPTIONS ") -> ()")             \
  _(mask_grad,                                                                                    \
    "(Tensor dloss, Tensor mask, Tensor tokens, Tensor groups, Tensor? target, "                  \
    "Tensor? class_weight, float z_loss, bool per_sequence) -> Tensor")                           \
  _(weigh,                                                                                        \
    "(Tensor target, Tensor? mask, Tensor? normalizer, Tensor? class_weight, "                    \
    "Tensor? cu_seqlens, int classes, bool wide, bool stats, " ML_OPTIONS                         \
    ") -> (Tensor tokens, Tensor groups)")                                                        \
  _(rows,                                                                                         \
    "(Tensor(a!) logits, Tensor target, Tensor(b!) tokens, Tensor groups, Tensor? class_weight, " \
    "Tensor? temperatures, Tensor? dloss, " ML_SHARD ", bool forward, bool gradient, " ML_OPTIONS \
    ") -> ()")                                                                                    \
  _(cross_entropy_partial,                                                                        \
    "(Tensor logits, " ML_SAVED ", " ML_SHARD ", " ML_OPTIONS ") -> Tensor")                      \
  _(cross_entropy_merge,                                                                          \
    "(Tensor parts, Tensor target, Tensor(a!) tokens, Tensor groups, Tensor? class_weight, "      \
    "Tensor? temperatures, Tensor bounds, " ML_OPTIONS ") -> ()")                                 \
  _(cross_entropy_shard_backward,                                                                 \
    "(Tensor dloss, Tensor logits, " ML_SAVED ", " ML_SHARD ", " ML_OPTIONS ") -> Tensor")        \
  _(cross_entropy_shard_backward_out,                                                             \
    "(Tensor(a!) dlogits, Tensor dloss, Tensor logits, " ML_SAVED ", " ML_SHARD ", " ML_OPTIONS   \
    ") -> ()")                                                                                    \
  _(scale, "(Tensor(a!) scaled, Tensor gradient, Tensor factor) -> ()")                           \
  _(reduce, "(Tensor tokens, Tensor(a!) groups, Tensor target, bool stats, " ML_OPTIONS           \
            ") -> (Tensor loss, Tensor stats)")                                                   \
  _(masked_reduce,                                                                                \
    "(Tensor values, Tensor? mask=None, *, Tensor? normalizer=None, "                             \
    "Tensor? cu_seqlens=None, bool per_sequence=False, "                                          \
    "str reduction=\"mean\") -> Tensor")                                                          \
  _(masked_reduce_forward,                                                                        \
    "(Tensor values, Tensor? mask, Tensor? normalizer, Tensor? cu_seqlens, bool per_sequence, "   \
    "str reduction) -> (Tensor loss, Tensor tokens, Tensor groups)")                              \
  _(masked_reduce_backward,                                                                       \
    "(Tensor dloss, Tensor values, Tensor tokens, Tensor groups, bool per_sequence) -> Tensor")   \
  _(divergence_weigh,                                                                             \
    "(Tensor logits, Tensor? mask, Tensor? normalizer, Tensor? cu_seqlens, str reduction, "       \
    "bool shift, bool stats) -> (Tensor tokens, Tensor groups)")                                  \
  _(divergence_rows,                                                                              \
    "(Tensor(a!) tokens, " ML_PAIR                                                                \
    ", Tensor groups, Tensor? dloss, "                                                            \
    "Tensor(b!)? dlogits, bool forward, bool unless_one, " ML_DIVERGENCE ") -> ()")               \
  _(token_log_probs, ML_LOG_PROBS_PUBLIC "Tensor")                                                \
  _(token_log_probs_entropy, ML_LOG_PROBS_PUBLIC "(Tensor log_probs, Tensor entropy)")            \
  _(log_probs_weigh,                                                                              \
    "(Tensor logits, Tensor target, Tensor? mask, Tensor? cu_seqlens, int classes, "              \
    "int ignore_index, bool shift, bool keep_ignored) -> Tensor")                                 \
  _(token_log_probs_forward,                                                                      \
    "(Tensor logits, Tensor target, Tensor? mask, Tensor? cu_seqlens, Tensor? temperatures, "     \
    "bool entropy, " ML_SCORING ") -> (Tensor log_probs, Tensor entropy, Tensor tokens)")         \
  _(token_log_probs_backward, "(" ML_LOG_PROBS_BACKWARD ML_SCORING ") -> Tensor")                 \
  _(token_log_probs_backward_out,                                                                 \
    "(Tensor(a!) dlogits, " ML_LOG_PROBS_BACKWARD ML_SCORING ") -> ()")                           \
  _(token_log_probs_partial,                                                                      \
    "(Tensor logits, Tensor target, Tensor tokens, Tensor? temperatures, "                        \
    "bool entropy, " ML_SHARD ", " ML_SCORING ") -> Tensor")                                      \
  _(token_log_probs_merge,                                                                        \
    "(Tensor parts, Tensor target, Tensor(a!) tokens, Tensor bounds, "                            \
    "bool entropy, " ML_SCORING ") -> (Tensor log_probs, Tensor entropy)")                        \
  _(token_log_probs_shard_backward,                                                               \
    "(" ML_LOG_PROBS_BACKWARD ML_SHARD ", " ML_SCORING ") -> Tensor")                             \
  _(token_log_probs_shard_backward_out,                                                           \
    "(Tensor(a!) dlogits, " ML_LOG_PROBS_BACKWARD ML_SHARD ", " ML_SCORING ") -> ()")

// Operators whose kernels are in masked_loss/_op/.
#define ML_PYTHON_OPERATORS(_)                                                                   \
  _(sharded_cross_entropy, ML_SHARDED_PUBLIC "Tensor")                                           \
  _(sharded_cross_entropy_stats, ML_SHARDED_PUBLIC "(Tensor loss, Tensor stats)")                \
  _(sharded_cross_entropy_forward,                                                               \
    "(Tensor logits, " ML_INPUTS ", bool stats, " ML_SHARDS ML_OPTIONS ") -> " ML_TABLES ")")    \
  _(sharded_token_log_probs, ML_SHARDED_LOG_PROBS "Tensor")                                      \
  _(sharded_token_log_probs_entropy, ML_SHARDED_LOG_PROBS "(Tensor log_probs, Tensor entropy)")  \
  _(sharded_token_log_probs_forward,                                                             \
    "(Tensor logits, Tensor target, Tensor? mask, Tensor? cu_seqlens, Tensor? temperatures, "    \
    "bool entropy, " ML_SHARDS ML_SCORING                                                        \
    ") -> (Tensor log_probs, Tensor entropy, Tensor tokens)")                                    \
  _(linear_cross_entropy, ML_LINEAR_PUBLIC "Tensor")                                             \
  _(linear_cross_entropy_stats, ML_LINEAR_PUBLIC "(Tensor loss, Tensor stats)")                  \
  _(linear_cross_entropy_forward,                                                                \
    "(" ML_HEAD ML_INPUTS ", bool stats" ML_CHUNKING ML_HEAD_SHARDS ML_OPTIONS ") -> " ML_TABLES \
    ", Tensor unit, " ML_HEAD_GRADIENTS)                                                         \
  _(linear_cross_entropy_backward,                                                               \
    "(Tensor dloss, " ML_HEAD ML_SAVED ML_CHUNKING ML_HEAD_SHARDS ML_OPTIONS                     \
    ") -> (" ML_HEAD_GRADIENTS)                                                                  \
  _(linear_token_log_probs, ML_LINEAR_SCORED "Tensor")                                           \
  _(linear_token_log_probs_entropy, ML_LINEAR_SCORED "(Tensor log_probs, Tensor entropy)")       \
  _(linear_token_log_probs_forward,                                                              \
    "(" ML_HEAD                                                                                  \
    "Tensor target, Tensor? mask, Tensor? cu_seqlens, "                                          \
    "Tensor? temperatures, bool entropy" ML_CHUNKS ML_HEAD_SHARDS ML_SCORING                     \
    ") -> (Tensor log_probs, Tensor entropy, Tensor tokens, Tensor weights)")                    \
  _(linear_token_log_probs_backward,                                                             \
    "(Tensor dlog_probs, Tensor? dentropy, " ML_HEAD                                             \
    "Tensor target, Tensor? temperatures, Tensor tokens, Tensor weights" ML_CHUNKING             \
        ML_HEAD_SHARDS ML_SCORING ") -> (" ML_HEAD_GRADIENTS)                                    \
  _(masked_divergence, ML_DIVERGENCE_PUBLIC "Tensor")                                            \
  _(masked_divergence_stats, ML_DIVERGENCE_PUBLIC "(Tensor loss, Tensor stats)")                 \
  _(masked_divergence_forward, "(Tensor logits, Tensor teacher_logits, " ML_COMPARED_FORWARD     \
                               ", " ML_DIVERGENCE ") -> " ML_TABLES ")")                         \
  _(masked_divergence_backward,                                                                  \
    "(Tensor dloss, " ML_PAIR ", Tensor tokens, Tensor groups, " ML_DIVERGENCE ") -> Tensor")    \
  _(linear_divergence, ML_LINEAR_COMPARED "Tensor")                                              \
  _(linear_divergence_stats, ML_LINEAR_COMPARED "(Tensor loss, Tensor stats)")                   \
  _(linear_divergence_forward, "(" ML_HEADS ML_COMPARED_FORWARD ML_CHUNKING ML_DIVERGENCE        \
                               ") -> " ML_TABLES ", Tensor unit, " ML_HEAD_GRADIENTS)            \
  _(linear_divergence_backward,                                                                  \
    "(Tensor dloss, " ML_HEADS                                                                   \
    "Tensor? temperatures, "                                                                     \
    "Tensor? teacher_temperatures, Tensor tokens, Tensor groups" ML_CHUNKING ML_DIVERGENCE       \
    ") -> (" ML_HEAD_GRADIENTS)

namespace masked_loss {
namespace {

const Tensor* tensor_of(const Tensor& t) { return &t; }
const Tensor* tensor_of(const std::optional<Tensor>& t) { return t ? &*t : nullptr; }
template <class Number>
const Tensor* tensor_of(const Number&) {
  return nullptr;
}

// The error that is being handled, in PyTorch's words if it is one of PyTorch's: its C functions
// tell only that a call has failed. Where memory runs out, batch-size finders look for the words.
[[noreturn]] void throw_in_words_of_torch([[maybe_unused]] const std::exception& error) {
#if !defined(_WIN32)
  const bool of_torch = std::strstr(error.what(), "API call failed") != nullptr;
  if (of_torch && torch_exception_get_what_without_backtrace != nullptr) {
    throw std::runtime_error(torch_exception_get_what_without_backtrace());
  }
#endif
  throw;
}

// An operator as the dispatcher calls it, after the check that every operator has.
template <auto function, class Schema>
struct Checked;
template <class Result, class... Args, Result (*function)(Args...), class Schema>
struct Checked<function, Schema> {
  static Result call(Args... args) {
    try {
      check::devices(Schema::text, {tensor_of(args)...});
      return function(std::move(args)...);
    } catch (const std::exception& error) {
      throw_in_words_of_torch(error);
    }
  }
};
template <auto function, class Schema>
constexpr auto checked = &Checked<flat<function>, Schema>::call;

#define ML_SCHEMA(name, signature)                       \
  struct name##_schema {                                 \
    static constexpr const char* text = #name signature; \
  };
ML_OPERATORS(ML_SCHEMA)

void implement(torch::stable::detail::StableLibrary& m) {
#define ML_IMPLEMENT(name, signature) \
  m.impl(#name, TORCH_BOX((checked<&masked_loss::name, name##_schema>)));
  ML_OPERATORS(ML_IMPLEMENT)
}

}  // namespace
}  // namespace masked_loss

STABLE_TORCH_LIBRARY(masked_loss, m) {
#define ML_DEFINE(name, signature) m.def(#name signature);
  ML_OPERATORS(ML_DEFINE)
  ML_PYTHON_OPERATORS(ML_DEFINE)
  m.def("check_formula(str who, " ML_OPTIONS ") -> ()");
  m.def("cpu_capability() -> str");
  m.def("cuda_architectures() -> str");
  m.def("table_sizes() -> (int saved, int token, int group, int stats)");
}
STABLE_TORCH_LIBRARY_IMPL(masked_loss, CPU, m) { masked_loss::implement(m); }
STABLE_TORCH_LIBRARY_IMPL(masked_loss, CUDA, m) { masked_loss::implement(m); }
STABLE_TORCH_LIBRARY_IMPL(masked_loss, CompositeExplicitAutograd, m) {
  m.impl("check_formula", TORCH_BOX(masked_loss::flat<&masked_loss::check_formula>));
  m.impl("cpu_capability", TORCH_BOX(&masked_loss::cpu_capability));
  m.impl("cuda_architectures", TORCH_BOX(&masked_loss::cuda_architectures));
  m.impl("table_sizes", TORCH_BOX(&masked_loss::table_sizes));
}
