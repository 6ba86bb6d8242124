# SPDX-License-Identifier: BSD-3-Clause
"""Mean and variance under a mask, and values scaled by them; over several ranks too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from masked_loss._op.arguments import require_bool, require_constant, require_number
from masked_loss._op.overrides import is_overridden, override
from masked_loss.reduce import reduced, rounded, weighed

if TYPE_CHECKING:
    Group: TypeAlias = dist.ProcessGroup | Sequence[dist.ProcessGroup] | None


def masked_moments(
    values: Tensor,
    mask: Tensor | None = None,
    *,
    dim: int | tuple[int, ...] | None = None,
    correction: float = 0,
    cu_seqlens: Tensor | None = None,
    group: Group = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Mean, variance and count of values, weighted by a mask.

    .. math::
        \text{count} = \sum_n w_n, \qquad
        \text{mean} = \frac{\sum_n w_n v_n}{\text{count}}, \qquad
        \text{var} = \frac{\sum_n w_n (v_n - \text{mean})^2}{\text{count} - \text{correction}}

    Masked values are not read, so a NaN in them stays there. Without any weight all three are 0,
    and where count is at most ``correction`` the variance is 0: one value has no variance, not NaN.
    Two passes in float64, rounded once; no host sync. Differentiable, as :func:`torch.var_mean`.

    With ``group`` they are the moments of all its ranks' values: one all-gather of three numbers a
    rank, merged in the order of the ranks, so that every rank has the same bits. All ranks of the
    group have to call, also one without values. The results are constants then.

    Args:
        values: [...] float64, float32, bfloat16 or float16.
        mask: [...] bool, integer or floating: the weight of each value; None stands for 1.
        dim: the dimensions that are reduced; None: all.
        correction: what is subtracted from the count: 1 for the unbiased variance of a sample.
        cu_seqlens: the bounds of packed sequences, as in :func:`masked_loss.masked_reduce`:
            ``dim=-1`` gives [S] moments, and tokens behind the last have weight 0.
        group: the ranks whose values count together, ``torch.distributed.group.WORLD`` for all of
            them; or several groups, as the dimensions of a mesh have. None: this process alone,
            and no communication; of DTensors those that share the values.

    Returns:
        (mean, var, count), of the shape of values without ``dim``: count float64, the others
        float32 (float64 for float64 values).

    Raises:
        IndexError: ``dim`` is none of the dimensions.
        TypeError: values or mask is not a tensor, or a dtype that is not offered.
        ValueError: shapes that do not fit; a negative correction; with ``cu_seqlens``, a dim that
            is not -1; with ``group``, values or a mask that requires grad, packed sequences one by
            one, or a group that this rank is not in.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.var_mean.html; the merging is
    Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
    variances", 1979.

    >>> import torch, masked_loss
    >>> values = torch.tensor([[1.0, 5.0, float("nan")], [2.0, 2.0, 8.0]])
    >>> mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    >>> masked_loss.masked_moments(values, mask, dim=-1)
    (tensor([3., 4.]), tensor([4., 8.]), tensor([2., 3.], dtype=torch.float64))
    """
    if is_overridden(values, mask):
        return override(masked_moments, locals())
    who = "masked_moments"
    if group is not None:
        require_constant(who, "values over a group", values)
        require_constant(who, "a mask over a group", mask)
    require_constant(who, "cu_seqlens", cu_seqlens)
    x, weight = weighed(who, values, mask, cu_seqlens)
    if dim is None:
        cu_seqlens = None  # whose tokens without weight are all that it says
    elif cu_seqlens is not None and (dim != -1 or group is not None):
        raise ValueError(
            f"{who}: with cu_seqlens dim must be None, or -1 without a group, whose ranks have "
            f"sequences of their own; got dim {dim}"
        )
    mean, var, count = _moments(who, x, weight, dim, correction, group, cu_seqlens)
    return rounded(mean, values), rounded(var, values), count


def masked_whiten(
    values: Tensor,
    mask: Tensor | None = None,
    *,
    shift_mean: bool = True,
    correction: float = 0,
    eps: float = 1e-8,
    cu_seqlens: Tensor | None = None,
    group: Group = None,
) -> Tensor:
    r"""Values brought to mean 0 and variance 1, as advantages and rewards are.

    .. math::
        \frac{v_n - \text{mean}}{\sqrt{\text{var} + \text{eps}}}
        \quad (+\, \text{mean if not shift\_mean})

    with the moments of the active values, see :func:`masked_moments`. They are constants in
    backward. A masked value is not read, and is exactly 0 in the result.

    Args:
        values: [...] float64, float32, bfloat16 or float16.
        mask: [...] bool, integer or floating: the weight of each value in the moments; 0 masks it.
            None stands for 1.
        shift_mean: False keeps the mean as it is, as rewards are whitened; so in TRL and verl.
        correction: what is subtracted from the count: 1 for the unbiased variance, as in TRL and
            verl.
        eps: added to the variance.
        cu_seqlens: the bounds of packed sequences: tokens behind the last are masked.
        group: the ranks whose values are whitened together, see :func:`masked_moments`.

    Returns:
        float32 (float64 for float64 values), of the shape of values.

    Raises:
        TypeError: values or mask is not a tensor, or a dtype that is not offered.
        ValueError: shapes that do not fit; a negative correction or eps; a group that this rank is
            not in.

    Source: https://arxiv.org/abs/2006.05990, decision C67 (advantage normalisation).

    >>> import torch, masked_loss
    >>> values, mask = torch.tensor([1.0, 5.0, float("nan")]), torch.tensor([1, 1, 0])
    >>> masked_loss.masked_whiten(values, mask)
    tensor([-1.,  1.,  0.])
    >>> masked_loss.masked_whiten(values, mask, shift_mean=False)
    tensor([2., 4., 0.])
    """
    if is_overridden(values, mask):
        return override(masked_whiten, locals())
    who = "masked_whiten"
    require_constant(who, "cu_seqlens", cu_seqlens)
    require_bool(who, shift_mean=shift_mean)
    x, weight = weighed(who, values, mask, cu_seqlens)
    require_number(who, "eps", eps)
    if not eps >= 0:
        raise ValueError(f"{who}: eps must be at least 0, got {eps}")
    # detach(), and not no_grad(): that would leave them their tangents in forward mode.
    mean, var, _ = _moments(who, x.detach(), weight.detach(), None, correction, group)
    white = (x - mean) / torch.sqrt(var + eps)
    white = white if shift_mean else white + mean
    return rounded(white.where(weight != 0, 0), values)


def _moments(
    who: str,
    x: Tensor,
    weight: Tensor,
    dim: int | tuple[int, ...] | None,
    correction: float,
    group: Group,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    require_number(who, "correction", correction)
    if not correction >= 0:
        raise ValueError(f"{who}: correction must be at least 0, got {correction}")
    if cu_seqlens is None:
        dims = tuple(range(x.dim())) if dim is None else dim
        count = weight.sum(dims, keepdim=True)
        mean = (weight * x).sum(dims, keepdim=True) / _or_one(count)
        squares = (weight * (x - mean) ** 2).sum(dims)
        mean, count = mean.view_as(squares), count.view_as(squares)
    else:
        count = reduced(who, weight, None, "sum", None, -1, cu_seqlens)
        mean = reduced(who, x, weight, "sum", None, -1, cu_seqlens) / _or_one(count)
        away = x - _of_tokens(mean, cu_seqlens, x.shape)
        squares = reduced(who, away**2, weight, "sum", None, -1, cu_seqlens)
    if group is not None:
        count, mean, squares = _over_ranks(who, torch.stack([count, mean, squares]), group)
    var = squares / _or_one((count - correction).clamp(min=0))
    return mean, var.where(count > correction, 0), count


def _of_tokens(each: Tensor, cu_seqlens: Tensor, shape: torch.Size) -> Tensor:
    """To every token what its sequence has; 0 behind the last."""
    tokens = math.prod(shape)
    ends = torch.cat([cu_seqlens[1:], cu_seqlens.new_full((1,), tokens)])
    each = torch.cat([each, each.new_zeros(1)])
    return each.repeat_interleave(ends - cu_seqlens, output_size=tokens).view(shape)


def _or_one(x: Tensor) -> Tensor:
    return x.where(x != 0, 1)


def _over_ranks(who: str, local: Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """Merges count, mean and sum of squared deviations, in the order of the ranks."""
    for one in group if isinstance(group, (list, tuple)) else [group]:
        local = _over_group(who, local, one)
    count, mean, squares = local
    return count, mean, squares


def _over_group(who: str, local: Tensor, group: Any) -> Tensor:
    ranks = dist.get_world_size(group)
    if ranks < 1:
        raise ValueError(
            f"{who}: group must be one that this rank is in; rank {dist.get_rank()} is not"
        )
    parts = [torch.empty_like(local) for _ in range(ranks)]
    dist.all_gather(parts, local.contiguous(), group=group)
    count, mean, squares = parts[0]
    for other, its_mean, its_squares in parts[1:]:
        total = count + other
        share = other / _or_one(total)
        away = its_mean - mean
        mean = mean + away * share
        squares = squares + its_squares + away**2 * count * share
        count = total
    return torch.stack([count, mean, squares])
