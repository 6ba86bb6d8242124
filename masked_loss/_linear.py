# SPDX-License-Identifier: BSD-3-Clause
"""linear_cross_entropy as PyTorch sees it: checks, operators, fakes, autograd and autocast.

What the operators compute is in _linear_chunks.py; what a loss means to its caller, in linear.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from masked_loss import _checks, _ops
from masked_loss._checks import checked, register_fake
from masked_loss._linear_chunks import Options, dweight_dtype, run_chunks, scaled_by, unit_of
from masked_loss._ops import ops

_WHO = "linear_cross_entropy"
_library = torch.library.Library("masked_loss", "FRAGMENT")

_FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_PUBLIC = (
    "(Tensor hidden, Tensor weight, Tensor target, Tensor? mask=None, *, Tensor? bias=None, "
    'str reduction="mean", Tensor? normalizer=None, int ignore_index=-100, '
    "Tensor? class_weight=None, float label_smoothing=0.0, float z_loss=0.0, "
    "float? softcap=None, bool shift=False, int? chunk_tokens=None, "
    "ScalarType? accumulation_dtype=None, bool pack=True) -> "
)
_library.define(f"linear_cross_entropy{_PUBLIC}Tensor")
_library.define(f"linear_cross_entropy_stats{_PUBLIC}(Tensor loss, Tensor stats)")
_library.define(
    "linear_cross_entropy_forward(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, "
    "Tensor? mask, Tensor? normalizer, Tensor? class_weight, str reduction, int ignore_index, "
    "float label_smoothing, float z_loss, float? softcap, bool shift, bool stats, "
    "int? chunk_tokens, ScalarType? accumulation_dtype, bool pack, bool[3] needs) -> "
    "(Tensor loss, Tensor stats, Tensor tokens, Tensor groups, Tensor unit, Tensor dhidden, "
    "Tensor dweight, Tensor dbias)"
)
_library.define(
    "linear_cross_entropy_backward(Tensor dloss, Tensor hidden, Tensor weight, Tensor? bias, "
    "Tensor target, Tensor tokens, Tensor groups, Tensor? class_weight, float label_smoothing, "
    "float z_loss, float? softcap, bool shift, int? chunk_tokens, ScalarType? accumulation_dtype, "
    "bool pack, bool[3] needs) -> (Tensor dhidden, Tensor dweight, Tensor dbias)"
)


def _check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    chunk_tokens: int | None,
    accumulation_dtype: torch.dtype | None,
) -> None:
    def shape(what: str, x: Tensor, *expected: int | str) -> None:
        fits = x.dim() == len(expected) and all(
            isinstance(n, str) or n == size for n, size in zip(expected, x.shape, strict=True)
        )
        if not fits:
            wanted = ", ".join(map(str, expected))
            raise ValueError(f"{_WHO}: {what} must have shape [{wanted}], got {list(x.shape)}")

    if hidden.dtype not in _FLOATING:
        raise TypeError(
            f"{_WHO}: hidden must be float64, float32, bfloat16 or float16, got {_name(hidden)}"
        )
    if hidden.dim() == 0:
        raise ValueError(f"{_WHO}: hidden must have shape [..., D], got []")
    shape("weight", weight, "V", hidden.shape[-1])
    shape("target", target, *hidden.shape[:-1])
    if weight.shape[0] == 0:
        raise ValueError(f"{_WHO}: weight must have at least one class, got {list(weight.shape)}")
    if bias is not None:
        shape("bias", bias, weight.shape[0])
    for what, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.dtype != hidden.dtype:
            raise TypeError(f"{_WHO}: {what} must be {_name(hidden)} like hidden, got {_name(x)}")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"{_WHO}: chunk_tokens must be at least 1, got {chunk_tokens}")
    if accumulation_dtype not in (None, weight.dtype, _ops._loss_dtype(weight)):
        raise ValueError(
            f"{_WHO}: accumulation_dtype must be {_ops._loss_dtype(weight)} or that of weight, "
            f"{weight.dtype}, got {accumulation_dtype}"
        )


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def _kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """What runs inside an operator is neither differentiated nor autocast."""

    def kernel(*args: Any) -> Any:
        with _ops._below_autograd(), torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return function(*args)

    return kernel


@_kernel
def _forward_kernel(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    mask: Tensor | None,
    normalizer: Tensor | None,
    class_weight: Tensor | None,
    *args: Any,
) -> tuple[Tensor, ...]:
    options, needs = Options(*args[:-1]), args[-1]
    _check(hidden, weight, bias, target, options.chunk_tokens, options.accumulation_dtype)
    wide = hidden.dtype == torch.float64
    tokens, groups = ops.linear_weigh.default(
        target, mask, normalizer, class_weight, options.reduction, options.ignore_index,
        weight.shape[0], *options.formula, wide, options.shift, options.stats,
    )  # fmt: skip
    tokens[1:].zero_()
    unit = unit_of(hidden, tokens, groups, None) if any(needs) else None
    gradients = run_chunks(
        hidden, weight, bias, target, tokens, groups, class_weight, options, needs, unit, True
    )
    loss, stats = ops.linear_reduce.default(
        tokens, groups, target, options.reduction, options.z_loss, options.stats
    )
    unit = tokens.new_ones(()) if unit is None else unit
    return loss, stats, tokens, groups, unit, *gradients


def _forward_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    mask: Tensor | None,
    normalizer: Tensor | None,
    class_weight: Tensor | None,
    *args: Any,
) -> tuple[Tensor, ...]:
    options, needs = Options(*args[:-1]), args[-1]
    _check(hidden, weight, bias, target, options.chunk_tokens, options.accumulation_dtype)
    wide = hidden.dtype == torch.float64
    tokens, groups = _weigh_fake(
        target, mask, normalizer, class_weight, options.reduction, options.ignore_index,
        weight.shape[0], *options.formula, wide, options.shift, options.stats,
    )  # fmt: skip
    results = _reduce_fake(tokens, groups, target, options.reduction, 0.0, options.stats)
    dtype = dweight_dtype(weight, target.numel(), options.chunk_tokens, options.accumulation_dtype)
    gradients = _fake_gradients(hidden, weight, needs, dtype)
    return *results, tokens, groups, tokens.new_empty(()), *gradients


def _fake_gradients(
    hidden: Tensor, weight: Tensor, needs: list[bool], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    wide = _ops._loss_dtype(weight)
    return (
        hidden.new_empty(hidden.shape if needs[0] else (0,)),
        torch.empty_like(weight, dtype=dtype) if needs[1] else weight.new_empty((0,)),
        weight.new_empty((weight.shape[0] if needs[2] else 0,), dtype=wide),
    )


@_kernel
def _backward_kernel(
    dloss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    tokens: Tensor,
    groups: Tensor,
    class_weight: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    shift: bool,
    chunk_tokens: int | None,
    accumulation_dtype: torch.dtype | None,
    pack: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    options = Options(
        "none", 0, label_smoothing, z_loss, softcap, shift, False, chunk_tokens,
        accumulation_dtype, pack,
    )  # fmt: skip
    dloss = dloss.reshape(-1) if dloss.dim() else dloss
    unit = unit_of(hidden, tokens, groups, dloss)
    scaled = dloss if unit is None else dloss * unit
    gradients = run_chunks(
        hidden, weight, bias, target, tokens, groups, class_weight, options, needs, scaled, False
    )
    factor = tokens.new_ones(()) if unit is None else 1 / unit
    dhidden, dweight, dbias = (scaled_by(g, factor, hidden.dtype, True) for g in gradients)
    return dhidden, dweight, dbias


def _backward_fake(
    dloss: Tensor, hidden: Tensor, weight: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dhidden, dweight, dbias = _fake_gradients(hidden, weight, args[-1], weight.dtype)
    return dhidden, dweight, dbias.to(weight.dtype)


for _name_of_op, _run_op, _fake_op in (
    ("linear_cross_entropy_forward", _forward_kernel, _forward_fake),
    ("linear_cross_entropy_backward", _backward_kernel, _backward_fake),
):
    _overload = getattr(ops, _name_of_op).default
    _library.impl(_name_of_op, checked(_overload, _run_op), "CompositeExplicitAutograd")
    register_fake(_overload, _fake_op)
    torch.library.register_vmap(_overload, _ops._loop(_overload))


# How they are differentiated


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    mask: Tensor | None,
    normalizer: Tensor | None,
    class_weight: Tensor | None,
    options: Options,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    with _ops._below_autograd():
        result: tuple[Tensor, ...] = ops.linear_cross_entropy_forward.default(
            hidden, weight, bias, target, mask, normalizer, class_weight, *options, needs
        )
    return result


def _path_to(x: Tensor | None) -> Tensor | None:
    """A tensor without x's memory whose gradient is x's: where second derivatives are refused."""
    with torch.enable_grad():
        return x[:0].sum() if x is not None and _ops.may_require_grad(x) else None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, target, mask, _, class_weight, ctx.options, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
    again = ctx.options.reduction == "none"  # or else the gradients are there
    ctx.inputs = () if again else tuple(map(_path_to, (hidden, weight, bias)))
    wants_mask = _ops.may_require_grad(mask)
    ctx.save_for_backward(
        *((hidden, weight, bias) if again else (None, None, None)),
        target,
        mask if wants_mask else None,
        class_weight,
        *output[2:],
    )


def _backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * 9
    hidden, weight, bias, target, mask, class_weight, *tables = ctx.saved_tensors
    tokens, groups, unit, *gradients = tables
    needs = list(ctx.needs_input_grad[:3])
    options = ctx.options
    dmask = None
    with _ops._below_autograd():
        if ctx.needs_input_grad[4]:
            dmask = ops.mask_grad.default(
                dloss, mask, tokens, groups, target, class_weight, options.z_loss
            )
        if any(needs) and options.reduction == "none":
            gradients = ops.linear_cross_entropy_backward.default(
                dloss, hidden, weight, bias, target, tokens, groups, class_weight,
                *options.formula, options.shift, *options[-3:], needs,
            )  # fmt: skip
        elif any(needs):
            reuse = _ops._are_plain(dloss, tokens) and not _ops._keeps_graph()
            factor = dloss / unit
            gradients = [
                scaled_by(gradient, factor, dtype, reuse) if needed else None
                for gradient, dtype, needed in zip(gradients, ctx.dtypes, needs, strict=True)
            ]
    results = [
        gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)
    ]
    return *results, None, dmask, None, None, None, None


LinearCrossEntropy = _ops.differentiable(
    "LinearCrossEntropy", _forward, _setup_context, _backward, results=2
)
"""Scalar reductions have their gradients, for dloss = 1, from forward, and only scale them in
backward. With "none" every token may have a dloss of its own: backward computes the logits again.
"""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    mask: Tensor | None,
    normalizer: Tensor | None,
    class_weight: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """loss and stats, with autograd and autocast."""
    if not hidden.is_meta and torch.is_autocast_enabled(hidden.device.type):
        hidden, weight = _autocast(hidden), _autocast(weight)
        bias = None if bias is None else _autocast(bias)
    inputs = (hidden, weight, bias)
    args = (*inputs, target, mask, normalizer, class_weight, options)
    if not _ops._differentiated(*inputs, mask):
        loss, stats, *_ = _forward(*args, [False] * 3)
    else:
        scalar = options.reduction != "none"
        needs = [scalar and _ops.may_require_grad(x) for x in inputs]
        loss, stats, *_ = LinearCrossEntropy(*args, needs)
    return loss, stats


def _autocast(x: Tensor) -> Tensor:
    """As ``F.linear`` under autocast: everything but float64 in the lower precision."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if x.dtype in _FLOATING[1:] else x


def _public(call: Callable[..., Any], stats: bool) -> Callable[..., Any]:
    """``call`` takes the arguments in forward's order; the public operators take them by name."""

    def operator(
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        mask: Tensor | None = None,
        *,
        bias: Tensor | None = None,
        reduction: str = "mean",
        normalizer: Tensor | None = None,
        ignore_index: int = -100,
        class_weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        shift: bool = False,
        chunk_tokens: int | None = None,
        accumulation_dtype: torch.dtype | None = None,
        pack: bool = True,
    ) -> Any:
        options = Options(
            reduction, ignore_index, label_smoothing, z_loss, softcap, shift, stats,
            chunk_tokens, accumulation_dtype, pack,
        )  # fmt: skip
        loss, statistics, *_ = call(
            hidden, weight, bias, target, mask, normalizer, class_weight, options
        )
        return (loss, statistics) if stats else loss

    return operator


def _flat(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options one by one, and no gradient."""
    return lambda *args: function(*args[:-1], *args[-1], [False] * 3)


def _redispatch_autocast(op: Any, hidden: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
    if kwargs.get("bias") is not None:
        kwargs["bias"] = _autocast(kwargs["bias"])
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
        return op(_autocast(hidden), _autocast(weight), *args, **kwargs)


for _name_of_op, _stats in (("linear_cross_entropy", False), ("linear_cross_entropy_stats", True)):
    _overload = getattr(ops, _name_of_op).default
    register_fake(_overload, _public(_flat(_forward_fake), _stats))
    _run_op = checked(_overload, _public(_flat(_forward_kernel), _stats))
    _library.impl(_name_of_op, _run_op, "CompositeExplicitAutograd")
    _library.impl(_name_of_op, _public(linear_cross_entropy, _stats), "Autograd")
    for _key in ("AutocastCPU", "AutocastCUDA"):
        _library.impl(_name_of_op, partial(_redispatch_autocast, _overload), _key)


# What the kernels above are made of


def _weigh_fake(
    target: Tensor,
    mask: Tensor | None,
    normalizer: Tensor | None,
    class_weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    classes: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    wide: bool,
    shift: bool,
    stats: bool,
) -> tuple[Tensor, Tensor]:
    _checks.formula(_WHO, label_smoothing, z_loss, softcap)
    _checks.weights(_WHO, target, mask, normalizer, class_weight, reduction, classes, shift)
    values = target.new_empty((*target.shape, 1), dtype=torch.float64 if wide else torch.float32)
    _, _, tokens, groups = _ops._fake_tables(values, reduction, stats)
    return tokens, groups


def _reduce_fake(
    tokens: Tensor, groups: Tensor, target: Tensor, reduction: str, z_loss: float, stats: bool
) -> tuple[Tensor, Tensor]:
    return (
        tokens.new_empty(target.shape if reduction == "none" else ()),
        tokens.new_empty((_ops._STATS if stats else 0,)),
    )


register_fake(ops.linear_weigh.default, _weigh_fake)
register_fake(ops.linear_chunk.default, lambda *_: None)
register_fake(ops.linear_reduce.default, _reduce_fake)
