// SPDX-License-Identifier: BSD-3-Clause
// The operators. The same functions serve the CPU and CUDA; see register.cpp for the schemas.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

namespace masked_loss {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

Tensor cross_entropy(Tensor logits, Tensor target, OptionalTensor mask, std::string reduction,
                     OptionalTensor normalizer, int64_t ignore_index, OptionalTensor class_weight,
                     double label_smoothing, double z_loss, std::optional<double> softcap,
                     bool shift, bool inplace_backward);

std::tuple<Tensor, Tensor> cross_entropy_stats(Tensor logits, Tensor target, OptionalTensor mask,
                                               std::string reduction, OptionalTensor normalizer,
                                               int64_t ignore_index, OptionalTensor class_weight,
                                               double label_smoothing, double z_loss,
                                               std::optional<double> softcap, bool shift,
                                               bool inplace_backward);

// -> loss, stats, tokens, groups
std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy_forward(
    Tensor logits, Tensor target, OptionalTensor mask, OptionalTensor normalizer,
    OptionalTensor class_weight, std::string reduction, int64_t ignore_index,
    double label_smoothing, double z_loss, std::optional<double> softcap, bool shift, bool stats);

// The same, and the gradient for dloss = 1 into dlogits.
std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy_fused(
    Tensor dlogits, Tensor logits, Tensor target, OptionalTensor mask, OptionalTensor normalizer,
    OptionalTensor class_weight, std::string reduction, int64_t ignore_index,
    double label_smoothing, double z_loss, std::optional<double> softcap, bool shift, bool stats);

Tensor cross_entropy_backward(Tensor dloss, Tensor logits, Tensor target, Tensor tokens,
                              Tensor groups, OptionalTensor class_weight, double label_smoothing,
                              double z_loss, std::optional<double> softcap, bool shift);

// The gradient into dlogits, which may be the logits themselves. With unless_one, dlogits holds the
// gradient for dloss = 1, and for another dloss it is computed anew: scaled, it would be rounded
// twice.
void cross_entropy_backward_out(Tensor dlogits, Tensor dloss, Tensor logits, Tensor target,
                                Tensor tokens, Tensor groups, OptionalTensor class_weight,
                                double label_smoothing, double z_loss,
                                std::optional<double> softcap, bool shift, bool unless_one);

Tensor mask_grad(Tensor dloss, Tensor mask, Tensor tokens, Tensor groups, OptionalTensor target,
                 OptionalTensor class_weight, double z_loss);

// What linear_cross_entropy (masked_loss/_op/linear.py) is made of, between its matrix products.
// Weights of all tokens and scales of all groups -> tokens, groups
std::tuple<Tensor, Tensor> linear_weigh(Tensor target, OptionalTensor mask,
                                        OptionalTensor normalizer, OptionalTensor class_weight,
                                        std::string reduction, int64_t ignore_index,
                                        int64_t classes, double label_smoothing, double z_loss,
                                        std::optional<double> softcap, bool wide, bool shift,
                                        bool stats);

// Some tokens' logits become their gradient. forward: the table of these tokens, of which only the
// weights were there, is filled; without it, it is there already.
void linear_chunk(Tensor logits, Tensor target, Tensor tokens, Tensor groups,
                  OptionalTensor class_weight, OptionalTensor dloss, double label_smoothing,
                  double z_loss, std::optional<double> softcap, bool forward, bool gradient);

// -> loss, stats; groups gets its means
std::tuple<Tensor, Tensor> linear_reduce(Tensor tokens, Tensor groups, Tensor target,
                                         std::string reduction, double z_loss, bool stats);

Tensor masked_reduce(Tensor values, OptionalTensor mask, std::string reduction,
                     OptionalTensor normalizer);

// -> loss, tokens, groups
std::tuple<Tensor, Tensor, Tensor> masked_reduce_forward(Tensor values, OptionalTensor mask,
                                                         OptionalTensor normalizer,
                                                         std::string reduction);

Tensor masked_reduce_backward(Tensor dloss, Tensor values, Tensor tokens, Tensor groups);

// What divergences (masked_loss/_op/divergence.py) are made of, before reduce.
// Weights of all tokens and scales of all groups, where there is no target -> tokens, groups
std::tuple<Tensor, Tensor> divergence_weigh(Tensor logits, OptionalTensor mask,
                                            OptionalTensor normalizer, std::string reduction,
                                            bool shift, bool stats);

// Of every pair of rows its value into the table of tokens (forward), and the gradient of the
// student's logits into dlogits, which may be these logits. With unless_one, dlogits holds the
// gradient for dloss = 1, and for another dloss it is computed anew.
void divergence_rows(Tensor tokens, Tensor logits, Tensor teacher_logits, Tensor groups,
                     OptionalTensor dloss, OptionalTensor dlogits, OptionalTensor temperatures,
                     OptionalTensor teacher_temperatures, double temperature,
                     double teacher_temperature, std::string kind, double beta,
                     std::optional<double> softcap, std::optional<double> teacher_softcap,
                     bool shift, bool forward, bool unless_one);

std::string cpu_capability();
std::string cuda_architectures();  // as cuda::architectures(); empty without CUDA kernels

// Fields of the token table that are saved for backward, all of its fields, those of the group
// table, and statistics: for the fakes.
std::tuple<int64_t, int64_t, int64_t, int64_t> table_sizes();

}  // namespace masked_loss
