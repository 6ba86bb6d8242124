# SPDX-License-Identifier: BSD-3-Clause
"""A head whose classes tensor parallelism has shared out (ColwiseParallel)."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from masked_loss.options import Shards
from masked_loss.vocab import VocabShard


class Split(NamedTuple):
    """Where the other classes are, and what the logits look like to who asks for them."""

    vocab: VocabShard
    mesh: DeviceMesh
    placement: Placement | None
    """Of logits that are a DTensor, Shard(-1) or Replicate(); None: they are a tensor, the same on
    every rank."""

    @property
    def shards(self) -> Shards:
        """For a loss of hidden states that :func:`split` gave, whose gradients stay in parts."""
        group: Any = self.vocab.group
        return Shards(group.group_name, self.vocab.bounds, reduce_hidden=False)

    def mine(self, x: Tensor) -> Tensor:
        """This rank's of all classes [..., V]."""
        return x.narrow(-1, self.vocab.bounds[self.vocab.rank], self.vocab.columns)

    def gathered(self, columns: Tensor) -> Tensor:
        """The logits, of which this rank has some columns."""
        whole = columns.new_empty((*columns.shape[:-1], self.vocab.classes), device="meta")
        logits = DTensor.from_local(
            columns.contiguous(), self.mesh, [Shard(-1)], shape=whole.shape, stride=whole.stride()
        )
        if self.placement is None:
            return logits.full_tensor()
        return logits.redistribute(placements=[self.placement])

    def local(self, x: Any) -> Any:
        """What the loss is given beside the logits, the same on every rank."""
        return x.full_tensor() if isinstance(x, DTensor) else x

    def distributed(self, x: Any) -> Any:
        """A loss or its statistics, as what the logits are."""
        if self.placement is None:
            return x
        if isinstance(x, tuple):
            each = map(self.distributed, x)
            return type(x)(*each) if hasattr(x, "_fields") else tuple(each)
        return DTensor.from_local(x, self.mesh, [Replicate()])


def split(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Split] | None:
    """This rank's part of a head, None where it is not one of whole tokens and shared classes."""
    if not isinstance(hidden, DTensor) or not isinstance(weight, DTensor):
        return None
    mesh = weight.device_mesh
    if mesh.ndim != 1 or hidden.device_mesh != mesh:
        return None
    if hidden.placements != (Replicate(),) or weight.placements != (Shard(0),):
        return None
    if bias is not None and (not isinstance(bias, DTensor) or bias.placements != (Shard(0),)):
        return None
    return (
        hidden.to_local(grad_placements=[Partial()]),
        weight.to_local(),
        None if bias is None else bias.to_local(),
        Split(VocabShard.even(weight.shape[0], mesh.get_group()), mesh, Shard(-1)),
    )
