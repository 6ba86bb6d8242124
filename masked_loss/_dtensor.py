# SPDX-License-Identifier: BSD-3-Clause
"""DTensors: the call on what this rank holds, and the exchange that makes it the call on the whole.

Each dimension of a mesh shards the tokens, shards the classes, or holds the same on all of its
ranks. What shards classes is a ``vocab`` for the operators. A scalar of sharded tokens is the sum
of the ranks' scalars, whose denominators count the tokens of all. It comes back replicated:
``.item()`` of a partial sum is the local part of it, without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from masked_loss.options import Shards
from masked_loss.vocab import VocabShard

Arguments = dict[str, Any]
Placements = tuple[Placement, ...]

_LEADS = ("logits", "hidden", "log_probs", "values", "target")
"""The first of these among a function's arguments says where its tokens are."""
_ROWS = {"logits", "hidden", "log_probs", "teacher_logits", "teacher_log_probs"}
_OF_TOKENS = {*_ROWS, "values", "target", "mask", "temperature", "teacher_temperature"}
_MOMENTS = {"masked_moments", "masked_whiten"}
_EACH_TOKEN = {"token_log_probs", "linear_token_log_probs", "masked_whiten"}


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


def call(function: Callable[..., Any], arguments: Arguments) -> Any:
    """``function`` of arguments by name, of which at least one is a DTensor."""
    who = function.__name__
    if who == "cross_entropy":
        return _drop_in(arguments)
    if who == "linear_divergence" or "cu_seqlens" not in arguments:
        raise ValueError(
            f"{who}: DTensors are not taken, got {_names(arguments)}: give to_local() where the "
            "tokens are sharded, and as normalizer what global_normalizer() counts"
        )
    layout, local = localized(who, arguments)
    dims = _reduced_dims(arguments, layout)
    each_token = who in _EACH_TOKEN or arguments.get("reduction") == "none"
    if each_token or who in _MOMENTS:
        return _distributed(function(**local), layout, [] if each_token else dims, [])
    over = layout.over(dims)
    if not over:
        return _distributed(function(**local), layout, dims, over)
    _require_targets(who, local, layout, dims)
    results = _share_of_whole(function, local, layout, dims)
    if arguments.get("return_stats") and _slices(local, layout, dims):
        results = results[0], function(**local)[1]  # weighed by the mask, not by shares of it
    return _distributed(results, layout, dims, over)


def count(who: str, function: Callable[..., Tensor], arguments: Arguments) -> DTensor:
    """The weights of all ranks' tokens, or their sequences; ``function`` counts one rank's."""
    layout, local = localized(who, arguments)
    tokens = range(len(layout.shape))
    if arguments["count"] == "sequences" and layout.over(tokens):
        total = sequences(weights(local), layout)
    else:
        total = summed(function(**local), layout, tokens)
    return DTensor.from_local(total, layout.mesh)


def _drop_in(a: Arguments) -> Tensor:
    """:func:`masked_loss.cross_entropy`, whose classes are dimension 1."""
    from masked_loss.functional import masked_cross_entropy

    who, input, reduction = "cross_entropy", a["input"], a["reduction"]
    if a["size_average"] is not None or a["reduce"] is not None:
        reduction = torch.nn._reduction.legacy_get_string(a["size_average"], a["reduce"])
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f'{who}: reduction must be "none", "sum" or "mean", got {reduction!r}')
    if a["target"].is_floating_point():
        raise ValueError(f"{who}: class probabilities are not taken with DTensors, got them")
    return masked_cross_entropy(
        input.movedim(1, -1) if input.dim() > 2 else input, a["target"], a["mask"],
        reduction=reduction, ignore_index=a["ignore_index"], class_weight=a["weight"],
        label_smoothing=a["label_smoothing"],
    )  # fmt: skip


# What is whose part of the whole


def localized(who: str, arguments: Arguments) -> tuple[Layout, Arguments]:
    """What this rank holds of the arguments, and what it has to know of the other ranks."""
    lead = next(name for name in _LEADS if name in arguments)
    _require_mesh(who, lead, arguments)
    local = dict(arguments)
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
        dims = _reduced_dims(arguments, layout)
        local["group"] = [layout.mesh.get_group(i) for i in layout.over(dims)] or None
    if layout.classes is not None:
        local["vocab"] = _shards(layout, arguments[lead], arguments.get("weight"))
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
            f"{who}: {_names(arguments)} must be a local tensor, as {lead} is, got a DTensor: give "
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
    shape = x.shape[:-1] if lead in _ROWS else x.shape
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
    if of_classes and "vocab" not in arguments:
        raise ValueError(
            f"{who}: weight must have every class on every rank, got {weight.placements}: "
            "weight.redistribute(placements=...) with Replicate() gathers them"
        )
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


def _shards(layout: Layout, rows: Tensor, weight: Tensor | None) -> Shards:
    """Whose the other classes are; what a linear loss leaves in parts, DTensors add up."""
    assert layout.classes is not None
    group = layout.mesh.get_group(layout.classes)
    vocab = VocabShard.even(rows.shape[-1] if weight is None else weight.shape[0], group)
    return Shards(group.group_name, list(vocab.bounds), reduce_hidden=False)


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


def _reduced_dims(arguments: Arguments, layout: Layout) -> list[int]:
    """The dimensions of the tokens that the function reduces."""
    rank, dim = len(layout.shape), arguments.get("dim")
    if dim is None:
        return list(range(rank))
    dims = (dim,) if isinstance(dim, int) else tuple(dim)
    for d in dims:
        if not -rank <= d < max(rank, 1):
            raise IndexError(f"Dimension out of range (expected {-rank} to {rank - 1}, got {d})")
    return [d % rank for d in dims]


# What a scalar is divided by


def _require_targets(who: str, local: Arguments, layout: Layout, dims: list[int]) -> None:
    """On the CPU a target out of range is an error of one rank, for which the others would wait."""
    target = local.get("target")
    if target is None or not target.is_cpu or torch.compiler.is_compiling():
        return
    if local.get("vocab") is not None:
        classes = local["vocab"].bounds[-1]
    else:
        classes = local["weight"].shape[0] if "hidden" in local else local["logits"].shape[-1]
    wrong = ((target < 0) | (target >= classes)) & (weights(local) != 0)
    here, everywhere = wrong.sum().double(), summed(wrong.sum().double(), layout, dims)
    if everywhere and not here:
        raise IndexError(
            f"{who}: target of another rank is out of range for {classes} classes, whose error "
            "says which"
        )


def _share_of_whole(
    function: Callable[..., Any], local: Arguments, layout: Layout, dims: list[int]
) -> Any:
    """What this rank's tokens add to the result of all."""
    reduction, normalizer = local["reduction"], local["normalizer"]
    if reduction == "sum" or (reduction == "mean" and normalizer is not None):
        return function(**local)
    weight, slices = weights(local), _slices(local, layout, dims)
    if reduction == "sequence_mean":
        number = sequences(weight, layout) if normalizer is None else normalizer
        local = {**local, "normalizer": number}
        if not slices:
            return function(**local)

    def divided(local: Arguments, by: Tensor) -> Any:
        if slices:
            total = summed(by.sum(slices, keepdim=True), layout, slices)
            return function(**{**local, "mask": weight / _or_one(total), "reduction": "sum"})
        total, mask = summed(by.sum(), layout, dims), local["mask"]
        if total.requires_grad:  # to which a factor of 1 hands on what no normalizer does
            mask = mask * (_or_one(total.detach()) / _or_one(total))
        return function(**{**local, "mask": mask, "normalizer": total.detach()})

    class_weight = local.get("class_weight")
    if class_weight is None:
        return divided(local, weight)
    of_class = class_weight.double()[local["target"].clamp(0, class_weight.numel() - 1).long()]
    if not local["z_loss"]:
        return divided(local, weight * of_class)
    # The mean of the z-loss counts no class weights.
    alone = divided({**local, "class_weight": torch.zeros_like(class_weight)}, weight)
    others = divided({**local, "z_loss": 0.0}, weight * of_class)
    if local["return_stats"]:
        return others[0] + alone[0], alone[1]
    return others + alone


def _slices(local: Arguments, layout: Layout, dims: list[int]) -> list[int]:
    """The dimensions of slices that ranks share, of which each has a mean of its own."""
    if local["reduction"] == "sequence_mean":
        return dims[-1:] if layout.over(dims[-1:]) else []
    return dims if local["reduction"] == "mean" and local.get("dim") is not None else []


def weights(local: Arguments) -> Tensor:
    """mask * [target != ignore_index] of this rank's tokens, in float64."""
    mask, target = local.get("mask"), local.get("target")
    if target is not None:
        active = target != local["ignore_index"]
    else:
        name = next(name for name in _LEADS if name in local)
        tokens = local[name][..., 0] if name in _ROWS else local[name]
        active = torch.ones_like(tokens, dtype=torch.bool)
    if local.get("shift"):
        active[..., :1] = False
    # where, not a product: the mask of an ignored token may be anything, and that of a masked one
    # has no gradient
    return active.double() if mask is None else mask.double().where(active & (mask != 0), 0)


def sequences(weight: Tensor, layout: Layout) -> Tensor:
    """The number of sequences that have a weight, on all ranks."""
    time = len(layout.shape) - 1
    active = summed((weight != 0).any(dim=-1).double(), layout, [time]) != 0
    return summed(active.sum().double(), layout, range(time))


def summed(x: Tensor, layout: Layout, dims: Iterable[int]) -> Tensor:
    """The sum over the ranks that share these dimensions of the tokens, for each of them."""
    over = layout.over(dims)
    if not over:
        return x
    parts = [Partial() if i in over else Replicate() for i in range(layout.mesh.ndim)]
    total = _added_up(DTensor.from_local(x, layout.mesh, parts))
    return total.to_local(grad_placements=parts)


def _or_one(x: Tensor) -> Tensor:
    return x.where(x != 0, 1)


# What the whole has of it


def _distributed(results: Any, layout: Layout, dims: list[int], over: list[int]) -> Any:
    """The ranks' results as DTensors; ``over`` some dimensions of the mesh they are added up."""
    if isinstance(results, Tensor):
        return _placed(results, layout.without(dims), over)
    if hasattr(results, "_fields"):  # the sums of statistics
        tokens = range(len(layout.shape))
        sums = _placed(torch.stack(results), layout.without(tokens), layout.over(tokens))
        return type(results)(*sums.unbind())
    return tuple(_distributed(x, layout, dims, over) for x in results)


def _placed(x: Tensor, layout: Layout, over: list[int]) -> DTensor:
    shape = torch.Size((*layout.shape, *x.shape[len(layout.shape) :]))
    stride = torch.empty(shape, device="meta").stride()
    parts = [Partial() if i in over else p for i, p in enumerate(layout.placements)]
    result = DTensor.from_local(x.contiguous(), layout.mesh, parts, shape=shape, stride=stride)
    return _added_up(result)


def _added_up(x: DTensor) -> DTensor:
    """One dimension of the mesh after the other: together, PyTorch warns that they are not."""
    placements = list(x.placements)
    for i, placement in enumerate(placements):
        if placement.is_partial():
            placements[i] = Replicate()
            x = x.redistribute(placements=placements)
    return x


def _names(arguments: Arguments) -> str:
    return ", ".join(name for name, x in arguments.items() if isinstance(x, DTensor))
