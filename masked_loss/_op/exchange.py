# SPDX-License-Identifier: BSD-3-Clause
"""What the ranks that share a loss tell each other: masked_loss/options.py, ``Shards``.

Ranks that share the classes exchange the few numbers that a shard of a row comes down to
(csrc/kernels/shards.inl.h), once; every rank merges them in the order of the ranks, so all get the
same bits, whatever the backend adds up in which order.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from masked_loss.options import Shards


def columns(shards: Shards) -> tuple[int, int]:
    """The first class of this rank, and how many there are on all of them."""
    rank = dist.get_rank(_group(shards.vocab_group)) if shards.vocab_group else 0
    return shards.bounds[rank], shards.bounds[-1]


def require_whole(who: str, shards: Shards) -> None:
    """For the derivatives that have no kernel: they are those of all classes."""
    if shards.bounds:
        raise RuntimeError(
            f"{who}: of a vocabulary that is shared out to ranks there are first derivatives, in "
            "reverse mode; for others gather its logits, as torch.distributed.nn.functional does"
        )


def bounds_on(device: torch.device, shards: Shards) -> Tensor:
    return _bounds(tuple(shards.bounds), device)


@lru_cache(maxsize=64)
def _bounds(bounds: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(bounds, dtype=torch.int64, device=device)


def gathered(part: Tensor, shards: Shards) -> Tensor:
    """[shards, ...]: what every rank tells."""
    if not shards.vocab_group:
        return part[None]
    parts = part.new_empty((len(shards.bounds) - 1, *part.shape))
    # Its name before torch 2.13 is deprecated there.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(parts.flatten(0, 1), part, group=_group(shards.vocab_group))
    return parts


def merged(merge: Any, part: Tensor, shards: Shards, *args: Any) -> Any:
    """One exchange of what every rank tells, and the operator that merges it."""
    *saved, how = args
    return merge.default(gathered(part, shards), *saved, bounds_on(part.device, shards), *how)


def together(told: list[tuple[Any, Tensor]], count: int) -> Tensor:
    """Of ``count`` tokens what was told of some of them at a time, with their places."""
    _, part = told[0]
    whole = part.new_zeros((part.shape[0], count))
    for at, part in told:
        whole[:, at] = part
    return whole


def add_up(x: Tensor, shards: Shards) -> None:
    """``x`` becomes the sum of all ranks' x."""
    if shards.vocab_group:
        dist.all_reduce(x, group=_group(shards.vocab_group))


def _group(name: str) -> dist.ProcessGroup:
    c10d: Any = dist.distributed_c10d  # which does not export it
    group: dist.ProcessGroup = c10d._resolve_process_group(name)
    return group
