# SPDX-License-Identifier: BSD-3-Clause
"""The losses of logits that were not computed, from what the logits are made from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from masked_loss.functional import cross_entropy, masked_cross_entropy
from masked_loss.fuse.parts import Parts
from masked_loss.linear import linear_cross_entropy

LOSSES = frozenset((F.cross_entropy, cross_entropy, masked_cross_entropy))


def fused_loss(
    parts: Parts, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[], Any] | None:
    """What computes ``func(logits, *args, **kwargs)``, None where the arguments need logits."""
    last = parts.class_dim == -1
    cap = parts.scaling.cap
    if cap is not None and cap <= 0:
        return None
    if abs(parts.scaling.factor) > 1 and parts.hidden.dtype == torch.float16:
        return None  # factor * hidden may overflow where factor * logits does not
    if func is masked_cross_entropy:
        if not last or (cap and kwargs.get("softcap") is not None):
            return None
        target, mask = args  # masked_cross_entropy passes them to __torch_function__ by position
        options = {k: v for k, v in kwargs.items() if k != "inplace_backward"}
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


def _linear_loss(
    parts: Parts, target: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> Tensor | tuple[Any, ...]:
    with torch.autocast(parts.hidden.device.type, enabled=False):
        hidden, bias = _scaled_inputs(parts)
        result: Any = linear_cross_entropy(hidden, parts.weight, target, mask, bias=bias, **options)
    loss, *stats = result if isinstance(result, tuple) else (result,)
    loss = loss.double() if parts.dtype == torch.float64 else loss
    return (loss, *stats) if stats else loss


def _scaled_inputs(parts: Parts) -> tuple[Tensor, Tensor | None]:
    """hidden and bias with the scaling of the logits, and what was added to them."""
    hidden, bias, factor = parts.hidden, parts.bias, parts.scaling.factor
    if factor != 1.0:
        hidden, bias = hidden * factor, None if bias is None else bias * factor
    if parts.offset is not None:
        offset = parts.offset.to(hidden.dtype)
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
