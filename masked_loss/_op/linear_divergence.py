# SPDX-License-Identifier: BSD-3-Clause
"""linear_divergence and linear_divergence_stats: of two heads' logits that nobody holds.

Both logits are computed in float32 also for half types: where student and teacher are close, the
rounding of a half type is most of their difference. Scalar reductions have their gradients, for
dloss = 1, from forward; with "none" backward computes the logits again.
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
from masked_loss._op.divergence import FIELDS, SAVED, statistics_of
from masked_loss._op.factory import (
    Operator,
    Signature,
    batch_by_loop,
    fake,
    kernel,
    library,
    record,
)
from masked_loss._op.linear import _autocast
from masked_loss._op.linear_chunks import Head, dweight_dtype, scaled_by, unit_of
from masked_loss._op.linear_rows import Source, check_head, run_rows, take
from masked_loss._op.tables import ops
from masked_loss.options import Chunking, Divergence

_WHO = "linear_divergence"
INPUTS = (
    "hidden", "weight", "bias", "teacher_hidden", "teacher_weight", "teacher_bias", "mask",
    "normalizer", "cu_seqlens", "temperatures", "teacher_temperatures",
)  # fmt: skip

_HEADS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor teacher_hidden, Tensor teacher_weight, "
    "Tensor? teacher_bias"
)
_KIND = (
    "float temperature, float teacher_temperature, str kind, float beta, float? softcap, "
    "float? teacher_softcap, bool shift"
)
_HOW = "int? chunk_tokens, ScalarType? accumulation_dtype, bool pack, bool[3] needs"
_PUBLIC = (
    "(Tensor hidden, Tensor weight, Tensor teacher_hidden, Tensor teacher_weight, "
    "Tensor? mask=None, *, Tensor? bias=None, Tensor? teacher_bias=None, "
    "Tensor? normalizer=None, Tensor? cu_seqlens=None, Tensor? temperatures=None, "
    "Tensor? teacher_temperatures=None, "
    'float temperature=1.0, float teacher_temperature=1.0, str kind="forward_kl", '
    "float beta=0.5, float? softcap=None, float? teacher_softcap=None, bool shift=False, "
    'str reduction="mean", int? chunk_tokens=None, ScalarType? accumulation_dtype=None, '
    "bool pack=True) -> "
)
library.define(f"{_WHO}{_PUBLIC}Tensor")
library.define(f"{_WHO}_stats{_PUBLIC}(Tensor loss, Tensor stats)")
library.define(
    f"{_WHO}_forward({_HEADS}, Tensor? mask, Tensor? normalizer, Tensor? cu_seqlens, "
    f"Tensor? temperatures, Tensor? teacher_temperatures, {_KIND}, str reduction, "
    f"bool stats, {_HOW}) -> "
    "(Tensor loss, Tensor stats, Tensor tokens, Tensor groups, Tensor unit, Tensor dhidden, "
    "Tensor dweight, Tensor dbias)"
)
library.define(
    f"{_WHO}_backward(Tensor dloss, {_HEADS}, Tensor tokens, Tensor groups, "
    f"Tensor? temperatures, Tensor? teacher_temperatures, {_KIND}, {_HOW}) -> "
    "(Tensor dhidden, Tensor dweight, Tensor dbias)"
)


class How(NamedTuple):
    divergence: Divergence
    reduction: str
    stats: bool
    chunking: Chunking
    needs: list[bool]  # the gradients that forward computes: of hidden, weight and bias


def _call(stats: bool, inputs: Inputs, divergence: Divergence, **more: Any) -> tuple[Tensor, ...]:
    """loss and stats, with autograd and autocast."""
    hidden, *_ = inputs
    if not hidden.is_meta and torch.is_autocast_enabled(hidden.device.type):
        inputs = (*map(_autocast, inputs[:6]), *inputs[6:])
    how = _how(stats, divergence, **more)
    if not is_differentiated(*inputs[:3], inputs[6]):
        return _forward(inputs, how)[:2]
    if how.reduction != "none":
        how = how._replace(needs=[may_require_grad(x) for x in inputs[:3]])
    return _linear_divergence(*inputs, how)


def _how(stats: bool, divergence: Divergence, reduction: str, **chunking: Any) -> How:
    return How(divergence, reduction, stats, Chunking(**chunking), [False] * 3)


def _forward(inputs: Inputs, how: How) -> tuple[Tensor, ...]:
    return ops.linear_divergence_forward.default(
        *inputs, *how.divergence, how.reduction, how.stats, *how.chunking, how.needs
    )


def _save(inputs: Inputs, outputs: tuple[Tensor, ...], how: How) -> Inputs:
    *heads, mask, _, _, own, others = inputs
    _, _, *rest = outputs
    return *heads, mask if may_require_grad(mask) else None, own, others, *rest


def _backward(
    saved: Inputs, how: How, upstream: Inputs, needs: tuple[bool, ...], plain: bool
) -> Inputs:
    heads, (mask, own, others, tokens, groups, unit, *gradients) = saved[:6], saved[6:]
    (dloss,) = upstream
    needs_head, needs_mask = list(needs[:3]), needs[6]
    dmask = None
    if needs_mask:
        dmask = ops.mask_grad.default(dloss, mask, tokens, groups, None, None, 0.0, False)
    if any(needs_head) and how.reduction == "none":
        gradients = ops.linear_divergence_backward.default(
            dloss, *heads, tokens, groups, own, others, *how.divergence, *how.chunking, needs_head
        )
    elif any(needs_head):
        reuse = plain and not keeps_graph()
        factor = dloss / unit
        gradients = [
            scaled_by(gradient, factor, x.dtype, reuse) if needed else None
            for gradient, x, needed in zip(gradients, saved, needs_head, strict=False)
        ]
    dhead = (g if needed else None for g, needed in zip(gradients, needs_head, strict=True))
    return *dhead, None, None, None, dmask, None, None, None, None


_linear_divergence = differentiable(
    Formulas("LinearDivergence", _forward, _save, _backward, results=2)
)


# The operators' kernels


@kernel
def _run_forward(inputs: Inputs, how: How) -> tuple[Tensor, ...]:
    *heads, mask, normalizer, cu_seqlens, own, others = inputs
    student, teacher = Head(*heads[:3]), Head(*heads[3:])
    _check(student, teacher, how.chunking)
    like = student.hidden[..., :1]
    tokens, groups = ops.divergence_weigh.default(
        like, mask, normalizer, cu_seqlens, how.reduction, how.divergence.shift, how.stats
    )
    tokens[1:].zero_()
    unit = unit_of(student.hidden, tokens, groups, None) if any(how.needs) else None
    gradients = _run(student, teacher, tokens, groups, unit, own, others, how, forward=True)
    loss, _ = ops.reduce.default(tokens, groups, like[..., 0], False, how.reduction)
    unit = tokens.new_ones(()) if unit is None else unit
    return loss, statistics_of(tokens, how.stats), tokens, groups, unit, *gradients


def _run(
    student: Head,
    teacher: Head,
    tokens: Tensor,
    groups: Tensor,
    dloss: Tensor | None,
    own: Tensor | None,
    others: Tensor | None,
    how: How,
    forward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    weights, count = tables.weights(tokens), tokens.shape[1]
    divergence = how.divergence._replace(shift=False)  # which the sources see to
    wide, gradient = tables.loss_dtype(student.hidden), any(how.needs)
    sources = [Source(h, weights, how.divergence.shift, how.chunking) for h in (student, teacher)]
    by_token = tokens.t()

    def at_tokens(x: Tensor | None, at: Any) -> Tensor | None:
        return x if x is None or x.dim() == 0 else take(x.reshape(-1), at)

    def rows(y: Tensor, at: Any, chunk: slice) -> Tensor:
        _, z = sources[1].logits(chunk)
        table = take(by_token, at).t().contiguous()
        groups_at = groups
        if groups.shape[0] > 1:
            numbers = at
            if isinstance(at, slice):
                numbers = torch.arange(at.start, at.stop, device=y.device)
            groups_at = tables.groups_at(groups, numbers, count)
        ops.divergence_rows.default(
            table, y, z, groups_at, at_tokens(dloss, at), y if gradient else None,
            at_tokens(own, at), at_tokens(others, at), *divergence, forward, False,
        )  # fmt: skip
        if forward:
            by_token[at] = table.t()
        return y.to(student.hidden.dtype) if gradient else y

    return run_rows(
        sources[0], count, how.chunking, how.needs, rows, wide,
        lambda size: sources[1].allocate(size, wide),
    )  # fmt: skip


def _check(student: Head, teacher: Head, chunking: Chunking) -> None:
    check_head(_WHO, student, chunking)
    check_head(_WHO, teacher, Chunking(), "teacher_")
    for what, theirs, ours in (
        ("teacher_hidden", teacher.hidden.shape[:-1], student.hidden.shape[:-1]),
        ("teacher_weight", teacher.weight.shape[:1], student.weight.shape[:1]),
    ):
        if theirs != ours:
            raise RuntimeError(
                f"ValueError: {_WHO}: {what} must have shape {list(ours)} and a width, "
                f"got {list(theirs)} and a width"
            )


@kernel
def _backward_kernel(*args: Any) -> tuple[Tensor, ...]:
    a = _backward_arguments.bind(args, {})
    student = Head(a.hidden, a.weight, a.bias)
    teacher = Head(a.teacher_hidden, a.teacher_weight, a.teacher_bias)
    dloss = a.dloss.reshape(-1) if a.dloss.dim() else a.dloss
    unit = unit_of(a.hidden, a.tokens, a.groups, dloss)
    scaled = dloss if unit is None else dloss * unit
    how = How(record(Divergence, a), "none", False, record(Chunking, a), a.needs)
    gradients = _run(
        student, teacher, a.tokens, a.groups, scaled, a.temperatures, a.teacher_temperatures, how,
        forward=False,
    )  # fmt: skip
    factor = a.tokens.new_ones(()) if unit is None else 1 / unit
    return tuple(scaled_by(g, factor, a.hidden.dtype, True) for g in gradients)


def _public_kernel(
    stats: bool, inputs: Inputs, divergence: Divergence, **more: Any
) -> tuple[Tensor, ...]:
    return _run_forward(inputs, _how(stats, divergence, **more))


def _forward_kernel(*args: Any) -> tuple[Tensor, ...]:
    a = _forward_arguments.bind(args, {})
    how = How(record(Divergence, a), a.reduction, a.stats, record(Chunking, a), a.needs)
    return _run_forward(tuple(getattr(a, name) for name in INPUTS), how)


# Their fakes


def _fake(a: SimpleNamespace, stats: bool, needs: list[bool]) -> tuple[Tensor, ...]:
    chunking = record(Chunking, a)
    student = Head(a.hidden, a.weight, a.bias)
    _check(student, Head(a.teacher_hidden, a.teacher_weight, a.teacher_bias), chunking)
    shape, wide = a.hidden.shape[:-1], tables.loss_dtype(a.hidden)
    checks.reduction(_WHO, a.reduction, len(shape), a.normalizer)
    checks.cu_seqlens(_WHO, a.cu_seqlens)
    tokens = tables.fake_tokens(a.hidden, FIELDS if stats else SAVED, shape)
    return (
        tables.fake_loss(a.hidden, a.reduction, shape),
        tables.fake_stats(a.hidden, stats, count=5),
        tokens,
        tables.fake_groups(a.hidden, a.reduction, shape, a.cu_seqlens),
        tokens.new_empty(()),
        *_fake_gradients(a, needs, dweight_dtype(a.weight, tokens.shape[1], chunking), wide),
    )


def _fake_gradients(
    a: SimpleNamespace, needs: list[bool], of_weight: torch.dtype, of_bias: torch.dtype
) -> tuple[Tensor, ...]:
    needs_hidden, needs_weight, needs_bias = needs
    return (
        a.hidden.new_empty(a.hidden.shape if needs_hidden else (0,)),
        torch.empty_like(a.weight, dtype=of_weight)
        if needs_weight
        else a.weight.new_empty((0,), dtype=of_weight),
        a.weight.new_empty((a.weight.shape[0] if needs_bias else 0,), dtype=of_bias),
    )


fake(_WHO)(lambda a: _fake(a, False, [False] * 3))
fake(f"{_WHO}_stats")(lambda a: _fake(a, True, [False] * 3))
fake(f"{_WHO}_forward")(lambda a: _fake(a, a.stats, a.needs))
fake(f"{_WHO}_backward")(lambda a: _fake_gradients(a, a.needs, a.weight.dtype, a.weight.dtype))

_forward_arguments = Signature(f"{_WHO}_forward")
_backward_arguments = Signature(f"{_WHO}_backward")
for _name, _kernel in (("forward", _forward_kernel), ("backward", _backward_kernel)):
    _overload = getattr(ops, f"{_WHO}_{_name}").default
    library.impl(_overload._opname, checked(_overload, _kernel), "CompositeExplicitAutograd")
batch_by_loop(f"{_WHO}_forward", f"{_WHO}_backward")

linear_divergence, linear_divergence_stats = (
    Operator(name, INPUTS, partial(_call, stats), partial(_public_kernel, stats), Divergence)
    for name, stats in ((_WHO, False), (f"{_WHO}_stats", True))
)
