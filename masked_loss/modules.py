# SPDX-License-Identifier: BSD-3-Clause
"""The losses as modules, for code that keeps its loss in a module."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from masked_loss import functional
from masked_loss.divergence import masked_divergence
from masked_loss.linear import linear_cross_entropy
from masked_loss.linear_divergence import linear_divergence
from masked_loss.linear_log_probs import linear_token_log_probs
from masked_loss.log_probs import token_log_probs
from masked_loss.stats import DivergenceStats, LossStats


class _Loss(torch.nn.Module):
    """Keeps the keywords of a loss function, and calls the function with them.

    A keyword is an attribute of the module, and ``class_weight``, where the function knows it, a
    buffer. ``at_call`` are those
    that come with each batch instead.
    """

    class_weight: Tensor | None
    _defaults: ClassVar[dict[str, Any]]
    _function: ClassVar[Callable[..., Any]]

    def __init_subclass__(cls, function: Callable[..., Any], at_call: tuple[str, ...]) -> None:
        super().__init_subclass__()
        keywords = [
            p
            for p in inspect.signature(function).parameters.values()
            if p.kind is p.KEYWORD_ONLY and p.name not in at_call
        ]
        cls._function = staticmethod(function)
        cls._defaults = {p.name: p.default for p in keywords}
        cls.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        for name in options:
            if name not in self._defaults:
                raise TypeError(
                    f"{type(self).__name__}() got an unexpected keyword argument {name!r}"
                )
        if "class_weight" in self._defaults:
            self.register_buffer("class_weight", None)
        for name, default in self._defaults.items():
            setattr(self, name, options.get(name, default))

    def _loss(self, *tensors: Tensor | None, **at_call: Any) -> Any:
        options = {name: getattr(self, name) for name in self._defaults}
        return self._function(*tensors, **options, **at_call)

    def extra_repr(self) -> str:
        hidden = ("class_weight", "return_stats", "inplace_backward", "accumulation_dtype")
        shown = (name for name in self._defaults if name not in hidden)
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)


class MaskedCrossEntropyLoss(
    _Loss, function=functional.masked_cross_entropy, at_call=("normalizer", "cu_seqlens")
):
    r"""Module form of :func:`masked_loss.masked_cross_entropy`, which has formula and errors.

    The arguments are the keywords of the function; ``class_weight`` becomes a buffer.

    Shape:
        logits [..., V], target [...], mask [...]; the result is 0-dim, or [...] for
        ``reduction="none"``. With ``return_stats`` a pair (loss, :class:`LossStats`).

    >>> import torch, masked_loss
    >>> criterion = masked_loss.MaskedCrossEntropyLoss(label_smoothing=0.1, shift=True)
    >>> ids = torch.tensor([[1, 2, 0, 0]])
    >>> criterion(torch.zeros(1, 4, 8), ids, mask=ids != 0)
    tensor(2.0794)
    """

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        mask: Tensor | None = None,
        *,
        normalizer: float | Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, LossStats]:
        return self._loss(logits, target, mask, normalizer=normalizer, cu_seqlens=cu_seqlens)


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    r"""A drop-in for :class:`torch.nn.CrossEntropyLoss` whose call takes a mask.

    Module form of :func:`masked_loss.cross_entropy`, which has formula, shapes and errors; the
    constructor is PyTorch's, deprecated arguments included.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html

    >>> import torch, masked_loss
    >>> criterion = masked_loss.CrossEntropyLoss(reduction="sum")
    >>> criterion(torch.zeros(3, 2), torch.tensor([0, 1, 1]), mask=torch.tensor([1, 1, 0]))
    tensor(1.3863)
    """

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        return functional.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            mask=mask,
        )


class LinearCrossEntropyLoss(
    _Loss, function=linear_cross_entropy, at_call=("bias", "normalizer", "cu_seqlens")
):
    r"""Module form of :func:`masked_loss.linear_cross_entropy`, which has formula and errors.

    The arguments are the keywords of the function; ``class_weight`` becomes a buffer. The weight of
    the linear layer is an argument of the call, so that a model's head keeps it, and may share it
    with the embedding.

    Shape:
        hidden [..., D], weight [V, D], target [...], mask [...], bias [V]; the result is 0-dim, or
        [...] for ``reduction="none"``. With ``return_stats`` a pair (loss, :class:`LossStats`).

    >>> import torch, masked_loss
    >>> head = torch.nn.Linear(4, 8, bias=False)
    >>> criterion = masked_loss.LinearCrossEntropyLoss(shift=True)
    >>> ids = torch.tensor([[1, 2, 0, 0]])
    >>> criterion(torch.zeros(1, 4, 4), head.weight, ids, mask=ids != 0)
    tensor(2.0794, grad_fn=<LinearCrossEntropyBackward>)
    """

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        mask: Tensor | None = None,
        *,
        bias: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, LossStats]:
        at_call = {"bias": bias, "normalizer": normalizer, "cu_seqlens": cu_seqlens}
        return self._loss(hidden, weight, target, mask, **at_call)


class MaskedDivergenceLoss(_Loss, function=masked_divergence, at_call=("normalizer", "cu_seqlens")):
    r"""Module form of :func:`masked_loss.masked_divergence`, which has formula and errors.

    The arguments are the keywords of the function.

    Shape:
        logits [..., V], teacher_logits [..., V], mask [...]; the result is 0-dim, or [...] for
        ``reduction="none"``. With ``return_stats`` a pair (loss, :class:`DivergenceStats`).

    >>> import torch, masked_loss
    >>> criterion = masked_loss.MaskedDivergenceLoss(kind="reverse_kl", temperature=2.0)
    >>> criterion(torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, -2.0]]))
    tensor(0.4338)
    """

    def forward(
        self,
        logits: Tensor,
        teacher_logits: Tensor,
        mask: Tensor | None = None,
        *,
        normalizer: float | Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, DivergenceStats]:
        at_call = {"normalizer": normalizer, "cu_seqlens": cu_seqlens}
        return self._loss(logits, teacher_logits, mask, **at_call)


class LinearDivergenceLoss(
    _Loss,
    function=linear_divergence,
    at_call=("bias", "teacher_bias", "normalizer", "cu_seqlens"),
):
    r"""Module form of :func:`masked_loss.linear_divergence`, which has formula and errors.

    The arguments are the keywords of the function. Both heads are arguments of the call.

    Shape:
        hidden [..., D], weight [V, D], teacher_hidden [..., D'], teacher_weight [V, D'], mask
        [...], bias and teacher_bias [V]; the result is 0-dim, or [...] for ``reduction="none"``.
        With ``return_stats`` a pair (loss, :class:`DivergenceStats`).

    >>> import torch, masked_loss
    >>> criterion = masked_loss.LinearDivergenceLoss(kind="jsd", beta=0.5)
    >>> head, teacher_head = torch.eye(2), torch.tensor([[2.0], [-2.0]])
    >>> criterion(torch.zeros(1, 2), head, torch.ones(1, 1), teacher_head)
    tensor(0.1804)
    """

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        mask: Tensor | None = None,
        *,
        bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, DivergenceStats]:
        at_call = {"bias": bias, "teacher_bias": teacher_bias, "normalizer": normalizer}
        heads = (hidden, weight, teacher_hidden, teacher_weight)
        return self._loss(*heads, mask, **at_call, cu_seqlens=cu_seqlens)


class TokenLogProbs(_Loss, function=token_log_probs, at_call=("cu_seqlens",)):
    r"""Module form of :func:`masked_loss.token_log_probs`, which has formula and errors.

    The arguments are the keywords of the function; a ``temperature`` for each token is set as the
    module's attribute, or given to the function instead.

    Shape:
        logits [..., V], target [...] or [..., K], mask [...]; the result has the shape of target.
        With ``return_entropy`` a pair (log_probs, entropy [...]).

    >>> import torch, masked_loss
    >>> log_probs = masked_loss.TokenLogProbs(temperature=0.8)
    >>> log_probs(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0]))
    tensor([-0.0789, -1.5019])
    """

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        return self._loss(logits, target, mask, cu_seqlens=cu_seqlens)


class LinearTokenLogProbs(_Loss, function=linear_token_log_probs, at_call=("bias", "cu_seqlens")):
    r"""Module form of :func:`masked_loss.linear_token_log_probs`, which has formula and errors.

    For trainers that keep a fused head in a module (verl, prime-rl). The arguments are the keywords
    of the function; the head's weight is an argument of the call.

    Shape:
        hidden [..., D], weight [V, D], target [...] or [..., K], mask [...], bias [V]; the result
        has the shape of target. With ``return_entropy`` a pair (log_probs, entropy [...]).

    >>> import torch, masked_loss
    >>> log_probs = masked_loss.LinearTokenLogProbs(temperature=0.8)
    >>> hidden = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> log_probs(hidden, torch.eye(2), torch.tensor([0, 0]))
    tensor([-0.0789, -1.5019])
    """

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        mask: Tensor | None = None,
        *,
        bias: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        return self._loss(hidden, weight, target, mask, bias=bias, cu_seqlens=cu_seqlens)
