# SPDX-License-Identifier: BSD-3-Clause
"""What the linter knows about PyTorch's losses and ours: their arguments and reductions."""

from __future__ import annotations

from typing import NamedTuple

# One line for each function, the module that calls it, and the positional parameters of both:
# tensors of a call | settings, which the module's constructor has too. A trailing | brings more of
# a call. A test compares them with the installed torch.
_TORCH = """
cross_entropy CrossEntropyLoss input target | CLASS label_smoothing
nll_loss NLLLoss input target | CLASS
binary_cross_entropy BCELoss input target | weight OLD
binary_cross_entropy_with_logits BCEWithLogitsLoss input target | weight OLD pos_weight
mse_loss MSELoss input target | OLD | weight
l1_loss L1Loss input target | OLD | weight
smooth_l1_loss SmoothL1Loss input target | OLD beta
huber_loss HuberLoss input target | reduction delta | weight
kl_div KLDivLoss input target | OLD log_target
poisson_nll_loss PoissonNLLLoss input target | log_input full size_average eps reduce reduction
soft_margin_loss SoftMarginLoss input target | OLD
multilabel_margin_loss MultiLabelMarginLoss input target | OLD
multilabel_soft_margin_loss MultiLabelSoftMarginLoss input target | weight OLD
multi_margin_loss MultiMarginLoss input target | p margin weight OLD
hinge_embedding_loss HingeEmbeddingLoss input target | margin OLD
cosine_embedding_loss CosineEmbeddingLoss input1 input2 target | margin OLD
margin_ranking_loss MarginRankingLoss input1 input2 target | margin OLD
triplet_margin_loss TripletMarginLoss anchor positive negative | margin p eps swap OLD
triplet_margin_with_distance_loss TripletMarginWithDistanceLoss anchor positive negative | DISTANCE
gaussian_nll_loss GaussianNLLLoss input target var | full eps reduction
ctc_loss CTCLoss log_probs targets input_lengths target_lengths | blank reduction zero_infinity
"""
_OURS = """
cross_entropy CrossEntropyLoss input target | CLASS label_smoothing
masked_cross_entropy MaskedCrossEntropyLoss logits target mask | reduction NORMALIZER MASKED
linear_cross_entropy LinearCrossEntropyLoss hidden weight target mask bias | reduction NORMALIZER MASKED
masked_divergence MaskedDivergenceLoss logits teacher_logits mask | KIND NORMALIZER shift
linear_divergence LinearDivergenceLoss hidden weight TEACHER mask bias teacher_bias | KIND NORMALIZER shift
topk_divergence - log_probs teacher_log_probs mask | kind beta tail reduction NORMALIZER
masked_reduce - values mask | reduction NORMALIZER dim
masked_mean - values mask |
"""  # noqa: E501
_SHORT = {
    "CLASS": "weight size_average ignore_index reduce reduction",
    "OLD": "size_average reduce reduction",
    "DISTANCE": "distance_function margin swap reduction",
    "MASKED": "ignore_index class_weight label_smoothing z_loss softcap shift",
    "KIND": "kind beta temperature teacher_temperature softcap teacher_softcap reduction",
    "TEACHER": "teacher_hidden teacher_weight",
    "NORMALIZER": "normalizer",  # which our modules are given with each call
}
REDUCTIONS = {"none", "mean", "sum", "elementwise_mean", "batchmean", "sequence_mean"}


class LossSpec(NamedTuple):
    """One loss function, or the constructor of a loss module."""

    path: str  # torch.nn.functional.cross_entropy, torch.nn.CrossEntropyLoss
    forward: str  # the path of the function behind it
    parameters: tuple[str, ...]  # in positional order
    name: str
    function: str
    is_ours: bool = False

    @property
    def is_module(self) -> bool:
        return self.path != self.forward


def _specs(table: str, functions: str, *modules: str) -> dict[str, LossSpec]:
    specs = {}
    for line in table.strip().splitlines():
        names, settings, *more = line.split("|")
        function, module, *tensors = names.split()
        groups = [settings.replace("NORMALIZER", ""), " ".join([*tensors, settings, *more])]
        for short, text in _SHORT.items():
            groups = [group.replace(short, text) for group in groups]
        of_module, of_function = (tuple(group.split()) for group in groups)
        forward, ours = f"{functions}.{function}", table is _OURS
        specs[forward] = LossSpec(forward, forward, of_function, function, function, ours)
        for path in (f"{owner}.{module}" for owner in modules if module != "-"):
            specs[path] = LossSpec(path, forward, of_module, module, function, ours)
    return specs


SPECS = _specs(_TORCH, "torch.nn.functional", "torch.nn", "torch.nn.modules.loss")
SPECS |= _specs(_OURS, "masked_loss", "masked_loss")
for _name in (
    "cross_entropy", "masked_reduce", "masked_divergence", "linear_cross_entropy",
    "linear_divergence",
):  # fmt: skip
    _function = "masked_cross_entropy" if _name == "cross_entropy" else _name
    _path = f"torch.ops.masked_loss.{_name}"
    _spec = SPECS[f"masked_loss.{_function}"]
    SPECS[_path] = _spec._replace(path=_path, forward=_path, name=_name, function=_name)


def legacy_reduction(size_average: bool | None, reduce: bool | None) -> str:
    """The ``reduction`` that the deprecated pair stands for; None is the old default, True.

    >>> legacy_reduction(False, None), legacy_reduction(True, False)
    ('sum', 'none')
    """
    if reduce is not None and not reduce:
        return "none"
    return "mean" if size_average is None or size_average else "sum"
