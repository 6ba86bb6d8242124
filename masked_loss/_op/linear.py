# SPDX-License-Identifier: BSD-3-Clause
"""linear_cross_entropy and linear_cross_entropy_stats: the loss of logits that nobody holds.

Scalar reductions have their gradients, for dloss = 1, from forward, and only scale them in
backward. With "none" every token may have a dloss of its own: backward computes the logits again.
How the chunks are computed is in linear_chunks.py.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from masked_loss._op import checks, tables
from masked_loss._op.autograd import (
    Formulas,
    Inputs,
    differentiable,
    is_differentiated,
    keeps_graph,
    may_require_grad,
)
from masked_loss._op.checks import checked
from masked_loss._op.factory import (
    AUTOCAST,
    Operator,
    Signature,
    batch_by_loop,
    fake,
    fake_nothing,
    kernel,
    library,
    record,
)
from masked_loss._op.linear_chunks import (
    Head,
    Rows,
    dweight_dtype,
    run_chunks,
    scaled_by,
    unit_of,
)
from masked_loss._op.tables import ops
from masked_loss.options import Chunking, Meaning

_WHO = "linear_cross_entropy"
INPUTS = (
    "hidden", "weight", "bias", "target", "mask", "normalizer", "class_weight", "cu_seqlens",
    "temperatures",
)  # fmt: skip
_FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class How(NamedTuple):
    meaning: Meaning
    stats: bool
    chunking: Chunking
    needs: list[bool]  # the gradients that forward computes: of hidden, weight and bias
    dtype: torch.dtype  # of these three


def _call(stats: bool, inputs: Inputs, meaning: Meaning, **chunking: Any) -> tuple[Tensor, ...]:
    """loss and stats, with autograd and autocast."""
    hidden, weight, bias, _, mask, *_ = inputs
    if not hidden.is_meta and torch.is_autocast_enabled(hidden.device.type):
        inputs = (*map(_autocast, inputs[:3]), *inputs[3:])
        hidden, weight, bias, *_ = inputs
    how = How(meaning, stats, Chunking(**chunking), [False] * 3, hidden.dtype)
    if not is_differentiated(hidden, weight, bias, mask):
        loss, statistics, *_ = _forward(inputs, how)
    else:
        if meaning.reduction != "none":
            how = how._replace(needs=[may_require_grad(x) for x in (hidden, weight, bias)])
        loss, statistics, *_ = _linear_cross_entropy(*inputs, how)
    return loss, statistics


def _autocast(x: Tensor | None) -> Tensor | None:
    """As ``F.linear`` under autocast: everything but float64 in the lower precision."""
    if x is None or x.dtype not in _FLOATING[1:]:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def _forward(inputs: Inputs, how: How) -> tuple[Tensor, ...]:
    return ops.linear_cross_entropy_forward.default(
        *inputs, how.stats, *how.chunking, how.needs, *how.meaning
    )


def _save(inputs: Inputs, outputs: tuple[Tensor, ...], how: How) -> Inputs:
    hidden, weight, bias, target, mask, _, class_weight, _, temperatures = inputs
    _, _, *rest = outputs
    head = [hidden, weight, bias]
    if how.meaning.reduction != "none":  # their gradients are there, and need them no more
        head = [_path_to(x) for x in head]
    kept = mask if may_require_grad(mask) else None
    return (*head, target, kept, class_weight, temperatures, *rest)


def _path_to(x: Tensor | None) -> Tensor | None:
    """A tensor without x's memory whose gradient is x's: where second derivatives are refused."""
    with torch.enable_grad():
        return x[:0].sum() if x is not None and may_require_grad(x) else None


def _backward(
    saved: Inputs, how: How, upstream: Inputs, needs: tuple[bool, ...], plain: bool
) -> Inputs:
    hidden, weight, bias, target, mask, class_weight, temperatures, *computed = saved
    tokens, groups, unit, *gradients = computed
    (dloss,) = upstream
    needs_head, (_, needs_mask, *_) = list(needs[:3]), needs[3:]
    meaning = how.meaning
    dmask = None
    if needs_mask:
        dmask = ops.mask_grad.default(
            dloss, mask, tokens, groups, target, class_weight, meaning.z_loss, False
        )
    if any(needs_head) and meaning.reduction == "none":
        gradients = ops.linear_cross_entropy_backward.default(
            dloss, hidden, weight, bias, target, tokens, groups, class_weight, temperatures,
            *how.chunking, needs_head, *meaning,
        )  # fmt: skip
    elif any(needs_head):
        reuse = plain and not keeps_graph()
        factor = dloss / unit
        gradients = [
            scaled_by(gradient, factor, how.dtype, reuse) if needed else None
            for gradient, needed in zip(gradients, needs_head, strict=True)
        ]
    dhidden, dweight, dbias = (
        gradient if needed else None for gradient, needed in zip(gradients, needs_head, strict=True)
    )
    return dhidden, dweight, dbias, None, dmask, None, None, None, None


_linear_cross_entropy = differentiable(
    Formulas("LinearCrossEntropy", _forward, _save, _backward, results=2)
)


# The operators' kernels


@kernel
def _public_kernel(
    stats: bool, inputs: Inputs, meaning: Meaning, **chunking: Any
) -> tuple[Tensor, ...]:
    how = How(meaning, stats, Chunking(**chunking), [False] * 3, inputs[0].dtype)
    return _run_forward(inputs, how)


@kernel
def _forward_kernel(*args: Any) -> tuple[Tensor, ...]:
    a = _forward_arguments.bind(args, {})
    how = How(record(Meaning, a), a.stats, record(Chunking, a), a.needs, a.hidden.dtype)
    return _run_forward(tuple(getattr(a, name) for name in INPUTS), how)


def _run_forward(inputs: Inputs, how: How) -> tuple[Tensor, ...]:
    *head_of, target, mask, normalizer, class_weight, cu_seqlens, temperatures = inputs
    meaning = how.meaning
    head = Head(*head_of)
    hidden, weight, _ = head
    _check(head, target, how.chunking)
    checks.temperatures(_WHO, temperatures, target.shape)
    tokens, groups = ops.weigh.default(
        target, mask, normalizer, class_weight, cu_seqlens, weight.shape[0],
        hidden.dtype == torch.float64, how.stats, *meaning,
    )  # fmt: skip
    tables.clear_results(tokens)
    unit = unit_of(hidden, tokens, groups, None) if any(how.needs) else None
    rows = Rows(target, tokens, groups, class_weight, temperatures, unit)
    gradients = run_chunks(head, rows, how.meaning, how.chunking, how.needs, forward=True)
    loss, stats = ops.reduce.default(tokens, groups, target, how.stats, *meaning)
    unit = tokens.new_ones(()) if unit is None else unit
    return loss, stats, tokens, groups, unit, *gradients


@kernel
def _backward_kernel(*args: Any) -> tuple[Tensor, ...]:
    a = _backward_arguments.bind(args, {})
    head = Head(a.hidden, a.weight, a.bias)
    dloss = a.dloss.reshape(-1) if a.dloss.dim() else a.dloss
    unit = unit_of(a.hidden, a.tokens, a.groups, dloss)
    scaled = dloss if unit is None else dloss * unit
    rows = Rows(a.target, a.tokens, a.groups, a.class_weight, a.temperatures, scaled)
    gradients = run_chunks(
        head, rows, record(Meaning, a), record(Chunking, a), a.needs, forward=False
    )
    factor = a.tokens.new_ones(()) if unit is None else 1 / unit
    return tuple(scaled_by(g, factor, a.hidden.dtype, True) for g in gradients)


def _check(head: Head, target: Tensor, chunking: Chunking) -> None:
    hidden, weight, bias = head
    chunk_tokens, accumulation_dtype = chunking.chunk_tokens, chunking.accumulation_dtype

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
    if accumulation_dtype not in (None, weight.dtype, tables.loss_dtype(weight)):
        raise ValueError(
            f"{_WHO}: accumulation_dtype must be {tables.loss_dtype(weight)} or that of weight, "
            f"{weight.dtype}, got {accumulation_dtype}"
        )


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


# Their fakes


def _fake(a: SimpleNamespace, stats: bool, needs: list[bool]) -> tuple[Tensor, ...]:
    chunking = record(Chunking, a)
    _check(Head(a.hidden, a.weight, a.bias), a.target, chunking)
    checks.temperatures(_WHO, a.temperatures, a.target.shape)
    tokens, groups = _fake_tables(a, a.weight.shape[0], a.hidden.dtype == torch.float64, stats)
    dtype = dweight_dtype(a.weight, a.target.numel(), chunking)
    return (
        tables.fake_loss(tokens, a.reduction, a.target.shape),
        tables.fake_stats(tokens, stats),
        tokens,
        groups,
        tokens.new_empty(()),
        *_fake_gradients(a, needs, dtype, tables.loss_dtype(a.weight)),
    )


def _fake_tables(
    a: SimpleNamespace, classes: int, wide: bool, stats: bool
) -> tuple[Tensor, Tensor]:
    checks.formula(_WHO, a)
    checks.weights(
        _WHO, a.target, a.mask, a.normalizer, a.class_weight, a.reduction, classes, a.shift
    )
    checks.cu_seqlens(_WHO, a.cu_seqlens)
    like = a.target.new_empty((), dtype=torch.float64 if wide else torch.float32)
    fields = tables.TOKEN_FIELDS if stats else tables.SAVED
    return (
        tables.fake_tokens(like, fields, a.target.shape),
        tables.fake_groups(like, a.reduction, a.target.shape, a.cu_seqlens),
    )


def _fake_gradients(
    a: SimpleNamespace, needs: list[bool], of_weight: torch.dtype, of_bias: torch.dtype
) -> tuple[Tensor, ...]:
    needs_hidden, needs_weight, needs_bias = needs
    return (
        a.hidden.new_empty(a.hidden.shape if needs_hidden else (0,)),
        torch.empty_like(a.weight, dtype=of_weight) if needs_weight else a.weight.new_empty((0,)),
        a.weight.new_empty((a.weight.shape[0] if needs_bias else 0,), dtype=of_bias),
    )


fake("linear_cross_entropy")(lambda a: _fake(a, False, [False] * 3))
fake("linear_cross_entropy_stats")(lambda a: _fake(a, True, [False] * 3))
fake("linear_cross_entropy_forward")(lambda a: _fake(a, a.stats, a.needs))
fake("linear_cross_entropy_backward")(
    lambda a: _fake_gradients(a, a.needs, a.weight.dtype, a.weight.dtype)
)


fake("weigh")(lambda a: _fake_tables(a, a.classes, a.wide, a.stats))


@fake("reduce")
def _fake_reduce(a: SimpleNamespace) -> tuple[Tensor, ...]:
    return (
        tables.fake_loss(a.tokens, a.reduction, a.target.shape),
        tables.fake_stats(a.tokens, a.stats),
    )


fake_nothing("rows")

_forward_arguments = Signature("linear_cross_entropy_forward")
_backward_arguments = Signature("linear_cross_entropy_backward")
for _name_of, _run in (("forward", _forward_kernel), ("backward", _backward_kernel)):
    _overload = getattr(ops, f"linear_cross_entropy_{_name_of}").default
    library.impl(_overload._opname, checked(_overload, _run), "CompositeExplicitAutograd")
batch_by_loop("linear_cross_entropy_forward", "linear_cross_entropy_backward")

linear_cross_entropy, linear_cross_entropy_stats = (
    Operator(name, INPUTS, partial(_call, stats), partial(_public_kernel, stats))
    for name, stats in (("linear_cross_entropy", False), ("linear_cross_entropy_stats", True))
)


def _redispatch_autocast(op: Any, hidden: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
    if kwargs.get("bias") is not None:
        kwargs["bias"] = _autocast(kwargs["bias"])
    with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
        return op(_autocast(hidden), _autocast(weight), *args, **kwargs)


for _operator in (ops.linear_cross_entropy, ops.linear_cross_entropy_stats):
    for _key in ("AutocastCPU", "AutocastCUDA"):
        library.impl(
            _operator.default.name(), partial(_redispatch_autocast, _operator.default), _key
        )
