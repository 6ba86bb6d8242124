# SPDX-License-Identifier: BSD-3-Clause
"""What the public functions do to their arguments and errors, beyond csrc/ops/check.h."""

from __future__ import annotations

import builtins
import numbers
import re
from typing import Any

import torch
from torch import Tensor

from masked_loss._checks import FLOATING

_CHECK = re.compile(r"(ValueError|TypeError|IndexError|RuntimeError): \w+: ([^\n]*)")
_SCHEMA = re.compile(
    r"Expected a value of type '(.+?)' for argument '(\w+)' but instead found type '(.+?)'"
)


def name_of(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def widened(x: Tensor) -> Tensor:
    """In what losses are computed: half types in float32."""
    return x if x.dtype == torch.float64 else x.float()


def typed(who: str, error: RuntimeError, names: dict[str, str] | None = None) -> Exception:
    """The error that a check in csrc/ops/check.h, or an operator's schema, means.

    C++ can raise a RuntimeError only, and knows the operator that was called, not the function;
    ``names`` are those of the operator's arguments that the function calls otherwise.
    """
    if found := _CHECK.match(str(error)):
        text = found[2]
        for name, other in (names or {}).items():
            text = re.sub(rf"\b{name}\b", other, text)
        return getattr(builtins, found[1])(f"{who}: {text}")
    if found := _SCHEMA.search(str(error)):
        return TypeError(f"{who}: {found[2]} must be {found[1]}, got {found[3]}")
    return error


def require_tensor(who: str, what: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{who}: {what} must be a tensor, got {type(value).__name__}")


def require_floating(who: str, what: str, value: Any) -> None:
    require_tensor(who, what, value)
    if value.dtype not in FLOATING:
        raise TypeError(
            f"{who}: {what} must be float64, float32, bfloat16 or float16, got {name_of(value)}"
        )


def require_mask(who: str, mask: Tensor | None, shape: torch.Size, like: Tensor) -> None:
    """As csrc/ops/check.h does it, for what has no kernel."""
    if mask is None:
        return
    require_tensor(who, "mask", mask)
    if mask.is_complex():
        raise TypeError(f"{who}: mask must be bool, integer or floating, got {name_of(mask)}")
    if mask.shape != shape:
        raise ValueError(f"{who}: mask must have shape {list(shape)}, got {list(mask.shape)}")
    if mask.device != like.device:
        raise ValueError(f"{who}: mask must be on the device {like.device}, got {mask.device}")


def require_constant(who: str, what: str, value: Tensor | None) -> None:
    if value is None:
        return
    require_tensor(who, what, value)
    if value.requires_grad:
        raise ValueError(f"{who}: {what} is not differentiable, got one that requires grad")


def divisor_of(who: str, normalizer: float | Tensor | None, like: Tensor) -> Tensor | None:
    """The normalizer as the operators take it."""
    if normalizer is None:
        return None
    if isinstance(normalizer, Tensor):
        require_constant(who, "normalizer", normalizer)
        return normalizer
    number: object = normalizer
    if not isinstance(number, numbers.Real):  # numpy's too
        raise TypeError(
            f"{who}: normalizer must be a number or a 0-dim tensor, got {type(number).__name__}"
        )
    return like.new_full((), float(number), dtype=torch.float64)


def require_temperature(
    who: str, what: str, value: float | Tensor | None, tokens: torch.Size
) -> None:
    """A number above 0, or a constant for each token; what a tensor holds is not looked at."""
    if value is None:
        return
    if isinstance(value, Tensor):
        require_constant(who, what, value)
        try:
            fits = torch.broadcast_shapes(value.shape, tokens) == tokens
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"{who}: {what} must be a number or broadcast to {list(tokens)}, "
                f"got {list(value.shape)}"
            )
        return
    number: object = value
    if not isinstance(number, numbers.Real):  # numpy's too
        raise TypeError(f"{who}: {what} must be a number or a tensor, got {type(number).__name__}")
    if not 0 < float(number) < float("inf"):
        raise ValueError(f"{who}: {what} must be above 0 and finite, got {number}")
