# SPDX-License-Identifier: BSD-3-Clause
"""Which classes of the vocabulary each rank of a group holds."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.distributed as dist

from masked_loss._op.arguments import require_int
from masked_loss.options import Shards

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["VocabShard"]


class VocabShard(NamedTuple):
    r"""How a vocabulary of V classes is split over the R ranks of a process group.

    Rank r holds the classes :math:`\text{bounds}_r \le j < \text{bounds}_{r + 1}`, and its logits
    have as many columns. A rank may hold no class at all. Given as ``vocab=``, it makes a loss that
    of all V classes:

    .. math::
        \text{logsumexp}(x) = \log \sum_{r=1}^{R} \sum_{j=\text{bounds}_r}^{\text{bounds}_{r+1} - 1}
        e^{x_j}

    Targets, class weights [V] and masks are those of the whole vocabulary, and the same on all
    ranks of the group, as are the results; the gradient is that of the rank's own columns.

    Attributes:
        group: the ranks that share the vocabulary.
        bounds: R + 1 ascending numbers, from 0 to V.

    Raises:
        ValueError: by what takes it: bounds that do not ascend from 0, that are not one more than
            the group has ranks, or that do not give this rank as many classes as it has columns.

    Source: https://github.com/masked-loss/masked_loss/blob/main/masked_loss/vocab.py

    >>> import torch.distributed as dist
    >>> from masked_loss import VocabShard
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> VocabShard.even(50257).bounds
    (0, 50257)
    >>> VocabShard.gather(50257).classes
    50257
    >>> dist.destroy_process_group()
    """

    group: ProcessGroup
    bounds: tuple[int, ...]

    @classmethod
    def even(cls, classes: int, group: ProcessGroup | None = None) -> VocabShard:
        """As :class:`torch.distributed.tensor.DTensor` and :func:`torch.chunk` split: every rank
        ``ceil(classes / R)`` of them, as long as there are some. None: all ranks."""
        group = _member("VocabShard.even", group)
        require_int("VocabShard.even", "classes", classes)
        if classes < 1:
            raise ValueError(f"VocabShard.even: classes must be at least 1, got {classes}")
        ranks = dist.get_world_size(group)
        columns = -(-classes // ranks)
        return cls(group, tuple(min(r * columns, classes) for r in range(ranks + 1)))

    @classmethod
    def gather(cls, columns: int, group: ProcessGroup | None = None) -> VocabShard:
        """Of a rank with so many columns, any number: asks the others of the group for theirs.

        One exchange of a number, to be made once and not at every step. None: all ranks.
        """
        group = _member("VocabShard.gather", group)
        require_int("VocabShard.gather", "columns", columns)
        if columns < 0:
            raise ValueError(f"VocabShard.gather: columns must be at least 0, got {columns}")
        each: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(each, columns, group=group)
        return cls(group, (0, *accumulate(each)))

    @property
    def classes(self) -> int:
        """V."""
        return self.bounds[-1]

    @property
    def rank(self) -> int:
        """This rank's number in the group."""
        return dist.get_rank(self.group)

    @property
    def columns(self) -> int:
        """How many classes this rank holds."""
        return self.bounds[self.rank + 1] - self.bounds[self.rank]


def _member(who: str, group: ProcessGroup | None) -> ProcessGroup:
    """``group``, of which this rank is one, or that of all ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(f"{who}: needs a process group: torch.distributed is not initialized")
    if group is None:
        group = dist.group.WORLD
        assert group is not None
    if dist.get_rank(group) < 0:
        raise ValueError(
            f"{who}: group must be one that this rank is in; rank {dist.get_rank()} is not"
        )
    return group


def shards_of(who: str, vocab: Any, what: str, columns: int) -> Shards:
    """As the operators take it, of ``what`` with so many columns."""
    if isinstance(vocab, Shards):
        return vocab
    require_vocab(who, vocab, what, columns)
    return Shards(vocab.group.group_name, list(vocab.bounds))


def require_vocab(who: str, vocab: Any, what: str, columns: int) -> None:
    """That ``vocab`` gives this rank the ``columns`` classes that ``what`` has."""
    if not isinstance(vocab, VocabShard):
        raise TypeError(f"{who}: vocab must be a VocabShard, got {type(vocab).__name__}")
    group: Any = vocab.group
    if not isinstance(group, dist.ProcessGroup):
        found = type(group).__name__
        raise TypeError(f"{who}: the group of vocab must be a ProcessGroup, got {found}")
    _member(who, vocab.group)
    bounds, ranks = vocab.bounds, dist.get_world_size(vocab.group)
    if len(bounds) != ranks + 1:
        raise ValueError(
            f"{who}: the bounds of vocab must be {ranks + 1}, one more than its group has ranks, "
            f"got {len(bounds)}"
        )
    for bound in bounds:
        require_int(who, "every bound of vocab", bound)
    if bounds[0] != 0 or any(end < begin for begin, end in pairwise(bounds)):
        raise ValueError(f"{who}: the bounds of vocab must ascend from 0, got {list(bounds)}")
    if bounds[-1] < 1:
        raise ValueError(f"{who}: the bounds of vocab must have at least one class, got {bounds}")
    if columns != vocab.columns:
        raise ValueError(
            f"{who}: {what} must have {vocab.columns} classes on rank {vocab.rank} of vocab, "
            f"whose bounds are {list(bounds)}; got {columns}"
        )
