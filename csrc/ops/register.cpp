// SPDX-License-Identifier: BSD-3-Clause
// The operators of masked_loss: their schemas, nothing else.
//
// cross_entropy, cross_entropy_stats and masked_reduce are public and differentiable; the others
// are the halves that their autograd formulas (masked_loss/_ops.py) are made of.
#include <torch/csrc/stable/library.h>

#include "ops/ops.h"

#define ML_PUBLIC                                                                        \
  "(Tensor logits, Tensor target, Tensor? mask=None, *, str reduction=\"mean\", "        \
  "Tensor? normalizer=None, int ignore_index=-100, Tensor? class_weight=None, "          \
  "float label_smoothing=0.0, float z_loss=0.0, float? softcap=None, bool shift=False, " \
  "bool inplace_backward=False) -> "
#define ML_FORWARD                                                                         \
  "Tensor logits, Tensor target, Tensor? mask, Tensor? normalizer, Tensor? class_weight, " \
  "str reduction, int ignore_index, float label_smoothing, float z_loss, float? softcap, " \
  "bool shift, bool stats) -> (Tensor loss, Tensor stats, Tensor tokens, Tensor groups"
#define ML_BACKWARD                                                                            \
  "Tensor target, Tensor tokens, Tensor groups, Tensor? class_weight, float label_smoothing, " \
  "float z_loss, float? softcap, bool shift"

STABLE_TORCH_LIBRARY(masked_loss, m) {
  m.def("cross_entropy" ML_PUBLIC "Tensor");
  m.def("cross_entropy_stats" ML_PUBLIC "(Tensor loss, Tensor stats)");
  m.def("cross_entropy_forward(" ML_FORWARD ")");
  m.def("cross_entropy_fused(Tensor(a!) dlogits, " ML_FORWARD ")");
  m.def("cross_entropy_backward(Tensor dloss, Tensor logits, " ML_BACKWARD ") -> Tensor");
  m.def("cross_entropy_backward_out(Tensor(a!) dlogits, Tensor dloss, Tensor logits, " ML_BACKWARD
        ", bool unless_one) -> ()");
  m.def(
      "mask_grad(Tensor dloss, Tensor mask, Tensor tokens, Tensor groups, Tensor? target, "
      "Tensor? class_weight, float z_loss) -> Tensor");
  m.def(
      "linear_weigh(Tensor target, Tensor? mask, Tensor? normalizer, Tensor? class_weight, "
      "str reduction, int ignore_index, int classes, float label_smoothing, float z_loss, "
      "float? softcap, bool wide, bool shift, bool stats) -> (Tensor tokens, Tensor groups)");
  m.def(
      "linear_chunk(Tensor(a!) logits, Tensor target, Tensor(b!) tokens, Tensor groups, "
      "Tensor? class_weight, Tensor? dloss, float label_smoothing, float z_loss, "
      "float? softcap, bool forward, bool gradient) -> ()");
  m.def(
      "linear_reduce(Tensor tokens, Tensor(a!) groups, Tensor target, str reduction, "
      "float z_loss, bool stats) -> (Tensor loss, Tensor stats)");
  m.def(
      "masked_reduce(Tensor values, Tensor? mask=None, *, str reduction=\"mean\", "
      "Tensor? normalizer=None) -> Tensor");
  m.def(
      "masked_reduce_forward(Tensor values, Tensor? mask, Tensor? normalizer, str reduction) "
      "-> (Tensor loss, Tensor tokens, Tensor groups)");
  m.def(
      "masked_reduce_backward(Tensor dloss, Tensor values, Tensor tokens, Tensor groups) "
      "-> Tensor");
  m.def("cpu_capability() -> str");
}

namespace {

void implement(torch::stable::detail::StableLibrary& m) {
  using namespace masked_loss;
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
  m.impl("cross_entropy_stats", TORCH_BOX(&cross_entropy_stats));
  m.impl("cross_entropy_forward", TORCH_BOX(&cross_entropy_forward));
  m.impl("cross_entropy_fused", TORCH_BOX(&cross_entropy_fused));
  m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward));
  m.impl("cross_entropy_backward_out", TORCH_BOX(&cross_entropy_backward_out));
  m.impl("mask_grad", TORCH_BOX(&mask_grad));
  m.impl("linear_weigh", TORCH_BOX(&linear_weigh));
  m.impl("linear_chunk", TORCH_BOX(&linear_chunk));
  m.impl("linear_reduce", TORCH_BOX(&linear_reduce));
  m.impl("masked_reduce", TORCH_BOX(&masked_reduce));
  m.impl("masked_reduce_forward", TORCH_BOX(&masked_reduce_forward));
  m.impl("masked_reduce_backward", TORCH_BOX(&masked_reduce_backward));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(masked_loss, CPU, m) { implement(m); }
STABLE_TORCH_LIBRARY_IMPL(masked_loss, CUDA, m) { implement(m); }
STABLE_TORCH_LIBRARY_IMPL(masked_loss, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&masked_loss::cpu_capability));
}
