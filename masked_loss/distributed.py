# SPDX-License-Identifier: BSD-3-Clause
"""One count for all ranks, so that a batch weighs the same however it is split."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from masked_loss._op import jagged
from masked_loss._op.arguments import (
    is_distributed,
    name_of,
    require_bool,
    require_int,
    require_mask,
    require_tensors,
)
from masked_loss._op.checks import INTEGERS, UNSIGNED
from masked_loss.reduce import reduced

__all__ = ["global_normalizer"]

_WHO = "global_normalizer"
_NAMES = {"values": "target"}


def global_normalizer(
    target: Tensor | Sequence[Tensor],
    mask: Tensor | Sequence[Tensor | None] | None = None,
    *,
    ignore_index: int = -100,
    shift: bool = False,
    cu_seqlens: Tensor | Sequence[Tensor | None] | None = None,
    count: str = "tokens",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    r"""What to divide a rank's loss by, so that averaged gradients are those of all tokens.

    With :math:`w` the weights of rank r's tokens and R ranks in the group,

    .. math::
        \text{normalizer} = \frac{1}{R} \sum_{r=1}^{R} \sum_{n \in r} w_n, \qquad
        w_n = \text{mask}_n [t_n \ne \text{ignore\_index}]

    Give it to a loss as ``normalizer=``. DistributedDataParallel and FSDP average the ranks'
    gradients, and :math:`\frac{1}{R} \sum_r \frac{\text{sum}_r}{\text{normalizer}}` is the mean
    over the tokens of all ranks, whatever share of them each rank has. Without it, a token counts
    for more the fewer tokens its rank has.

    ``count="sequences"`` counts the sequences that have an active token instead: what to divide
    ``"sequence_mean"`` by, and the sum over tokens where every sequence is to count alike.

    One all-reduce of one number, and no host sync. Without an initialised process group it is the
    local count.

    Args:
        target: [...] class indices of this rank; or a sequence of them, one for each micro-batch
            of a step with gradient accumulation: each micro-batch's loss gets the same normalizer.
        mask: the weights, in the shape of target: bool, integer or floating; a sequence if target
            is one. None stands for 1.
        ignore_index: a target with this value has weight 0.
        shift: what the loss is given: the first token of every sequence takes no part.
        cu_seqlens: the bounds of packed sequences, as the loss is given them; a sequence if target
            is one. None: the last dimension of target is one sequence.
        count: ``"tokens"``, or ``"sequences"``.
        group: the ranks whose gradients are averaged together; None: all.

    Of DTensors it is the count of the whole, :math:`\sum_r \sum_n w_n` over the ranks that share
    the tokens, for the loss of DTensors is the whole's too; ``group`` has no place there.

    Returns:
        A 0-dim float64 tensor on the device of target; a replicated DTensor if target is one.

    Raises:
        TypeError: target or mask is not a tensor, or has a dtype that is not offered.
        ValueError: shapes that do not fit; an unknown count; a group that this rank is not in.

    Source: https://github.com/masked-loss/masked_loss/blob/main/masked_loss/distributed.py

    >>> import torch, masked_loss
    >>> target = torch.tensor([[4, 7, 1], [5, -100, -100]])
    >>> masked_loss.global_normalizer(target)
    tensor(4., dtype=torch.float64)
    >>> masked_loss.global_normalizer(target, torch.tensor([[1, 0.5, 0], [1, 1, 1]]))
    tensor(2.5000, dtype=torch.float64)
    >>> masked_loss.global_normalizer(target, count="sequences")
    tensor(2., dtype=torch.float64)
    """
    if count not in ("tokens", "sequences"):
        raise ValueError(f'{_WHO}: count must be "tokens" or "sequences", got {count!r}')
    require_bool(_WHO, shift=shift)
    require_int(_WHO, "ignore_index", ignore_index)
    targets = _list("target", target)
    masks, bounds = (
        _each(what, x, targets) for what, x in (("mask", mask), ("cu_seqlens", cu_seqlens))
    )
    if not targets:
        raise ValueError(f"{_WHO}: target must have at least one micro-batch, got none")
    counts = [
        _count(*batch, ignore_index, shift, count)
        for batch in zip(targets, masks, bounds, strict=True)
    ]
    total = torch.stack(counts).sum() if len(counts) > 1 else counts[0]
    if is_distributed(total):
        if group is not None:
            raise ValueError(f"{_WHO}: group must be None with DTensors, whose mesh has the ranks")
        return total
    if dist.is_available() and dist.is_initialized():
        ranks = dist.get_world_size(group)
        if ranks < 1:
            raise ValueError(
                f"{_WHO}: group must be one that this rank is in; rank {dist.get_rank()} is not"
            )
        dist.all_reduce(total, group=group)
        total = total / ranks
    return total


def _each(
    what: str, x: Tensor | Sequence[Tensor | None] | None, targets: list[Tensor]
) -> list[Tensor | None]:
    """One for each micro-batch."""
    if x is None:
        return [None] * len(targets)
    each = _list(what, x)
    if len(each) != len(targets):
        raise ValueError(
            f"{_WHO}: target and {what} must be sequences of one length, "
            f"got {len(targets)} and {len(each)}"
        )
    return each


def _list(what: str, x: Any) -> list[Any]:
    if isinstance(x, Tensor):
        return [x]
    if not isinstance(x, Iterable):
        name = type(x).__name__
        raise TypeError(f"{_WHO}: {what} must be a tensor or a sequence of them, got {name}")
    return list(x)


@torch.no_grad()
def _count(
    target: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    ignore_index: int,
    shift: bool,
    count: str,
) -> Tensor:
    if jagged.is_jagged(target) or jagged.is_jagged(mask):
        return jagged.call(_count, locals(), _WHO)
    if is_distributed(target) or is_distributed(mask):
        return _count_whole(locals())
    require_tensors(_WHO, {"target": target}, {"mask": mask, "cu_seqlens": cu_seqlens})
    if target.dtype not in (*INTEGERS, *UNSIGNED):
        raise TypeError(f"{_WHO}: target must be integer class indices, got {name_of(target)}")
    require_mask(_WHO, mask, target.shape, target)
    if target.dim() == 0 and (shift or count == "sequences"):
        what = "shift" if shift else 'count="sequences"'
        raise ValueError(f"{_WHO}: {what} needs a target with a dimension for time, got []")
    active = target != ignore_index
    # where, not a product: the mask of an ignored token may be anything
    weight = active.double() if mask is None else torch.where(active, mask, 0).double()
    if cu_seqlens is not None:  # behind the last sequence there is no weight
        weight = reduced(_WHO, weight, None, "none", None, None, cu_seqlens, _NAMES)
    if shift:
        weight[..., :1] = 0
    if shift and cu_seqlens is not None:  # one place more, for sequences that are empty at the end
        begins = torch.zeros(weight.numel() + 1, dtype=torch.bool, device=weight.device)
        begins[cu_seqlens.long()] = True
        weight = weight.masked_fill(begins[:-1].view(weight.shape), 0)
    if count == "tokens":
        return weight.sum()
    active = weight != 0
    if cu_seqlens is None:
        return active.any(dim=-1).sum().double()
    each = reduced(_WHO, active.double(), None, "sum", None, -1, cu_seqlens, _NAMES)
    return (each > 0).sum().double()


def _count_whole(arguments: dict[str, Any]) -> Tensor:
    from masked_loss import _dtensor

    return _dtensor.count(_WHO, _count, arguments)
