# SPDX-License-Identifier: BSD-3-Clause
"""DTensors: the call on what this rank holds, and the exchange that makes it the call on the whole.

Each dimension of a mesh shards the tokens, shards the classes, or holds the same on all of its
ranks (layout.py). What shards classes is a ``vocab`` for the operators. A scalar of sharded tokens
is the sum of the ranks' scalars, whose denominators count the tokens of all (denominators.py). It
comes back replicated: ``.item()`` of a partial sum is the local part of it, without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from masked_loss._dtensor.denominators import (
    require_targets,
    sequences,
    share_of_whole,
    slices_of,
    summed,
    weights,
)
from masked_loss._dtensor.layout import Arguments, Layout, added_up, localized, names, reduced_dims
from masked_loss._op.arguments import speaking_for

_MOMENTS = {"masked_moments", "masked_whiten"}
_EACH_TOKEN = {"token_log_probs", "linear_token_log_probs", "masked_whiten"}


def call(function: Callable[..., Any], arguments: Arguments) -> Any:
    """``function`` of arguments by name, of which at least one is a DTensor."""
    who = function.__name__
    if who == "cross_entropy":
        return _drop_in(arguments)
    if who == "linear_divergence" or "cu_seqlens" not in arguments:
        raise ValueError(
            f"{who}: DTensors are not taken, got {names(arguments)}: give to_local() where the "
            "tokens are sharded, and as normalizer what global_normalizer() counts"
        )
    layout, local = localized(who, arguments)
    dims = reduced_dims(arguments, layout)
    each_token = who in _EACH_TOKEN or arguments.get("reduction") == "none"
    if each_token or who in _MOMENTS:
        return _distributed(function(**local), layout, [] if each_token else dims, [])
    over = layout.over(dims)
    if not over:
        return _distributed(function(**local), layout, dims, over)
    require_targets(function, local, layout, dims)
    results = share_of_whole(function, local, layout, dims)
    if arguments.get("return_stats") and slices_of(local, layout, dims):
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

    input = a["input"]
    if a["target"].is_floating_point():
        raise ValueError("cross_entropy: class probabilities are not taken with DTensors, got them")
    names_of = {"logits": "input", "class_weight": "weight"}
    with speaking_for("cross_entropy", "masked_cross_entropy", names_of):
        return masked_cross_entropy(
            input.movedim(1, -1) if input.dim() > 2 else input, a["target"], a["mask"],
            reduction=a["reduction"], ignore_index=a["ignore_index"], class_weight=a["weight"],
            label_smoothing=a["label_smoothing"],
        )  # fmt: skip


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
    return added_up(result)
