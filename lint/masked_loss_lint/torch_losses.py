# SPDX-License-Identifier: BSD-3-Clause
"""What the linter knows about PyTorch's losses: their arguments and their reductions."""

from __future__ import annotations

import ast
from dataclasses import dataclass

_CLASS = "weight size_average ignore_index reduce reduction"
_LEGACY = "size_average reduce reduction"

# Positional parameters, as in torch.nn.functional. A test compares them with the installed torch.
_FUNCTIONS = {
    "cross_entropy": f"input target {_CLASS} label_smoothing",
    "nll_loss": f"input target {_CLASS}",
    "binary_cross_entropy": f"input target weight {_LEGACY}",
    "binary_cross_entropy_with_logits": f"input target weight {_LEGACY} pos_weight",
    "mse_loss": f"input target {_LEGACY} weight",
    "l1_loss": f"input target {_LEGACY} weight",
    "smooth_l1_loss": f"input target {_LEGACY} beta",
    "huber_loss": "input target reduction delta weight",
    "kl_div": f"input target {_LEGACY} log_target",
    "poisson_nll_loss": "input target log_input full size_average eps reduce reduction",
    "soft_margin_loss": f"input target {_LEGACY}",
    "multilabel_margin_loss": f"input target {_LEGACY}",
    "multilabel_soft_margin_loss": f"input target weight {_LEGACY}",
    "multi_margin_loss": f"input target p margin weight {_LEGACY}",
    "hinge_embedding_loss": f"input target margin {_LEGACY}",
    "cosine_embedding_loss": f"input1 input2 target margin {_LEGACY}",
    "margin_ranking_loss": f"input1 input2 target margin {_LEGACY}",
    "triplet_margin_loss": f"anchor positive negative margin p eps swap {_LEGACY}",
    "triplet_margin_with_distance_loss": (
        "anchor positive negative distance_function margin swap reduction"
    ),
    "gaussian_nll_loss": "input target var full eps reduction",
    "ctc_loss": "log_probs targets input_lengths target_lengths blank reduction zero_infinity",
}

# The modules of torch.nn, and the function each one calls. Its constructor has the parameters of
# that function that are no tensors of a call.
_MODULES = {
    "CrossEntropyLoss": "cross_entropy",
    "NLLLoss": "nll_loss",
    "BCELoss": "binary_cross_entropy",
    "BCEWithLogitsLoss": "binary_cross_entropy_with_logits",
    "MSELoss": "mse_loss",
    "L1Loss": "l1_loss",
    "SmoothL1Loss": "smooth_l1_loss",
    "HuberLoss": "huber_loss",
    "KLDivLoss": "kl_div",
    "PoissonNLLLoss": "poisson_nll_loss",
    "SoftMarginLoss": "soft_margin_loss",
    "MultiLabelMarginLoss": "multilabel_margin_loss",
    "MultiLabelSoftMarginLoss": "multilabel_soft_margin_loss",
    "MultiMarginLoss": "multi_margin_loss",
    "HingeEmbeddingLoss": "hinge_embedding_loss",
    "CosineEmbeddingLoss": "cosine_embedding_loss",
    "MarginRankingLoss": "margin_ranking_loss",
    "TripletMarginLoss": "triplet_margin_loss",
    "TripletMarginWithDistanceLoss": "triplet_margin_with_distance_loss",
    "GaussianNLLLoss": "gaussian_nll_loss",
    "CTCLoss": "ctc_loss",
}
_INPUTS = "input target input1 input2 anchor positive negative var log_probs targets input_lengths"
_TENSORS = {*_INPUTS.split(), "target_lengths"}
_WEIGHT_IN_CALL = {"mse_loss", "l1_loss", "huber_loss"}

REDUCTIONS = {"none", "mean", "sum", "elementwise_mean", "batchmean", "sequence_mean"}
_MASKED = "reduction normalizer ignore_index class_weight label_smoothing z_loss softcap shift"
_DIVERGENCE = "kind beta temperature teacher_temperature softcap teacher_softcap reduction"
_TEACHER = "teacher_hidden teacher_weight mask bias teacher_bias"
_OURS = {
    "cross_entropy": f"input target {_CLASS} label_smoothing",
    "masked_cross_entropy": f"logits target mask {_MASKED}",
    "linear_cross_entropy": f"hidden weight target mask bias {_MASKED}",
    "masked_divergence": f"logits teacher_logits mask {_DIVERGENCE} normalizer shift",
    "linear_divergence": f"hidden weight {_TEACHER} {_DIVERGENCE} normalizer shift",
    "topk_divergence": "log_probs teacher_log_probs mask kind beta tail reduction normalizer",
    "masked_reduce": "values mask reduction normalizer dim",
    "masked_mean": "values mask",
}
_OUR_OPERATORS = {
    "cross_entropy": _OURS["masked_cross_entropy"],
    "masked_reduce": _OURS["masked_reduce"],
}
_AS_MODULE = _MASKED.replace("normalizer ", "")  # which a module is given with each call
_OUR_MODULES = {
    "CrossEntropyLoss": ("cross_entropy", f"{_CLASS} label_smoothing"),
    "MaskedCrossEntropyLoss": ("masked_cross_entropy", _AS_MODULE),
    "LinearCrossEntropyLoss": ("linear_cross_entropy", _AS_MODULE),
    "MaskedDivergenceLoss": ("masked_divergence", f"{_DIVERGENCE} shift"),
}


@dataclass(frozen=True)
class LossSpec:
    """One loss function, or the constructor of a loss module."""

    path: str  # torch.nn.functional.cross_entropy, torch.nn.CrossEntropyLoss
    function: str  # the function behind it: cross_entropy
    parameters: tuple[str, ...]  # in positional order
    is_module: bool

    @property
    def is_ours(self) -> bool:
        return "masked_loss." in self.path

    @property
    def name(self) -> str:
        return self.path.rsplit(".", 1)[1]


def _specs() -> dict[str, LossSpec]:
    specs: dict[str, LossSpec] = {}

    def add(path: str, function: str, parameters: str, is_module: bool) -> None:
        specs[path] = LossSpec(path, function, tuple(parameters.split()), is_module)

    for name, parameters in _FUNCTIONS.items():
        add(f"torch.nn.functional.{name}", name, parameters, False)
    for name, function in _MODULES.items():
        tensors = _TENSORS | ({"weight"} if function in _WEIGHT_IN_CALL else set())
        parameters = " ".join(p for p in _FUNCTIONS[function].split() if p not in tensors)
        add(f"torch.nn.{name}", function, parameters, True)
        add(f"torch.nn.modules.loss.{name}", function, parameters, True)
    for name, parameters in _OURS.items():
        add(f"masked_loss.{name}", name, parameters, False)
    for name, parameters in _OUR_OPERATORS.items():
        add(f"torch.ops.masked_loss.{name}", name, parameters, False)
    for name, (function, parameters) in _OUR_MODULES.items():
        add(f"masked_loss.{name}", function, parameters, True)
    return specs


SPECS = _specs()


def legacy_reduction(size_average: bool | None, reduce: bool | None) -> str:
    """The ``reduction`` that the deprecated pair stands for; None is the old default, True.

    >>> legacy_reduction(False, None), legacy_reduction(True, False)
    ('sum', 'none')
    """
    if reduce is not None and not reduce:
        return "none"
    return "mean" if size_average is None or size_average else "sum"


def arguments_of(spec: LossSpec, node: ast.Call) -> dict[str, ast.expr] | None:
    """The arguments of a call by parameter name, or None where * or ** hides some."""
    if any(isinstance(a, ast.Starred) for a in node.args) or any(not k.arg for k in node.keywords):
        return None
    given = dict(zip(spec.parameters, node.args, strict=False))
    return given | {k.arg: k.value for k in node.keywords if k.arg}
