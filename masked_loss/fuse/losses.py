# SPDX-License-Identifier: BSD-3-Clause
"""The losses of logits that were not computed, from what the logits are made from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from masked_loss.functional import cross_entropy, masked_cross_entropy
from masked_loss.fuse.parts import Parts, torch_functions
from masked_loss.linear import linear_cross_entropy

LOSSES = frozenset((F.cross_entropy, cross_entropy, masked_cross_entropy))
_GATHER = torch_functions("gather")
# What takes logits, or their log_softmax, and gives one number a token or less.
REDUCES = LOSSES | {F.nll_loss} | _GATHER | {Tensor.__getitem__}
_NO_INDEX = -(1 << 62)  # an ignore_index that no index is equal to


def fused_loss(
    parts: Parts, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[], Any] | None:
    """What computes ``func(logits, *args, **kwargs)``, None where the arguments need logits."""
    if parts.normalized != (func not in LOSSES):
        return None
    last = parts.class_dim == -1
    cap = parts.scaling.cap
    if cap is not None and cap <= 0:
        return None
    if abs(parts.scaling.factor) > 1 and parts.hidden.dtype == torch.float16:
        return None  # factor * hidden may overflow where factor * logits does not
    if func in _GATHER or func is Tensor.__getitem__:
        pick = _gathered if func in _GATHER else _indexed
        return pick(parts, *args, **kwargs) if last else None
    if func is masked_cross_entropy:
        if not last or (cap and kwargs.get("softcap") is not None):
            return None
        if kwargs.get("vocab") is not None:  # of logits that are some columns already
            return None
        target, mask = args  # masked_cross_entropy passes them to __torch_function__ by position
        options = {k: v for k, v in kwargs.items() if k not in ("inplace_backward", "vocab")}
    else:
        bound = _bind_cross_entropy(args, kwargs)
        if bound is None or (parts.class_dim != 1 if len(parts.shape) > 2 else not last):
            return None
        target, mask, options = bound
        if target.shape != parts.hidden.shape[:-1]:
            return None
    if cap is not None:
        options["softcap"] = cap
    return lambda: _linear_loss(parts, target, mask, options)


def _gathered(parts: Parts, dim: int, index: Tensor, **kwargs: Any) -> Callable[[], Tensor] | None:
    """``log_softmax(...).gather(-1, index)`` of one index a token."""
    tokens = parts.hidden.shape[:-1]
    if kwargs or dim not in (-1, len(tokens)) or index.shape != (*tokens, 1):
        return None
    return lambda: _log_probs(parts, index.squeeze(-1)).unsqueeze(-1)


def _indexed(parts: Parts, index: Any) -> Callable[[], Tensor] | None:
    """``log_softmax(...)[i, ..., k]`` of tensors of indices, one for each dimension."""
    if not isinstance(index, tuple) or len(index) != len(parts.shape):
        return None
    if not all(isinstance(i, Tensor) and i.dtype == torch.int64 for i in index):
        return None

    def computed() -> Tensor:
        *tokens, target = torch.broadcast_tensors(*index)
        chosen = parts._replace(hidden=parts.hidden[tuple(tokens)])
        return _log_probs(chosen, torch.where(target < 0, target + parts.classes, target))

    return computed


def _log_probs(parts: Parts, target: Tensor) -> Tensor:
    """The log-probability of one class a token: minus its cross entropy."""
    cap = {} if parts.scaling.cap is None else {"softcap": parts.scaling.cap}
    loss = _linear_loss(
        parts, target, None, {"reduction": "none", "ignore_index": _NO_INDEX, **cap}
    )
    assert isinstance(loss, Tensor)
    return -loss


def _linear_loss(
    parts: Parts, target: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> Tensor | tuple[Any, ...]:
    split = parts.split
    if split is not None:
        target, mask = split.local(target), split.local(mask)
        options = {name: split.local(x) for name, x in options.items()} | {"vocab": split.shards}
    with torch.autocast(parts.hidden.device.type, enabled=False):
        hidden, bias = _scaled_inputs(parts)
        result: Any = linear_cross_entropy(hidden, parts.weight, target, mask, bias=bias, **options)
    loss, *stats = result if isinstance(result, tuple) else (result,)
    loss = loss.double() if parts.dtype == torch.float64 else loss
    result = (loss, *stats) if stats else loss
    return result if split is None else split.distributed(result)


def _scaled_inputs(parts: Parts) -> tuple[Tensor, Tensor | None]:
    """hidden and bias with the scaling of the logits, and what was added to them."""
    hidden, bias, factor = parts.hidden, parts.bias, parts.scaling.factor
    if factor != 1.0:
        hidden, bias = hidden * factor, None if bias is None else bias * factor
    if parts.offset is not None:
        offset = parts.offset if parts.split is None else parts.split.mine(parts.offset)
        offset = offset.to(hidden.dtype)
        bias = offset if bias is None else bias + offset
    return hidden, bias


def _bind_cross_entropy(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None, dict[str, Any]] | None:
    """target, mask and the keywords of linear_cross_entropy, from those of F.cross_entropy."""
    names = (
        "target", "weight", "size_average", "ignore_index", "reduce", "reduction",
        "label_smoothing",
    )  # fmt: skip
    given = dict(zip(names, args, strict=False)) | kwargs
    average, reduce = given.pop("size_average", None), given.pop("reduce", None)
    if average is not None or reduce is not None:
        given["reduction"] = nn._reduction.legacy_get_string(average, reduce)
    mask, target = given.pop("mask", None), given.pop("target", None)
    given["class_weight"] = given.pop("weight", None)
    if not isinstance(target, Tensor) or target.dtype not in (torch.int64, torch.int32):
        return None
    if given.get("reduction", "mean") not in ("none", "sum", "mean"):
        return None
    return target, mask, given
