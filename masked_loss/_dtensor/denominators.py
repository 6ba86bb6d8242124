# SPDX-License-Identifier: BSD-3-Clause
"""What the scalar of sharded tokens is divided by, so that the ranks' add up to that of all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from masked_loss import reference
from masked_loss._dtensor.layout import LEADS, ROWS, Arguments, Layout, added_up


def require_targets(
    function: Callable[..., Any], local: Arguments, layout: Layout, dims: list[int]
) -> None:
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
    if everywhere and here:
        function(**local)  # says which
    elif everywhere:
        raise IndexError(
            f"{function.__name__}: target of another rank is out of range for {classes} classes: "
            "its error says which"
        )


def share_of_whole(
    function: Callable[..., Any], local: Arguments, layout: Layout, dims: list[int]
) -> Any:
    """What this rank's tokens add to the result of all."""
    reduction, normalizer = local["reduction"], local["normalizer"]
    if reduction == "sum" or (reduction == "mean" and normalizer is not None):
        return function(**local)
    weight, slices = weights(local), slices_of(local, layout, dims)
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


def slices_of(local: Arguments, layout: Layout, dims: list[int]) -> list[int]:
    """The dimensions of slices that ranks share, of which each has a mean of its own."""
    if local["reduction"] == "sequence_mean":
        return dims[-1:] if layout.over(dims[-1:]) else []
    return dims if local["reduction"] == "mean" and local.get("dim") is not None else []


def weights(local: Arguments) -> Tensor:
    """mask * [target != ignore_index] of this rank's tokens, in float64."""
    name, target = next(name for name in LEADS if name in local), local.get("target")
    shape = local[name].shape[:-1] if name in ROWS else local[name].shape
    rows = torch.empty((*shape, 0), dtype=torch.float64, device=local[name].device)
    scored = None if target is None else target != local["ignore_index"]
    return reference.token_weights(rows, local.get("mask"), scored, local.get("shift", False))


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
    total = added_up(DTensor.from_local(x, layout.mesh, parts))
    return total.to_local(grad_placements=parts)


def _or_one(x: Tensor) -> Tensor:
    return x.where(x != 0, 1)
