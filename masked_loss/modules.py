# SPDX-License-Identifier: BSD-3-Clause
"""The losses as modules, for code that keeps its loss in a module."""

from __future__ import annotations

import torch
from torch import Tensor

from masked_loss import functional
from masked_loss.linear import linear_cross_entropy
from masked_loss.stats import LossStats


class MaskedCrossEntropyLoss(torch.nn.Module):
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

    class_weight: Tensor | None

    def __init__(
        self,
        *,
        reduction: str = "mean",
        ignore_index: int = -100,
        class_weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        shift: bool = False,
        inplace_backward: bool = False,
        return_stats: bool = False,
    ) -> None:
        super().__init__()
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.register_buffer("class_weight", class_weight)
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.softcap = softcap
        self.shift = shift
        self.inplace_backward = inplace_backward
        self.return_stats = return_stats

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        mask: Tensor | None = None,
        *,
        normalizer: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, LossStats]:
        return functional.masked_cross_entropy(  # type: ignore[call-overload]
            logits,
            target,
            mask,
            reduction=self.reduction,
            normalizer=normalizer,
            ignore_index=self.ignore_index,
            class_weight=self.class_weight,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            shift=self.shift,
            inplace_backward=self.inplace_backward,
            return_stats=self.return_stats,
        )

    def extra_repr(self) -> str:
        return (
            f"reduction={self.reduction!r}, ignore_index={self.ignore_index}, "
            f"label_smoothing={self.label_smoothing}, z_loss={self.z_loss}, "
            f"softcap={self.softcap}, shift={self.shift}"
        )


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


class LinearCrossEntropyLoss(torch.nn.Module):
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

    class_weight: Tensor | None

    def __init__(
        self,
        *,
        reduction: str = "mean",
        ignore_index: int = -100,
        class_weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        shift: bool = False,
        return_stats: bool = False,
        chunk_tokens: int | None = None,
        accumulation_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.register_buffer("class_weight", class_weight)
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.softcap = softcap
        self.shift = shift
        self.return_stats = return_stats
        self.chunk_tokens = chunk_tokens
        self.accumulation_dtype = accumulation_dtype

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        mask: Tensor | None = None,
        *,
        bias: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, LossStats]:
        return linear_cross_entropy(  # type: ignore[misc, call-overload]
            hidden,
            weight,
            target,
            mask,
            bias=bias,
            reduction=self.reduction,
            normalizer=normalizer,
            ignore_index=self.ignore_index,
            class_weight=self.class_weight,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            shift=self.shift,
            return_stats=self.return_stats,
            chunk_tokens=self.chunk_tokens,
            accumulation_dtype=self.accumulation_dtype,
        )

    def extra_repr(self) -> str:
        return (
            f"reduction={self.reduction!r}, ignore_index={self.ignore_index}, "
            f"label_smoothing={self.label_smoothing}, z_loss={self.z_loss}, "
            f"softcap={self.softcap}, shift={self.shift}, chunk_tokens={self.chunk_tokens}"
        )
