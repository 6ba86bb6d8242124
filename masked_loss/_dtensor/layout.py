# SPDX-License-Identifier: BSD-3-Clause
"""Which tokens and classes of a DTensor call each rank has, and what does not fit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from masked_loss.options import Shards
from masked_loss.vocab import VocabShard, shards_of

Arguments = dict[str, Any]
Placements = tuple[Placement, ...]

LEADS = ("logits", "hidden", "log_probs", "values", "target")
"""The first of these among a function's arguments says where its tokens are."""
ROWS = {"logits", "hidden", "log_probs", "teacher_logits", "teacher_log_probs"}
_OF_TOKENS = {*ROWS, "values", "target", "mask", "temperature", "teacher_temperature"}


class Layout(NamedTuple):
    """How the ranks of a mesh share tokens [...] and their classes."""

    mesh: DeviceMesh
    shape: torch.Size
    """Of all tokens."""
    dims: tuple[int | None, ...]
    """For each dimension of the mesh: that of the tokens which it shards."""
    classes: int | None = None
    """The dimension of the mesh that shards the classes."""

    @property
    def placements(self) -> Placements:
        return tuple(Replicate() if d is None else Shard(d) for d in self.dims)

    @property
    def row_placements(self) -> Placements:
        places = list(self.placements)
        if self.classes is not None:
            places[self.classes] = Shard(len(self.shape))
        return tuple(places)

    def over(self, dims: Iterable[int]) -> list[int]:
        """The dimensions of the mesh that shard one of these dimensions of the tokens."""
        wanted = set(dims)
        return [i for i, d in enumerate(self.dims) if d in wanted]

    def without(self, dims: Iterable[int]) -> Layout:
        """Of what is left when these dimensions of the tokens are reduced."""
        left = [d for d in range(len(self.shape)) if d not in set(dims)]
        kept = (left.index(d) if d in left else None for d in self.dims)
        return Layout(self.mesh, torch.Size(self.shape[d] for d in left), tuple(kept))


def localized(who: str, arguments: Arguments) -> tuple[Layout, Arguments]:
    """What this rank holds of the arguments, and what it has to know of the other ranks."""
    lead = next(name for name in LEADS if name in arguments)
    _require_mesh(who, lead, arguments)
    if lead == "hidden":
        layout, head = _linear(who, arguments)
    else:
        layout, head = _layout_of(who, lead, arguments), {}
    tokens = layout.over(range(len(layout.shape)))
    if tokens:
        _require_whole_sequences(who, arguments, layout)
    local = {n: head[n] if n in head else _local(who, n, x, layout) for n, x in arguments.items()}
    for name, groups in (("vocab", "the placements"), ("group", "the mesh")):
        if arguments.get(name) is not None:
            text = f"{name} must be None with DTensors, where {groups} say it"
            raise ValueError(f"{who}: {text}")
    if "group" in local:
        dims = reduced_dims(arguments, layout)
        local["group"] = [layout.mesh.get_group(i) for i in layout.over(dims)] or None
    if layout.classes is not None:
        local["vocab"] = _shards(who, layout, lead, arguments, local)
    return layout, local


def _require_mesh(who: str, lead: str, arguments: Arguments) -> None:
    x = arguments[lead]
    if not isinstance(x, DTensor):
        if lead == "hidden" and isinstance(arguments["weight"], DTensor):
            raise ValueError(
                f"{who}: hidden must be a DTensor, as weight is, for a tensor may mean two things: "
                "with tensor parallelism it is DTensor.from_local(hidden, mesh, [Replicate()]); "
                "with FSDP compute the loss in the forward of the module that holds the head, or "
                "after its unshard(). weight.full_tensor() gives the right loss, and a gradient "
                "of this rank's tokens alone"
            )
        raise ValueError(
            f"{who}: {names(arguments)} must be a local tensor, as {lead} is, got a DTensor: give "
            f"to_local(), or {lead} as DTensor.from_local({lead}, mesh, placements)"
        )
    for name, other in arguments.items():
        if isinstance(other, DTensor) and other.device_mesh != x.device_mesh:
            raise ValueError(
                f"{who}: {name} must be on the mesh of {lead}, {x.device_mesh}, "
                f"got {other.device_mesh}"
            )


def _known(who: str, name: str, x: DTensor) -> Placements:
    for placement in x.placements:
        known = isinstance(placement, (Shard, Replicate, Partial))
        if not known or hasattr(placement, "split_factor"):  # FSDP's, beside another dimension
            raise ValueError(
                f"{who}: {name} must be placed by Shard, Replicate or Partial, got {x.placements}: "
                "a parameter of FSDP is, in the forward of its module or after unshard()"
            )
    return x.placements


def _layout_of(who: str, lead: str, arguments: Arguments) -> Layout:
    x = arguments[lead]
    shape = x.shape[:-1] if lead in ROWS else x.shape
    dims = [p.dim if isinstance(p, Shard) else None for p in _known(who, lead, x)]
    of_classes = [i for i, d in enumerate(dims) if d == len(shape)]
    if of_classes and ("vocab" not in arguments or len(of_classes) > 1):
        raise ValueError(
            f"{who}: {lead} must have every class on every rank, got {x.placements}: "
            f"{lead}.redistribute(placements=...) with Replicate() gathers them"
        )
    tokens = tuple(None if d == len(shape) else d for d in dims)
    return Layout(x.device_mesh, shape, tokens, of_classes[0] if of_classes else None)


def _linear(who: str, arguments: Arguments) -> tuple[Layout, Arguments]:
    """A head that shards its classes needs every token on each of its ranks, and makes a part of
    every hidden state's gradient. One that does not makes a part of the weight's, of its tokens.
    """
    hidden, weight, bias = (arguments[name] for name in ("hidden", "weight", "bias"))
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and not isinstance(x, DTensor):
            raise ValueError(
                f"{who}: {name} must be a DTensor, as hidden is, got a tensor: "
                f"distribute_tensor({name}, mesh, placements), Replicate() where all have it"
            )
    pairs = list(zip(_known(who, "hidden", hidden), _known(who, "weight", weight), strict=True))
    of_classes = [i for i, (_, w) in enumerate(pairs) if w == Shard(0)]
    of_tokens = [
        i for i, (h, w) in enumerate(pairs)
        if i not in of_classes and isinstance(h, Shard) and h.dim < hidden.dim() - 1
    ]  # fmt: skip
    if len(of_classes) > 1:
        raise ValueError(
            f"{who}: weight must be sharded by one dimension of the mesh, got {weight.placements}: "
            "a parameter of FSDP is, in the forward of its module or after unshard()"
        )

    def local(x: DTensor, shared: list[int], by: Placements, summed: list[int]) -> Tensor:
        mine = [by[i] if i in shared else Replicate() for i in range(len(by))]
        grads = [Partial() if i in summed else p for i, p in enumerate(mine)]
        return x.redistribute(placements=mine).to_local(grad_placements=grads)

    head = {"hidden": local(hidden, of_tokens, hidden.placements, of_classes)}
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None:
            head[name] = local(x, of_classes, weight.placements, of_tokens)
    dims = tuple(hidden.placements[i].dim if i in of_tokens else None for i in range(len(pairs)))
    classes = of_classes[0] if of_classes else None
    return Layout(hidden.device_mesh, hidden.shape[:-1], dims, classes), head


def _shards(who: str, layout: Layout, lead: str, whole: Arguments, local: Arguments) -> Shards:
    """Whose the other classes are; what a linear loss leaves in parts, DTensors add up."""
    assert layout.classes is not None
    what, dim = ("weight", 0) if lead == "hidden" else (lead, -1)
    vocab = VocabShard.even(whole[what].shape[dim], layout.mesh.get_group(layout.classes))
    return shards_of(who, vocab, what, local[what].shape[dim])._replace(reduce_hidden=False)


def _require_whole_sequences(who: str, arguments: Arguments, layout: Layout) -> None:
    """Where tokens are sharded, what looks from one to the next needs both on one rank."""
    if arguments.get("cu_seqlens") is not None:
        raise ValueError(
            f"{who}: cu_seqlens count tokens of one rank, got tokens that are sharded: give local "
            "tensors, and as normalizer what global_normalizer() counts"
        )
    if arguments.get("shift") and layout.over([len(layout.shape) - 1]):
        raise ValueError(
            f"{who}: shift needs whole sequences on each rank, got a last dimension that is "
            "sharded: shift before sharding, target = F.pad(target[..., 1:], (0, 1), "
            "value=ignore_index) and the mask likewise, and leave shift out"
        )


def _local(who: str, name: str, x: Any, layout: Layout) -> Any:
    if not isinstance(x, Tensor):
        return x
    placements: Placements = (Replicate(),) * layout.mesh.ndim
    if name in _OF_TOKENS and x.dim():
        placements = layout.row_placements if name == "logits" else layout.placements
        if x.shape[: len(layout.shape)] != layout.shape:  # before ranks wait for each other
            expected = f"{list(layout.shape)} of the tokens"
            raise ValueError(f"{who}: {name} must have the shape {expected}, got {list(x.shape)}")
    if isinstance(x, DTensor):
        return x.redistribute(placements=placements).to_local()
    if placements != (Replicate(),) * layout.mesh.ndim:
        raise ValueError(
            f"{who}: {name} must be a DTensor placed by {placements}, got a tensor: "
            f"DTensor.from_local({name}, mesh, placements) of this rank's part, or "
            f"distribute_tensor({name}, mesh, placements) of the whole"
        )
    return x


def reduced_dims(arguments: Arguments, layout: Layout) -> list[int]:
    """The dimensions of the tokens that the function reduces."""
    rank, dim = len(layout.shape), arguments.get("dim")
    if dim is None:
        return list(range(rank))
    dims = (dim,) if isinstance(dim, int) else tuple(dim)
    for d in dims:
        if not -rank <= d < max(rank, 1):
            raise IndexError(f"Dimension out of range (expected {-rank} to {rank - 1}, got {d})")
    return [d % rank for d in dims]


def added_up(x: DTensor) -> DTensor:
    """One dimension of the mesh after the other: together, PyTorch warns that they are not."""
    placements = list(x.placements)
    for i, placement in enumerate(placements):
        if placement.is_partial():
            placements[i] = Replicate()
            x = x.redistribute(placements=placements)
    return x


def names(arguments: Arguments) -> str:
    return ", ".join(name for name, x in arguments.items() if isinstance(x, DTensor))
