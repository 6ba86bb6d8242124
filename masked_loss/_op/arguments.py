# SPDX-License-Identifier: BSD-3-Clause
"""What the public functions ask of their arguments, and their errors, in their own words.

csrc/ops/check.h checks what both devices can check. C++ can raise a RuntimeError only, and knows
the operator, not the function; here its text becomes the error that the function documents.
"""

from __future__ import annotations

import builtins
import math
import numbers
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from masked_loss._op import checks
from masked_loss._op.checks import FLOATING, Names, renamed
from masked_loss._op.tables import loss_dtype

_CHECK = re.compile(r"(ValueError|TypeError|IndexError|RuntimeError): \w+: ([^\n]*)")
_SCHEMA = re.compile(
    r"Expected a value of type '(.+?)' for argument '(\w+)' but instead found type '(.+?)'"
)


def typed_error(
    who: str, error: RuntimeError, names: Names, tensors: dict[str, Tensor | None]
) -> Exception:
    """The error that a check in C++, or an operator's schema, means."""
    if found := _CHECK.match(str(error)):
        text = renamed(found[2] + _hint(found[2], tensors), names)
        return getattr(builtins, found[1])(f"{who}: {text}")
    if found := _SCHEMA.search(str(error)):
        name = names.get(found[2], found[2])
        return TypeError(f"{who}: {name} must be {found[1]}, got {found[3]}")
    if "CUDA out of memory" in str(error):  # of what C++ allocates: as PyTorch raises it
        return torch.OutOfMemoryError(str(error))
    try:
        require_local(who, **{names.get(name, name): x for name, x in tensors.items()})
    except ValueError as better:  # than "mixed torch.Tensor and DTensor", "no sharding strategy"
        return better
    return error


@contextmanager
def speaking_for(who: str, function: str, names: Names) -> Iterator[None]:
    """Errors of ``function``, which ``who`` calls with its own arguments, in words of ``who``."""
    try:
        yield
    except (IndexError, TypeError, ValueError) as error:
        raise type(error)(renamed(str(error), {function: who, **names})) from None


def _hint(text: str, tensors: dict[str, Tensor | None]) -> str:
    """What to do about a shape that a known mistake explains."""
    target, mask = tensors.get("target"), tensors.get("mask")
    values, logits = tensors.get("values"), tensors.get("logits")
    hidden, weight = tensors.get("hidden"), tensors.get("weight")
    tokens, classes = torch.Size(), torch.Size()
    if logits is not None:
        tokens, classes = logits.shape[:-1], logits.shape[-1:]
    elif hidden is not None and weight is not None:
        tokens, classes = hidden.shape[:-1], weight.shape[:1]
    elif values is not None:
        tokens = values.shape
    if text.startswith("mask must have shape") and mask is not None:
        return mask_hint(mask, tokens)
    if text.startswith("target must have shape") and target is not None:
        if target.shape == (*tokens, *classes):
            return ": of one-hot rows the class indices are target.argmax(-1)"
        return reshape_hint("target", target, tokens)
    return ""


def mask_hint(mask: Tensor, tokens: torch.Size) -> str:
    if mask.shape == (*tokens, 1):
        return ": the weight of each token, without a dimension for classes: mask.squeeze(-1)"
    return reshape_hint("mask", mask, tokens)


def reshape_hint(what: str, x: Tensor, tokens: Sequence[int]) -> str:
    """Not of as many dimensions: those of a transposed one are in another order."""
    if x.dim() == len(tokens) or x.numel() != math.prod(tokens):
        return ""
    return f": flattened as the rest is: {what}.reshape({list(tokens)})"


def require_local(who: str, **tensors: Any) -> None:
    distributed = [name for name, x in tensors.items() if is_distributed(x)]
    if distributed:
        raise ValueError(
            f"{who}: {', '.join(distributed)} must be a local tensor, as the others are, got a "
            "DTensor: give to_local() of it, or logits, target and mask as DTensors to the "
            "functions of masked_loss"
        )


def is_distributed(x: Any) -> bool:
    """Whether it is a DTensor, of which ``has_torch_function`` does not tell; without an import."""
    return type(x).__name__ == "DTensor"


def require_tensor(who: str, what: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{who}: {what} must be a tensor, got {type(value).__name__}")


def require_tensors(who: str, required: dict[str, Any], optional: dict[str, Any]) -> None:
    for what, value in required.items():
        require_tensor(who, what, value)
    for what, value in optional.items():
        if value is not None:
            require_tensor(who, what, value)


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
    if mask.dtype not in checks.MASKS:
        raise TypeError(f"{who}: mask must be bool, integer or floating, got {name_of(mask)}")
    if mask.shape != shape:
        text = f"mask must have shape {list(shape)}, got {list(mask.shape)}"
        raise ValueError(f"{who}: {text}{mask_hint(mask, shape)}")
    require_device(who, "mask", mask, like)


def require_device(who: str, what: str, value: Tensor, like: Tensor) -> None:
    if value.device != like.device:
        raise ValueError(f"{who}: {what} must be on the device {like.device}, got {value.device}")


def require_kind(who: str, kind: str, beta: Any) -> None:
    """Of a divergence, for what has no kernel."""
    if isinstance(beta, Tensor):
        require_constant(who, "beta", beta)
    else:
        require_number(who, "beta", beta)
    try:
        checks.kind(who, kind, beta)
    except RuntimeError as error:
        raise typed_error(who, error, {}, {}) from None


def require_constant(who: str, what: str, value: Tensor | None) -> None:
    if value is None:
        return
    require_tensor(who, what, value)
    if value.requires_grad:
        raise ValueError(f"{who}: {what} is not differentiable, got one that requires grad")


def require_bool(who: str, **values: Any) -> None:
    """A number in a bool's place is a mistake (shift=2 does not shift by 2)."""
    for what, value in values.items():
        if value is not True and value is not False:
            raise TypeError(f"{who}: {what} must be True or False, got {value!r}")


def require_int(who: str, what: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):  # numpy's too
        raise TypeError(f"{who}: {what} must be int, got {type(value).__name__}")


def require_number(who: str, what: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{who}: {what} must be a number, got {type(value).__name__}")


def require_dtype(who: str, what: str, value: Any) -> None:
    if value is not None and not isinstance(value, torch.dtype):
        raise TypeError(f"{who}: {what} must be a torch.dtype, got {value!r}")


def divisor_of(who: str, normalizer: float | Tensor | None, like: Tensor) -> Tensor | None:
    """The normalizer as the operators take it."""
    if normalizer is None:
        return None
    if isinstance(normalizer, Tensor):
        require_constant(who, "normalizer", normalizer)
        if normalizer.is_complex():
            raise TypeError(f"{who}: normalizer must be real, got {name_of(normalizer)}")
        return normalizer.to(torch.float64, copy=True)  # the caller's may count on before backward
    number: object = normalizer
    if not isinstance(number, numbers.Real):  # numpy's too
        raise TypeError(
            f"{who}: normalizer must be a number or a 0-dim tensor, got {type(number).__name__}"
        )
    return like.new_full((), float(number), dtype=torch.float64)


def temperatures_of(
    who: str, what: str, value: float | Tensor, tokens: torch.Size, like: Tensor
) -> tuple[float, Tensor | None]:
    """As the operators take it: one number above 0, or one for each token, not looked at."""
    if type(value) is float and 0 < value < math.inf:  # without the abstract classes' long way
        return value, None
    if isinstance(value, Tensor):
        require_constant(who, what, value)
        if value.is_complex():
            raise TypeError(f"{who}: {what} must be real, got {name_of(value)}")
        pairs = zip(reversed(value.shape), reversed(tokens), strict=False)
        if value.dim() > len(tokens) or any(n not in (1, size) for n, size in pairs):
            raise ValueError(
                f"{who}: {what} must be a number or broadcast to {list(tokens)}, "
                f"got {list(value.shape)}"
            )
        require_device(who, what, value, like)
        return 1.0, value.to(loss_dtype(like)).expand(tokens)
    number: object = value
    if not isinstance(number, numbers.Real):  # numpy's too
        raise TypeError(f"{who}: {what} must be a number or a tensor, got {type(number).__name__}")
    if not 0 < float(number) < math.inf:
        wanted = f"{what} must be greater than 0 and finite"
        raise ValueError(f"{who}: {wanted}, got {float(number):g}")
    return float(number), None


def name_of(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
