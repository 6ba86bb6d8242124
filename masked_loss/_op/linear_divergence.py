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

from torch import Tensor

from masked_loss import reference
from masked_loss._op import checks, divergence, tables
from masked_loss._op.autograd import (
    Inputs,
    is_differentiated,
    keeps_graph,
    kept_mask,
    may_require_grad,
)
from masked_loss._op.batching import batch_by_loop
from masked_loss._op.derivatives import Formulas, differentiable
from masked_loss._op.divergence import fake_statistics, statistics_of
from masked_loss._op.factory import Operator, fake, implement, kernel, record
from masked_loss._op.linear_chunks import (
    Head,
    Places,
    Source,
    TokenTables,
    autocast_head,
    cast_under_autocast,
    dense_logits,
    dweight_dtype,
    fake_gradients,
    run_chunks,
    scaled_by,
    take,
    unit_of,
)
from masked_loss._op.tables import ops
from masked_loss.options import Chunking, Divergence

_WHO = "linear_divergence"
INPUTS = (
    "hidden", "weight", "bias", "teacher_hidden", "teacher_weight", "teacher_bias", "mask",
    "normalizer", "cu_seqlens", "temperatures", "teacher_temperatures",
)  # fmt: skip


class Pair(NamedTuple):
    """Student and teacher, and the temperatures of their tokens, if each has its own."""

    student: Head
    teacher: Head
    own: Tensor | None
    others: Tensor | None


class How(NamedTuple):
    divergence: Divergence
    reduction: str
    stats: bool
    chunking: Chunking
    needs: list[bool]  # the gradients that forward computes: of hidden, weight and bias


def _call(stats: bool, inputs: Inputs, divergence: Divergence, **more: Any) -> tuple[Tensor, ...]:
    """loss and stats, with autograd and autocast."""
    inputs = autocast_head(inputs, 6)
    hidden, weight, bias, _, _, _, mask, *_ = inputs
    how = _how(stats, divergence, **more)
    if not is_differentiated(hidden, weight, bias, mask):
        return _forward(inputs, how)[:2]
    if how.reduction != "none":
        how = how._replace(needs=[may_require_grad(x) for x in (hidden, weight, bias)])
    return _linear_divergence(*inputs, how)


def _how(stats: bool, divergence: Divergence, reduction: str, **chunking: Any) -> How:
    return How(divergence, reduction, stats, Chunking(**chunking), [False] * 3)


def _forward(inputs: Inputs, how: How) -> tuple[Tensor, ...]:
    return ops.linear_divergence_forward.default(
        *inputs, how.reduction, how.stats, *how.chunking, how.needs, *how.divergence
    )


def _save(inputs: Inputs, outputs: tuple[Tensor, ...], how: How) -> Inputs:
    *heads, mask, normalizer, cu_seqlens, own, others = inputs
    _, _, *rest = outputs
    mask = kept_mask(mask)
    return *heads, mask, normalizer, cu_seqlens, own, others, *rest


def _backward(
    saved: Inputs, how: How, upstream: Inputs, needs: tuple[bool, ...], plain: bool
) -> Inputs:
    hidden, weight, bias, of_hidden, of_weight, of_bias, mask, _, _, *computed = saved
    own, others, tokens, groups, unit, *gradients = computed
    (dloss,) = upstream
    needs_hidden, needs_weight, needs_bias, _, _, _, needs_mask, *_ = needs
    needs_head = [needs_hidden, needs_weight, needs_bias]
    dmask = None
    if needs_mask:
        dmask = ops.mask_grad.default(dloss, mask, tokens, groups, None, None, 0.0, False)
    if any(needs_head) and how.reduction == "none":
        gradients = ops.linear_divergence_backward.default(
            dloss, hidden, weight, bias, of_hidden, of_weight, of_bias, own, others, tokens,
            groups, *how.chunking, needs_head, *how.divergence,
        )  # fmt: skip
    elif any(needs_head):
        reuse = plain and not keeps_graph()
        factor = dloss / unit
        gradients = [
            scaled_by(gradient, factor, hidden.dtype, reuse) if needed else None
            for gradient, needed in zip(gradients, needs_head, strict=True)
        ]
    dhead = (g if needed else None for g, needed in zip(gradients, needs_head, strict=True))
    return *dhead, None, None, None, dmask, None, None, None, None


def _reference(saved: Inputs, how: How) -> tuple[Tensor, ...]:
    heads, (mask, normalizer, cu_seqlens, own, others, *rest) = saved[:6], saved[6:]
    hidden, shift = heads[0], how.divergence.shift
    mask = tables.mask_or_weights(mask, rest, hidden.shape[:-1])
    weights = reference.token_weights(hidden, mask, None, shift, cu_seqlens)
    logits, teacher = (dense_logits(Head(*head), weights, shift) for head in (heads[:3], heads[3:]))
    stats = how.stats and not rest
    dense = divergence.How(how.divergence, how.reduction, stats, False, False)
    loss, *more = divergence.reference_of(
        (logits, teacher, mask, normalizer, cu_seqlens, own, others), dense
    )
    return loss, *(more or [tables.fake_stats(loss, False)])


_linear_divergence = differentiable(
    Formulas("LinearDivergence", _forward, _save, _backward, _reference, results=2)
)


# The operators' kernels


@kernel
def _run_forward(inputs: Inputs, how: How) -> tuple[Tensor, ...]:
    *heads, mask, normalizer, cu_seqlens, own, others = inputs
    hidden, weight, bias, *of_teacher = heads
    student = Head(hidden, weight, bias)
    pair = Pair(student, Head(*of_teacher), own, others)
    given = {**dict(zip(INPUTS, inputs, strict=True)), "reduction": how.reduction}
    _check(SimpleNamespace(**given, **how.divergence._asdict(), **how.chunking._asdict()))
    tokens, groups = ops.divergence_weigh.default(
        hidden, mask, normalizer, cu_seqlens, how.reduction, how.divergence.shift, how.stats
    )
    tables.clear_results(tokens)
    unit = unit_of(hidden, tokens, groups, None) if any(how.needs) else None
    gradients = _run(pair, tokens, groups, unit, how, forward=True)
    like = tables.weights(tokens).view(hidden.shape[:-1])
    loss, _ = ops.reduce.default(tokens, groups, like, False, how.reduction)
    unit = tokens.new_ones(()) if unit is None else unit
    return loss, statistics_of(tokens, how.stats), tokens, groups, unit, *gradients


def _run(
    pair: Pair, tokens: Tensor, groups: Tensor, dloss: Tensor | None, how: How, forward: bool
) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher, *temperatures = pair
    own, others = (x if x is None else x.reshape(-1) for x in temperatures)
    weights, both = tables.weights(tokens), TokenTables(tokens, groups)
    divergence = how.divergence._replace(shift=False)  # which the sources see to
    wide, gradient = tables.loss_dtype(student.hidden), any(how.needs)
    ours, theirs = (
        Source(head, weights, how.divergence.shift, how.chunking) for head in (student, teacher)
    )

    def at_tokens(x: Tensor | None, at: Places) -> Tensor | None:
        return x if x is None or x.dim() == 0 else take(x, at)

    def rows(y: Tensor, at: Places, chunk: slice) -> Tensor:
        _, z = theirs.logits(chunk)
        table, groups_at = both.of(at)
        ops.divergence_rows.default(
            table, y, z, at_tokens(own, at), at_tokens(others, at), groups_at,
            at_tokens(dloss, at), y if gradient else None, forward, False, *divergence,
        )  # fmt: skip
        if forward:
            both.write(at, table)
        return y.to(student.hidden.dtype) if gradient else y

    return run_chunks(
        ours, weights.numel(), how.chunking, how.needs, rows, wide,
        lambda size: theirs.allocate(size, wide),
    )  # fmt: skip


def _check(a: SimpleNamespace) -> None:
    student = Head(a.hidden, a.weight, a.bias)
    teacher = Head(a.teacher_hidden, a.teacher_weight, a.teacher_bias)
    checks.head(_WHO, *student)
    checks.chunking(_WHO, student.weight, record(Chunking, a))
    checks.head(_WHO, *teacher, prefix="teacher_")
    for what, theirs, ours in (
        ("teacher_hidden", teacher.hidden.shape[:-1], student.hidden.shape[:-1]),
        ("teacher_weight", teacher.weight.shape[:1], student.weight.shape[:1]),
    ):
        if theirs != ours:
            text = f"{what} must have shape {list(ours)} and a width"
            checks.fail(ValueError, _WHO, f"{text}, got {list(theirs)} and a width")
    tokens = a.hidden.shape[:-1]
    if a.shift and not tokens:
        checks.fail(ValueError, _WHO, "shift needs hidden [..., T, D], got one token's")
    checks.divergence_weights(_WHO, a, tokens)
    checks.divergence(_WHO, a, tokens)


def _backward_kernel(a: SimpleNamespace) -> tuple[Tensor, ...]:
    teacher = Head(a.teacher_hidden, a.teacher_weight, a.teacher_bias)
    student = Head(a.hidden, a.weight, a.bias)
    pair = Pair(student, teacher, a.temperatures, a.teacher_temperatures)
    dloss = a.dloss.reshape(-1) if a.dloss.dim() else a.dloss
    unit = unit_of(a.hidden, a.tokens, a.groups, dloss)
    scaled = dloss if unit is None else dloss * unit
    how = How(record(Divergence, a), "none", False, record(Chunking, a), a.needs)
    gradients = _run(pair, a.tokens, a.groups, scaled, how, forward=False)
    factor = None if unit is None else 1 / unit
    return tuple(scaled_by(g, factor, a.hidden.dtype, True) for g in gradients)


def _public_kernel(
    stats: bool, inputs: Inputs, divergence: Divergence, **more: Any
) -> tuple[Tensor, ...]:
    return _run_forward(inputs, _how(stats, divergence, **more))


def _forward_kernel(a: SimpleNamespace) -> tuple[Tensor, ...]:
    how = How(record(Divergence, a), a.reduction, a.stats, record(Chunking, a), a.needs)
    return _run_forward(tuple(getattr(a, name) for name in INPUTS), how)


# Their fakes


def _fake(a: SimpleNamespace, stats: bool, needs: list[bool]) -> tuple[Tensor, ...]:
    _check(a)
    chunking = record(Chunking, a)
    shape, wide = a.hidden.shape[:-1], tables.loss_dtype(a.hidden)
    tokens = tables.fake_tokens(a.hidden, tables.divergence_fields(stats), shape)
    of_weight = dweight_dtype(wide, a.weight, tokens.shape[1], chunking)
    return (
        tables.fake_loss(a.hidden, a.reduction, shape),
        fake_statistics(a.hidden, stats),
        tokens,
        tables.fake_groups(a.hidden, a.reduction, shape, a.cu_seqlens),
        tokens.new_empty(()),
        *fake_gradients(a, needs, of_weight, wide),
    )


fake(_WHO)(lambda a: _fake(a, False, [False] * 3))
fake(f"{_WHO}_stats")(lambda a: _fake(a, True, [False] * 3))
fake(f"{_WHO}_forward")(lambda a: _fake(a, a.stats, a.needs))
fake(f"{_WHO}_backward")(lambda a: fake_gradients(a, a.needs, a.weight.dtype, a.weight.dtype))

implement(f"{_WHO}_forward", _forward_kernel)
implement(f"{_WHO}_backward", _backward_kernel)
batch_by_loop(f"{_WHO}_forward", f"{_WHO}_backward")

linear_divergence, linear_divergence_stats = (
    Operator(
        name, INPUTS, partial(_call, stats), partial(_public_kernel, stats), Divergence, _check
    )
    for name, stats in ((_WHO, False), (f"{_WHO}_stats", True))
)
cast_under_autocast(INPUTS[:6], _WHO, f"{_WHO}_stats")
