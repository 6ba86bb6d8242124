// SPDX-License-Identifier: BSD-3-Clause
// The operators. The same functions serve the CPU and CUDA; see register.cpp for the schemas.
#pragma once

#include <string>
#include <tuple>

#include "ops/options.h"
#include "ops/tensors.h"

namespace masked_loss {

Tensor cross_entropy(Tensor logits, const Inputs& inputs, bool inplace_backward,
                     const Options& options);

std::tuple<Tensor, Tensor> cross_entropy_stats(Tensor logits, const Inputs& inputs,
                                               bool inplace_backward, const Options& options);

// -> loss, stats, tokens, groups
std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy_forward(Tensor logits,
                                                                 const Inputs& inputs, bool stats,
                                                                 const Options& options);

// The same, and the gradient for dloss = 1 into dlogits.
std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy_fused(Tensor dlogits, Tensor logits,
                                                               const Inputs& inputs, bool stats,
                                                               const Options& options);

Tensor cross_entropy_backward(Tensor dloss, Tensor logits, const Saved& saved,
                              const Options& options);

// The gradient into dlogits, which may be the logits themselves. With recompute_unless_one, dlogits
// holds the gradient for dloss = 1, and for another dloss it is computed anew: scaled, it would be
// rounded twice.
void cross_entropy_backward_out(Tensor dlogits, Tensor dloss, Tensor logits, const Saved& saved,
                                bool recompute_unless_one, const Options& options);

Tensor mask_grad(Tensor dloss, Tensor mask, Tensor tokens, Tensor groups, OptionalTensor target,
                 OptionalTensor class_weight, double z_loss, bool per_sequence);

// The three stages of a loss; linear_cross_entropy runs the second chunk by chunk.
// Weights of all tokens and scales of all groups -> tokens, groups
std::tuple<Tensor, Tensor> weigh(Tensor target, OptionalTensor mask, OptionalTensor normalizer,
                                 OptionalTensor class_weight, OptionalTensor cu_seqlens,
                                 int64_t classes, bool wide, bool stats, const Options& options);

// Some tokens' logits become their gradient. forward: the table of these tokens, of which only the
// weights were there, is filled; without it, it is there already. The rows are the tokens' own:
// options.shift is not heeded.
void rows(Tensor logits, const Saved& saved, OptionalTensor dloss, const Shard& shard, bool forward,
          bool gradient, const Options& options);

// Of logits that are a shard of the classes: what they tell of each token with a weight
// -> [part_numbers, tokens].
Tensor cross_entropy_partial(Tensor logits, const Saved& saved, const Shard& shard,
                             const Options& options);
// What all shards told, [shards, part_numbers, tokens], into the table of tokens. bounds: int64,
// where the classes of each begin, and where the last ones end.
void cross_entropy_merge(Tensor parts, const Saved& saved, Tensor bounds, const Options& options);
Tensor cross_entropy_shard_backward(Tensor dloss, Tensor logits, const Saved& saved,
                                    const Shard& shard, const Options& options);
void cross_entropy_shard_backward_out(Tensor dlogits, Tensor dloss, Tensor logits,
                                      const Saved& saved, const Shard& shard,
                                      const Options& options);

// A gradient for dloss = 1 times the real one, rounded once: into its own memory, or into that of a
// half type. factor: of the accumulation type, not looked at.
void scale(Tensor scaled, Tensor gradient, Tensor factor);

// -> loss, stats; groups gets its means
std::tuple<Tensor, Tensor> reduce(Tensor tokens, Tensor groups, Tensor target, bool stats,
                                  const Options& options);

Tensor masked_reduce(Tensor values, OptionalTensor mask, OptionalTensor normalizer,
                     OptionalTensor cu_seqlens, bool per_sequence, std::string reduction);

// -> loss, tokens, groups
std::tuple<Tensor, Tensor, Tensor> masked_reduce_forward(Tensor values, OptionalTensor mask,
                                                         OptionalTensor normalizer,
                                                         OptionalTensor cu_seqlens,
                                                         bool per_sequence, std::string reduction);

Tensor masked_reduce_backward(Tensor dloss, Tensor values, Tensor tokens, Tensor groups,
                              bool per_sequence);

// What divergences (masked_loss/_op/divergence.py) are made of, before reduce.
// Weights of all tokens and scales of all groups, where there is no target -> tokens, groups
std::tuple<Tensor, Tensor> divergence_weigh(Tensor logits, OptionalTensor mask,
                                            OptionalTensor normalizer, OptionalTensor cu_seqlens,
                                            std::string reduction, bool shift, bool stats);

// Of every pair of rows its value into the table of tokens (forward), and the gradient of the
// student's logits into dlogits, which may be these logits. With unless_one, dlogits holds the
// gradient for dloss = 1, and for another dloss it is computed anew.
void divergence_rows(Tensor tokens, const Pair& pair, Tensor groups, OptionalTensor dloss,
                     OptionalTensor dlogits, bool forward, bool unless_one,
                     const DivergenceOptions& options);

Tensor token_log_probs(Tensor logits, Tensor target, OptionalTensor mask, OptionalTensor cu_seqlens,
                       OptionalTensor temperatures, bool inplace_backward, const Scoring& scoring);

std::tuple<Tensor, Tensor> token_log_probs_entropy(Tensor logits, Tensor target,
                                                   OptionalTensor mask, OptionalTensor cu_seqlens,
                                                   OptionalTensor temperatures,
                                                   bool inplace_backward, const Scoring& scoring);

// [tokens]: 0 of those that are masked. logits: for shape and type, all but their classes.
Tensor log_probs_weigh(Tensor logits, Tensor target, OptionalTensor mask, OptionalTensor cu_seqlens,
                       int64_t classes, int64_t ignore_index, bool shift, bool keep_ignored);

// -> log_probs, entropy (of no token if it is not asked for), tokens: LogProbField
std::tuple<Tensor, Tensor, Tensor> token_log_probs_forward(Tensor logits, Tensor target,
                                                           OptionalTensor mask,
                                                           OptionalTensor cu_seqlens,
                                                           OptionalTensor temperatures,
                                                           bool entropy, const Scoring& scoring);

Tensor token_log_probs_backward(Tensor dlog_probs, OptionalTensor dentropy, Tensor logits,
                                Tensor target, Tensor tokens, OptionalTensor temperatures,
                                const Scoring& scoring);

void token_log_probs_backward_out(Tensor dlogits, Tensor dlog_probs, OptionalTensor dentropy,
                                  Tensor logits, Tensor target, Tensor tokens,
                                  OptionalTensor temperatures, const Scoring& scoring);

// The same of log-probabilities; the weights of the tokens in the table's row of sums.
Tensor token_log_probs_partial(Tensor logits, Tensor target, Tensor tokens,
                               OptionalTensor temperatures, bool entropy, const Shard& shard,
                               const Scoring& scoring);
// -> log_probs, entropy
std::tuple<Tensor, Tensor> token_log_probs_merge(Tensor parts, Tensor target, Tensor tokens,
                                                 Tensor bounds, bool entropy,
                                                 const Scoring& scoring);
Tensor token_log_probs_shard_backward(Tensor dlog_probs, OptionalTensor dentropy, Tensor logits,
                                      Tensor target, Tensor tokens, OptionalTensor temperatures,
                                      const Shard& shard, const Scoring& scoring);
void token_log_probs_shard_backward_out(Tensor dlogits, Tensor dlog_probs, OptionalTensor dentropy,
                                        Tensor logits, Tensor target, Tensor tokens,
                                        OptionalTensor temperatures, const Shard& shard,
                                        const Scoring& scoring);

// The ranges of the options, for operators whose tensors hold nothing: fakes.
void check_formula(std::string who, const Options& options);

std::string cpu_capability();
std::string cuda_architectures();  // as cuda::architectures(); empty without CUDA kernels

// Fields of the token table that are saved for backward, all of its fields, those of the group
// table, and statistics: for the fakes.
std::tuple<int64_t, int64_t, int64_t, int64_t> table_sizes();

}  // namespace masked_loss
