# SPDX-License-Identifier: BSD-3-Clause
"""Jagged nested tensors: the call on their values, whose sequences their offsets bound.

``[B, j, V]`` logits with ``layout=torch.jagged`` hold the rows of B sequences one after the other,
which is what ``cu_seqlens`` means. So every function is called once more, with plain tensors; what
it then gives for each token has the same offsets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_OF_TOKENS = {
    "logits", "teacher_logits", "hidden", "teacher_hidden", "log_probs", "teacher_log_probs",
    "target", "mask", "values", "temperature", "teacher_temperature",
}  # fmt: skip
"""Arguments whose first dimensions are those of the tokens."""
_OF_ROWS = {"logits", "hidden", "log_probs"}
"""Those whose last dimension is within a token; without one of them, target is a number each."""
_EACH_TOKEN = {
    "token_log_probs": True,
    "linear_token_log_probs": True,
    "masked_whiten": True,
    "masked_moments": False,
    "global_normalizer": False,
}
"""Of functions that know no reduction, whether they have a result for each token."""


def is_jagged(x: Any) -> bool:
    """Or nested in another layout, of which :func:`call` says that it is not taken."""
    return isinstance(x, Tensor) and x.is_nested


def call(function: Callable[..., Any], arguments: dict[str, Any], who: str = "") -> Any:
    """``function`` of arguments by name, of which at least one is nested."""
    who = who or function.__name__
    nested = {name: x for name, x in arguments.items() if is_jagged(x)}
    if "cu_seqlens" not in arguments:
        raise ValueError(
            f"{who}: nested tensors are not taken, got {', '.join(nested)}: functions with "
            "cu_seqlens, as masked_cross_entropy, take them with layout=torch.jagged"
        )
    for name, x in nested.items():
        _require_jagged(who, name, x)
    for name in ("values", "mask", *(() if _OF_ROWS & arguments.keys() else ("target",))):
        # The offsets count tokens, of which the values would be more than one each.
        if name in nested and nested[name].dim() != 2:
            text = f"{name} must be [B, j], a number for each token"
            raise ValueError(f"{who}: {text}, got {_shape(nested[name])}")
    first = next(iter(nested))
    offsets = nested[first].offsets()
    for name, x in nested.items():
        _require_offsets(who, first, offsets, name, x.offsets())
    for name, x in arguments.items():
        if name in _OF_TOKENS and isinstance(x, Tensor) and x.dim() and name not in nested:
            raise ValueError(
                f"{who}: {name} must be jagged like {first}, {_shape(nested[first])}, "
                f"got a tensor {list(x.shape)}"
            )
    if arguments.get("cu_seqlens") is not None:
        raise ValueError(f"{who}: cu_seqlens are the offsets of jagged tensors, got both")
    plain: dict[str, Any] = {name: x.values() for name, x in nested.items()}
    if "inplace_backward" in arguments:  # autograd cannot follow a write below a nested tensor
        plain["inplace_backward"] = False
    if arguments.get("dim") == 1:  # of [B, j]
        plain["dim"] = -1
    knows = "reduction" in arguments
    each_token = arguments["reduction"] == "none" if knows else _EACH_TOKEN[who]
    results = function(**{**arguments, **plain, "cu_seqlens": offsets})
    if not each_token:
        return results
    if isinstance(results, Tensor):
        return torch.nested.nested_tensor_from_jagged(results, offsets)
    return tuple(
        torch.nested.nested_tensor_from_jagged(x, offsets) if isinstance(x, Tensor) else x
        for x in results
    )


def _require_jagged(who: str, name: str, x: Any) -> None:
    if name not in _OF_TOKENS:
        raise ValueError(f"{who}: {name} has nothing for each token, got a nested tensor")
    if x.layout != torch.jagged:
        raise ValueError(
            f"{who}: {name} must be a nested tensor with layout=torch.jagged, got {x.layout}"
        )
    if x.lengths() is not None:
        raise ValueError(
            f"{who}: {name} must be jagged without holes, got one with offsets "
            f"{_numbers(x.offsets())} and lengths {_numbers(x.lengths())}: {name}.contiguous() "
            "has none"
        )
    if x._ragged_idx != 1:
        raise ValueError(
            f"{who}: {name} must be [B, j, ...], one sequence after the other, got "
            f"{_shape(x)} whose dimension {x._ragged_idx} is the jagged one"
        )


def _require_offsets(who: str, first: str, expected: Tensor, name: str, got: Tensor) -> None:
    if got is expected:
        return
    if got.device != expected.device:
        text = f"{name} must be on the device of {first}, {expected.device}, got {got.device}"
        raise ValueError(f"{who}: {text}")
    if expected.shape == got.shape:
        if torch.compiler.is_compiling() or not got.is_cpu:  # which is not waited for
            same = (got == expected).all()
            torch._assert_async(same, f"{who}: {name} must have the offsets of {first}")
            return
        if torch.equal(got, expected):
            return
    raise ValueError(
        f"{who}: {name} must have the offsets of {first}, {_numbers(expected)}, got {_numbers(got)}"
    )


def _numbers(x: Tensor) -> str:
    """A few of them: batches are long."""
    if torch.compiler.is_compiling():
        return "those of another batch"
    numbers = ", ".join(map(str, x[:9].tolist()))
    return f"[{numbers}]" if len(x) < 10 else f"[{numbers}, ..., {int(x[-1])}]"


def _shape(x: Tensor) -> str:
    sizes = ["j" if d == getattr(x, "_ragged_idx", 1) else str(n) for d, n in enumerate(x.shape)]
    return f"[{', '.join(sizes)}]"
