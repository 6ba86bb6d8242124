# SPDX-License-Identifier: BSD-3-Clause
"""Reductions of losses that were computed elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from masked_loss._op.arguments import (
    divisor_of,
    require_constant,
    require_device,
    require_floating,
    require_mask,
    require_tensors,
)
from masked_loss._op.checks import Names
from masked_loss._op.overrides import is_overridden, override
from masked_loss._op.reduce import masked_reduce as _masked_reduce
from masked_loss.errors import ReducedLossError
from masked_loss.options import Meaning


def masked_reduce(
    values: Tensor,
    mask: Tensor | None = None,
    *,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    dim: int | tuple[int, ...] | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    r"""Reduces losses computed elsewhere, weighted by a mask.

    .. math::
        \text{none: } w_n v_n, \quad \text{sum: } \sum_n w_n v_n, \quad
        \text{mean: } \frac{\sum_n w_n v_n}{\sum_n w_n}, \quad
        \text{sequence\_mean: } \frac{1}{|S|} \sum_{s \in S}
        \frac{\sum_{n \in s} w_n v_n}{\sum_{n \in s} w_n}

    with S the sequences (the last dimension is time) that have an active token. Masked values are
    not read, so a NaN in them stays there. All masked: 0, and gradients 0.

    Args:
        values: [...] float64, float32, bfloat16 or float16, one loss for each token.
        mask: [...] bool, integer or floating: the weight of each value; None stands for 1. A
            floating mask that requires grad gets its gradient.
        reduction: ``"none"``, ``"sum"``, ``"mean"`` or ``"sequence_mean"``.
        normalizer: a number or 0-dim tensor that the sum is divided by, instead of the weights'
            sum; for ``"sequence_mean"`` instead of the number of sequences.
        dim: reduce these dimensions only: ``dim=-1`` gives one number for each sequence. With
            ``"mean"`` and ``"sum"``; a slice without an active token gives 0. None: all.
        cu_seqlens: int32 or int64 [S + 1], from 0 ascending: sequences packed one after the other
            in the flattened tokens. ``"sequence_mean"`` is over them, ``dim=-1`` gives [S] numbers,
            and tokens behind the last have weight 0. None: the last dimension is one sequence;
            jagged nested tensors have their own.

    Returns:
        float32 (float64 for float64 values), of the shape of values for ``"none"``, else 0-dim, or
        of the shape that ``dim`` leaves.

    Raises:
        IndexError: ``dim`` is none of the dimensions.
        ReducedLossError: values is a scalar, and mask is not: the loss was reduced already.
        TypeError: a dtype that is not offered.
        ValueError: shapes that do not fit, an unknown reduction.
        RuntimeError: in a compiled graph, any of these; its text says which.

    Source: docs/semantics.md.

    >>> import torch, masked_loss
    >>> losses = torch.tensor([1.0, 3.0, float("nan")])
    >>> masked_loss.masked_reduce(losses, torch.tensor([True, True, False]))
    tensor(2.)
    >>> log_probs, mask = torch.tensor([[-1.0, -2.0], [-3.0, 0.0]]), torch.tensor([[1, 1], [1, 0]])
    >>> masked_loss.masked_reduce(log_probs, mask, reduction="sum", dim=-1)
    tensor([-3., -3.])
    """
    if is_overridden(values, mask):
        return override(masked_reduce, locals())
    return reduced("masked_reduce", values, mask, reduction, normalizer, dim, cu_seqlens)


def masked_mean(values: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""The mean of values, weighted by a mask: :math:`\sum_n w_n v_n / \sum_n w_n`.

    :func:`masked_reduce` with ``reduction="mean"``: the same shapes, dtypes, errors and source.

    >>> import torch, masked_loss
    >>> masked_loss.masked_mean(torch.tensor([1.0, 3.0, 8.0]), torch.tensor([1, 1, 0]))
    tensor(2.)
    """
    if is_overridden(values, mask):
        return masked_reduce(values, mask)
    return reduced("masked_mean", values, mask, "mean", None)


def reduced(
    who: str,
    values: Tensor,
    mask: Tensor | None,
    reduction: str,
    normalizer: float | Tensor | None,
    dim: int | tuple[int, ...] | None = None,
    cu_seqlens: Tensor | None = None,
    names: Names | None = None,
) -> Tensor:
    """``names``: what the function ``who`` calls the arguments."""
    require_tensors(who, {"values": values}, {"mask": mask})
    if mask is not None and values.dim() == 0 and mask.dim() > 0:
        raise ReducedLossError(
            f"{who}: values must hold one loss for each token of the mask "
            f"{list(mask.shape)}, got a scalar: the loss was reduced before the mask could "
            f'count. Compute it with reduction="none".'
        )
    divisor = divisor_of(who, normalizer, values)
    require_constant(who, "cu_seqlens", cu_seqlens)
    if dim is not None and cu_seqlens is None:
        return _along(who, values, mask, reduction, divisor, dim)
    if dim not in (None, -1):
        raise ValueError(f"{who}: dim must be -1 with cu_seqlens, got {dim}")
    inputs, meaning = (values, mask, divisor, cu_seqlens), Meaning(reduction)
    return _masked_reduce(who, inputs, meaning, names or {}, per_sequence=dim is not None)[0]


def _along(
    who: str,
    values: Tensor,
    mask: Tensor | None,
    reduction: str,
    normalizer: Tensor | None,
    dim: int | tuple[int, ...],
) -> Tensor:
    """Some dimensions only: no kernel, for what is left is as small as a batch."""
    if reduction not in ("sum", "mean"):
        raise ValueError(f'{who}: dim needs reduction "sum" or "mean", got {reduction!r}')
    x, weight = weighed(who, values, mask)
    total = (weight * x).sum(dim)
    if normalizer is not None:
        if normalizer.dim():
            wanted = "normalizer must be a number or a 0-dim tensor"
            raise ValueError(f"{who}: {wanted}, got shape {list(normalizer.shape)}")
        require_device(who, "normalizer", normalizer, values)
        denominator = normalizer.double()
    else:
        denominator = weight.sum(dim) if reduction == "mean" else torch.ones_like(total)
    loss = total / denominator.where((weight != 0).any(dim), 1)
    return rounded(loss, values)


def weighed(
    who: str, values: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """values and mask in float64, both 0 where the mask is: what is masked is never read."""
    require_floating(who, "values", values)
    require_mask(who, mask, values.shape, values)
    if mask is None:
        weight = torch.ones_like(values, dtype=torch.float64)
    else:
        weight = mask.double().where(mask != 0, 0)
    if cu_seqlens is not None:  # behind the last sequence there is no weight
        weight = reduced(who, weight, None, "none", None, None, cu_seqlens)
    return values.double().where(weight != 0, 0), weight


def rounded(x: Tensor, values: Tensor) -> Tensor:
    """To float32, but for float64 values."""
    return x if values.dtype == torch.float64 else x.float()
