# SPDX-License-Identifier: BSD-3-Clause
"""The specification of masked_loss: each function in a few lines of eager PyTorch.

The kernels are tested against this file. It computes in the dtype it is given, so with float64
inputs it is the truth that the tests compare with, and every line of it is differentiable.
It checks no arguments and saves no memory; use :mod:`masked_loss` itself for that.

A token takes part when its weight is not 0. Every other token is *masked*: its logits are
replaced by zeros before anything is computed, so a NaN in a masked row reaches neither the loss
nor a gradient.

>>> import torch
>>> from masked_loss import reference
>>> logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0], [float("nan"), 0.0, 0.0]])
>>> target = torch.tensor([0, 2, 1])
>>> mask = torch.tensor([1.0, 3.0, 0.0])
>>> reference.masked_cross_entropy(logits, target, mask, reduction="none")
tensor([0.4076, 3.2958, 0.0000])
>>> reference.masked_cross_entropy(logits, target, mask)
tensor(0.9259)
"""

from __future__ import annotations

import torch
from torch import Tensor

Stats = tuple[Tensor, Tensor, Tensor, Tensor]


def masked_cross_entropy(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    ignore_index: int = -100,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    shift: bool = False,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, Stats]:
    """Cross entropy of ``logits`` [..., V] and ``target`` [...], weighted by ``mask`` [...].

    Args:
        logits: the scores, one row of V for each token.
        target: the class of each token; ``ignore_index`` gives it the weight 0.
        mask: the weight of each token: bool, or any integer or float type. None stands for 1.
        reduction: "none", "sum", "mean" or "sequence_mean", as in :func:`masked_reduce`.
        normalizer: what "mean" and "sum" divide by, instead of the sum of the weights or 1.
        ignore_index: the target value of tokens that take no part.
        class_weight: [V], the weight of each class, as in ``F.cross_entropy``.
        label_smoothing: the share of the target that is spread evenly over all classes.
        z_loss: adds ``z_loss * logsumexp(logits) ** 2`` to the loss of each token.
        softcap: replaces logits by ``softcap * tanh(logits / softcap)`` first.
        shift: ``logits[..., t, :]`` scores ``target[..., t + 1]``, with the weight of the latter.
        return_stats: returns (loss, (tokens, correct, entropy, z_loss)), sums over all tokens.

    >>> logits = torch.zeros(2, 3, 10)
    >>> target = torch.tensor([[4, 4, -100], [4, -100, -100]])
    >>> masked_cross_entropy(logits, target, reduction="sum")
    tensor(6.9078)
    """
    if shift:
        first = logits.new_zeros(target[..., :1].shape)  # Nothing scores the first token.
        logits, target = logits[..., :-1, :], target[..., 1:]
        mask = None if mask is None else mask[..., 1:]

    weight = _weight(mask, target.shape, logits)
    weight = weight.where(target != ignore_index, 0)
    active = weight != 0
    y = logits.where(active[..., None], 0)
    index = target.where(active, 0).long()

    if softcap is not None:
        y = softcap * torch.tanh(y / softcap)
    lse = y.logsumexp(dim=-1)
    nll = -y.log_softmax(dim=-1)  # lse - y, without the rounding of lse
    c = y.new_ones(y.shape[-1]) if class_weight is None else class_weight.to(y.dtype)
    ce = c[index] * nll.gather(-1, index[..., None])[..., 0]
    if label_smoothing:
        ce = (1 - label_smoothing) * ce + label_smoothing * (c * nll).mean(dim=-1)

    # The mean of the cross entropy divides by the class weights too, that of the z-loss does not.
    loss = _reduce(ce, weight, weight * c[index], reduction, normalizer)
    if z_loss:
        loss = loss + _reduce(z_loss * lse**2, weight, weight, reduction, normalizer)
    if shift and reduction == "none":
        loss = torch.cat([first, loss], dim=-1)
    if not return_stats:
        return loss

    weight, y, lse = weight.detach(), y.detach(), lse.detach()
    right = logits.detach().where(active[..., None], 0).argmax(dim=-1) == index
    entropy = torch.special.entr(y.softmax(dim=-1)).sum(dim=-1)
    return loss, (
        weight.sum(),
        (weight * right).sum(),
        (weight * entropy).sum(),
        (weight * z_loss * lse**2).sum(),
    )


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """``F.cross_entropy`` with a mask: classes in dimension 1, indices or probabilities as target.

    A float ``target`` of the shape of ``input`` holds class probabilities. ``ignore_index`` does
    not apply to them, and their mean divides by the sum of the mask alone, as in PyTorch.

    >>> cross_entropy(torch.zeros(2, 10, 5), torch.zeros(2, 5, dtype=torch.long))
    tensor(2.3026)
    """
    logits = input.movedim(1, -1) if input.dim() > 1 else input
    if not target.is_floating_point():
        loss = masked_cross_entropy(
            logits,
            target,
            mask,
            reduction=reduction,
            ignore_index=ignore_index,
            class_weight=weight,
            label_smoothing=label_smoothing,
        )
        assert isinstance(loss, Tensor)
        return loss

    probability = target.movedim(1, -1) if target.dim() > 1 else target
    return probability_cross_entropy(logits, probability, mask, weight, label_smoothing, reduction)


def probability_cross_entropy(
    logits: Tensor,
    probability: Tensor,
    mask: Tensor | None = None,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Cross entropy of ``logits`` [..., V] and class probabilities [..., V]; differentiates both.

    >>> probability_cross_entropy(torch.zeros(2, 10), torch.full((2, 10), 0.1))
    tensor(2.3026)
    """
    weight = _weight(mask, logits.shape[:-1], logits)
    active = (weight != 0)[..., None]
    p = probability.where(active, 0).to(logits.dtype)
    p = (1 - label_smoothing) * p + label_smoothing / logits.shape[-1]
    nll = -logits.where(active, 0).log_softmax(dim=-1)
    c = 1 if class_weight is None else class_weight.to(logits.dtype)
    return _reduce((c * p * nll).sum(dim=-1), weight, weight, reduction, None)


def masked_reduce(
    values: Tensor,
    mask: Tensor | None = None,
    *,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Weighs ``values`` by ``mask`` of the same shape and reduces them.

    With w the mask and x the values where the mask is not 0:

    - "none": ``w x``
    - "sum": ``sum(w x)``
    - "mean": ``sum(w x) / sum(w)``
    - "sequence_mean": the "mean" along the last dimension, then the mean over those sequences
      that have a weight that is not 0

    A ``normalizer`` is the denominator of "sum" and "mean". Without any weight that is not 0 the
    result is 0.

    >>> values = torch.tensor([[1.0, 2.0, 3.0], [7.0, float("nan"), float("nan")]])
    >>> mask = torch.tensor([[True, True, True], [True, False, False]])
    >>> masked_reduce(values, mask), masked_reduce(values, mask, reduction="sequence_mean")
    (tensor(3.2500), tensor(4.5000))
    """
    weight = _weight(mask, values.shape, values)
    return _reduce(values.where(weight != 0, 0), weight, weight, reduction, normalizer)


def _weight(mask: Tensor | None, shape: torch.Size, like: Tensor) -> Tensor:
    """The mask in the dtype of ``like``. An entry that is 0 is a constant: its gradient is 0."""
    if mask is None:
        return like.new_ones(shape)
    return mask.to(like.dtype).where(mask != 0, 0)


def _reduce(
    values: Tensor,
    weight: Tensor,
    share: Tensor,
    reduction: str,
    normalizer: float | Tensor | None,
) -> Tensor:
    """Sums ``weight * values`` and divides by the sum of ``share``, as ``reduction`` says."""
    weighted = weight * values
    active = weight != 0
    if reduction == "none":
        return weighted
    if reduction == "sequence_mean":
        occupied = active.any(dim=-1)
        means = weighted.sum(dim=-1) / share.sum(dim=-1).where(occupied, 1)
        return means.sum() / occupied.sum().clamp(min=1)
    if normalizer is not None:
        denominator = torch.as_tensor(normalizer, dtype=values.dtype, device=values.device)
    elif reduction == "mean":
        denominator = share.sum()
    elif reduction == "sum":
        denominator = torch.ones_like(weighted.sum())
    else:
        raise ValueError(f"reduction must be none, sum, mean or sequence_mean, got {reduction!r}")
    return weighted.sum() / denominator.where(active.any(), 1)
