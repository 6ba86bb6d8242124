# SPDX-License-Identifier: BSD-3-Clause
"""The checks of csrc/ops/check.h for tensors that no kernel sees: fakes, and those on ``meta``.

The same texts in the same order; sizes may be symbolic. tests/losses/test_errors.py holds each to
the other. The options, which are no tensors, are checked by C++ here too.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from torch import Tensor

from masked_loss._op.tables import loss_dtype, ops
from masked_loss.options import Chunking, Meaning
from masked_loss.reference import DIVERGENCES

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8)
UNSIGNED = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)
MASKS = (torch.bool, *INTEGERS, *UNSIGNED, *FLOATING)
REDUCTIONS = ("none", "sum", "mean", "sequence_mean")


Names = dict[str, str]
"""What a function calls an operator's arguments, where it has other names for them."""


class _Caller(threading.local):
    def __init__(self) -> None:
        self.who: str | None = None
        self.names: Names = {}


_caller = _Caller()


def speak_for(who: str | None, names: Names) -> None:
    """Lets the next fake complain in the words of the function ``who``.

    Dynamo traces that function and meanwhile calls the fakes of its operators. It calls this too,
    instead of tracing it, by the mark of torch.compiler.assume_constant_result. (To use that one
    would import the compiler.)
    """
    _caller.who, _caller.names = who, names


speak_for._dynamo_marked_constant = True  # type: ignore[attr-defined]


def fail(error: type[Exception], who: str, text: str) -> NoReturn:
    """As an error of C++ arrives: a RuntimeError whose text begins with the type that it means."""
    text = renamed(text, _caller.names)
    raise RuntimeError(f"{error.__name__}: {_caller.who or who}: {text}")


def renamed(text: str, names: Names) -> str:
    for name, other in names.items():
        text = re.sub(rf"\b{name}\b", other, text)
    return text


def checked(op: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` for ``op``, called only if all tensors are on one device.

    That of the first one that is only read: what is written, the caller may not know of.
    """
    arguments = op._schema.arguments
    names = [argument.name for argument in arguments]
    written = [argument.name for argument in arguments if argument.is_write]

    def call(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        tensors = {name: x for name, x in given.items() if isinstance(x, Tensor)}
        first = next(name for name in tensors if name not in written)
        expected = tensors[first].device
        for name, x in tensors.items():
            if x.device != expected:
                text = f"{name} must be on the device of {first}, {expected}, got {x.device}"
                fail(ValueError, op._opname, text)
        return function(*args, **kwargs)

    return call


def register_fake(op: Any, fake: Callable[..., Any]) -> None:
    function = checked(op, fake)

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        finally:
            speak_for(None, {})

    torch.library.register_fake(op._name.partition(".")[0], call)


def cross_entropy(
    who: str,
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None,
    class_weight: Tensor | None,
    shift: bool,
    all_classes: int | None = None,
) -> None:
    """The tensors of a cross entropy, but its normalizer. all_classes: of which logits has some."""
    probabilities = target.dtype in FLOATING
    rows(who, logits, shift and not probabilities)
    if probabilities:
        if shift:
            fail(ValueError, who, "shift needs class indices, got class probabilities")
        same_dtype(who, "a target of class probabilities", target, "logits", logits)
        shape(who, "target", target, logits.shape)
    else:
        class_indices(who, target)
        shape(who, "target", target, logits.shape[:-1])
    if all_classes is None:
        classes(who, logits)
    if class_weight is not None:
        floating(who, "class_weight", class_weight)
        expected = logits.shape[-1:] if all_classes is None else torch.Size([all_classes])
        shape(who, "class_weight", class_weight, expected)
    if mask is not None:
        mask_of(who, mask, logits.shape[:-1])


def rows(who: str, logits: Tensor, shift: bool) -> None:
    floating(who, "logits", logits)
    if logits.dim() == 0:
        fail(ValueError, who, "logits must have shape [..., V], got []")
    if shift and logits.dim() == 1:
        fail(ValueError, who, f"shift needs logits [..., T, V], got {_list(logits)}")


def classes(who: str, logits: Tensor) -> None:
    if logits.shape[-1] == 0 and math.prod(logits.shape[:-1]) > 0:
        fail(ValueError, who, f"logits must have at least one class, got shape {_list(logits)}")


def temperatures(
    who: str, each: Tensor | None, tokens: torch.Size, what: str = "temperatures"
) -> None:
    if each is not None:
        floating(who, what, each)
        shape(who, what, each, tokens)


def weights(
    who: str,
    target: Tensor,
    mask: Tensor | None,
    normalizer: Tensor | None,
    class_weight: Tensor | None,
    name: str,
    classes: int,
    shift: bool,
) -> None:
    """What linear_cross_entropy weighs its tokens by."""
    class_indices(who, target)
    if shift and target.dim() == 0:
        fail(ValueError, who, "shift needs a time dimension, got a scalar target")
    if mask is not None:
        mask_of(who, mask, target.shape)
    reduction(who, name, target.dim(), normalizer)
    if class_weight is not None:
        floating(who, "class_weight", class_weight)
        shape(who, "class_weight", class_weight, torch.Size([classes]))


def divergence_weights(who: str, a: SimpleNamespace, tokens: torch.Size) -> None:
    """What a divergence weighs its tokens by."""
    if a.mask is not None:
        mask_of(who, a.mask, tokens)
    reduction(who, a.reduction, len(tokens), a.normalizer)
    cu_seqlens(who, a.cu_seqlens)


def divergence(who: str, a: SimpleNamespace, tokens: torch.Size) -> None:
    """How it is computed of two rows of logits, student's and teacher's."""
    for name in ("temperature", "teacher_temperature"):
        above_0(who, name, getattr(a, name))
    for name in ("temperatures", "teacher_temperatures"):
        temperatures(who, getattr(a, name), tokens, name)
    for cap in (a.softcap, a.teacher_softcap):
        if cap is not None:
            above_0(who, "softcap", cap)
    kind(who, a.kind, a.beta)


def kind(who: str, name: str, beta: float) -> None:
    """The kinds of a divergence, and their parameter."""
    beta = _hint(beta)
    if name not in DIVERGENCES:
        fail(ValueError, who, f'kind must be one of {", ".join(DIVERGENCES)}, got "{name}"')
    if name == "jsd" and not 0 < beta < 1:
        text = f'beta must be above 0 and below 1 for "jsd", got {beta:g}: it tends to 0 there; '
        fail(
            ValueError,
            who,
            f'{text}the KL divergences are kind="forward_kl" and kind="reverse_kl"',
        )
    if name.startswith("skew") and not 0 <= beta < 1:
        fail(ValueError, who, f'beta must be at least 0 and below 1 for "{name}", got {beta:g}')


def above_0(who: str, what: str, number: float) -> None:
    number = _hint(number)
    if not 0 < number < math.inf:
        fail(ValueError, who, f"{what} must be greater than 0 and finite, got {number:g}")


def formula(who: str, a: SimpleNamespace) -> None:
    """The options among the arguments, by the check of csrc/ops/check.h itself.

    A number that a symbol stands for counts as what it is in the call that is traced.
    """
    given = {name: _hint(getattr(a, name)) for name in Meaning._fields if hasattr(a, name)}
    with torch._C._DisableTorchDispatch():  # no tensor is among them
        ops.check_formula.default(who, **given)


def reduction(who: str, name: str, dims: int, normalizer: Tensor | None) -> None:
    if name not in REDUCTIONS:
        wanted = '"none", "sum", "mean" or "sequence_mean"'
        fail(ValueError, who, f'reduction must be {wanted}, got "{name}"')
    if name == "sequence_mean" and dims == 0:
        fail(ValueError, who, 'reduction="sequence_mean" needs a time dimension, got a scalar')
    if normalizer is not None:
        if name == "none":
            fail(ValueError, who, 'normalizer goes with a reduction, got reduction="none"')
        if normalizer.dim() != 0:
            wanted = "normalizer must be a number or a 0-dim tensor"
            fail(ValueError, who, f"{wanted}, got shape {_list(normalizer)}")


def cu_seqlens(who: str, bounds: Tensor | None) -> None:
    """Its values are checked where they are read."""
    if bounds is None:
        return
    if bounds.dtype not in (torch.int64, torch.int32):
        fail(TypeError, who, f"cu_seqlens must be int64 or int32, got {_name(bounds)}")
    if bounds.dim() != 1 or bounds.numel() == 0:
        fail(ValueError, who, f"cu_seqlens must have shape [S + 1], got {_list(bounds)}")


def head(
    who: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    prefix: str = "",
    classes: bool = True,
) -> None:
    """What makes logits, which only PyTorch's products see; ``classes``: at least one."""
    floating(who, f"{prefix}hidden", hidden)
    if hidden.dim() == 0:
        fail(ValueError, who, f"{prefix}hidden must have shape [..., D], got []")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        wanted = f"{prefix}weight must have shape [V, {hidden.shape[-1]}]"
        fail(ValueError, who, f"{wanted}, got {_list(weight)}")
    if classes and weight.shape[0] == 0:
        wanted = f"{prefix}weight must have at least one class"
        fail(ValueError, who, f"{wanted}, got {_list(weight)}")
    if bias is not None:
        shape(who, f"{prefix}bias", bias, weight.shape[:1])
    for what, x in (("weight", weight), ("bias", bias)):
        if x is not None:
            same_dtype(who, f"{prefix}{what}", x, f"{prefix}hidden", hidden)


def chunking(who: str, weight: Tensor, how: Chunking) -> None:
    if how.chunk_tokens is not None and how.chunk_tokens < 1:
        fail(ValueError, who, f"chunk_tokens must be at least 1, got {how.chunk_tokens}")
    wide = loss_dtype(weight)
    if how.accumulation_dtype not in (None, weight.dtype, wide):
        wanted = f"accumulation_dtype must be {wide} or that of weight, {weight.dtype}"
        fail(ValueError, who, f"{wanted}, got {how.accumulation_dtype}")


def per_sequence(who: str, name: str, dims: int) -> None:
    wanted = "a result for each sequence needs"
    if name not in ("sum", "mean"):
        fail(ValueError, who, f'{wanted} reduction="mean" or "sum", got "{name}"')
    if dims == 0:
        fail(ValueError, who, f"{wanted} a time dimension, got a scalar")


def floating(who: str, what: str, x: Tensor) -> None:
    if x.dtype not in FLOATING:
        wanted = "float64, float32, bfloat16 or float16"
        fail(TypeError, who, f"{what} must be {wanted}, got {_name(x)}")


def class_indices(who: str, target: Tensor) -> None:
    if target.dtype not in (torch.int64, torch.int32):
        wanted = "target must be int64 or int32 class indices"
        fail(TypeError, who, f"{wanted}, got {_name(target)}")


def mask_of(who: str, mask: Tensor, expected: torch.Size) -> None:
    if mask.dtype not in MASKS:
        fail(TypeError, who, f"mask must be bool, integer or floating, got {_name(mask)}")
    shape(who, "mask", mask, expected)


def same_dtype(who: str, what: str, x: Tensor, other: str, expected: Tensor) -> None:
    if x.dtype != expected.dtype:
        text = f"{what} must be {_name(expected)} like {other}, got {_name(x)}"
        fail(TypeError, who, text)


def shape(who: str, what: str, x: Tensor, expected: torch.Size) -> None:
    if x.shape != expected:
        fail(ValueError, who, f"{what} must have shape {_list(expected)}, got {_list(x)}")


def _list(x: Tensor | torch.Size) -> list[int]:
    """Sizes as numbers: those that a symbol stands for in the call that is traced."""
    sizes: Any = x.shape if isinstance(x, Tensor) else x
    return list(map(_hint, sizes))


def _hint(number: Any) -> Any:
    return number.node.hint if isinstance(number, torch.SymInt | torch.SymFloat) else number


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
