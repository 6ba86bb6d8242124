# SPDX-License-Identifier: BSD-3-Clause
"""linear_cross_entropy and linear_cross_entropy_stats: the loss of logits that nobody holds.

Scalar reductions have their gradients, for dloss = 1, from forward, and only scale them in
backward. With "none" every token may have a dloss of its own: backward computes the logits again.
How the chunks are computed is in linear_chunks.py.
"""

from __future__ import annotations

import weakref
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from masked_loss import reference
from masked_loss._op import checks, cross_entropy, exchange, tables
from masked_loss._op.autograd import (
    Inputs,
    is_differentiated,
    is_traced,
    keeps_graph,
    kept_mask,
    may_require_grad,
    transforms_are_active,
)
from masked_loss._op.batching import batch_by_loop
from masked_loss._op.derivatives import Formulas, differentiable
from masked_loss._op.factory import (
    Operator,
    fake,
    fake_nothing,
    implement,
    kernel,
    record,
)
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
from masked_loss.options import ALL_CLASSES, Chunking, Meaning, Shards

_WHO = "linear_cross_entropy"
INPUTS = (
    "hidden", "weight", "bias", "target", "mask", "normalizer", "class_weight", "cu_seqlens",
    "temperatures",
)  # fmt: skip


class Unkept:
    """A tensor that the loss does not keep: a second derivative needs it, a first one does not."""

    def __init__(self, x: Tensor | None) -> None:
        self._tensor = None if x is None else weakref.ref(x)
        self._version = None if x is None or x.is_inference() else x._version

    def get(self, name: str, dtype: torch.dtype) -> Tensor | None:
        if self._tensor is None:
            return None
        x = self._tensor()
        if x is None:
            raise RuntimeError(
                f"{_WHO}: a second derivative needs {name}, which is gone: keep a reference to it "
                'until then, or reduce the result of reduction="none", which keeps it'
            )
        if self._version is not None and x._version != self._version:
            raise RuntimeError(
                f"{_WHO}: a second derivative needs {name}, which has been modified by an inplace "
                "operation since"
            )
        return x.to(dtype)


class How(NamedTuple):
    meaning: Meaning
    stats: bool
    chunking: Chunking
    needs: list[bool]  # the gradients that forward computes: of hidden, weight and bias
    dtype: torch.dtype  # of these three
    head: tuple[Unkept, ...] = ()
    shards: Shards = ALL_CLASSES


def _call(stats: bool, inputs: Inputs, meaning: Meaning, **computed: Any) -> tuple[Tensor, ...]:
    """loss and stats, with autograd and autocast."""
    head = tuple(map(Unkept, inputs[:3])) if meaning.reduction != "none" else ()
    inputs = autocast_head(inputs, 3)
    hidden, weight, bias, _, mask, *_ = inputs
    a = SimpleNamespace(**computed)
    chunking, shards = record(Chunking, a), record(Shards, a)
    how = How(meaning, stats, chunking, [False] * 3, hidden.dtype, head, shards)
    if not is_differentiated(hidden, weight, bias, mask):
        loss, statistics, *_ = _forward(inputs, how)
    else:
        if meaning.reduction != "none":
            how = how._replace(needs=[may_require_grad(x) for x in (hidden, weight, bias)])
        loss, statistics, *_ = _linear_cross_entropy(*inputs, how)
    return loss, statistics


def _forward(inputs: Inputs, how: How) -> tuple[Tensor, ...]:
    if how.shards.bounds and not is_traced(*inputs):
        return _run_sharded(inputs, how)
    return ops.linear_cross_entropy_forward.default(
        *inputs, how.stats, *how.chunking, how.needs, *how.shards, *how.meaning
    )


def _save(inputs: Inputs, outputs: tuple[Tensor, ...], how: How) -> Inputs:
    hidden, weight, bias, target, mask, *more = inputs
    _, _, *rest = outputs
    head = (hidden, weight, bias)
    if how.meaning.reduction != "none" and not transforms_are_active():
        head = (None, None, None)  # their gradients are there
    mask = kept_mask(mask)
    return *head, target, mask, *more, *rest


def _complete(saved: Inputs, how: How) -> Inputs:
    if saved[0] is not None:
        return saved
    names = zip(("hidden", "weight", "bias"), how.head, strict=True)
    return (*(x.get(name, how.dtype) for name, x in names), *saved[3:])


def _reference(saved: Inputs, how: How) -> tuple[Tensor, ...]:
    exchange.require_whole(_WHO, how.shards)
    hidden, weight, bias, target, mask, *more = saved
    (normalizer, class_weight, cu_seqlens, temperatures, *rest), shift = more, how.meaning.shift
    mask = tables.mask_or_weights(mask, rest, target.shape)
    scored = target != how.meaning.ignore_index
    weights = reference.token_weights(hidden, mask, scored, shift, cu_seqlens)
    logits = dense_logits(Head(hidden, weight, bias), weights, shift)
    dense = cross_entropy.How(how.meaning, how.stats and not rest, False, False)
    loss, *stats = cross_entropy.reference_of(
        (logits, target, mask, normalizer, class_weight, cu_seqlens, temperatures), dense
    )
    return loss, *(stats or [tables.fake_stats(loss, False)])


def _backward(
    saved: Inputs, how: How, upstream: Inputs, needs: tuple[bool, ...], plain: bool
) -> Inputs:
    hidden, weight, bias, target, mask, _, class_weight, _, temperatures, *computed = saved
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
        backward: Any = ops.linear_cross_entropy_backward.default
        if how.shards.bounds and not is_traced(*saved, *upstream):
            backward = _run_backward
        gradients = backward(
            dloss, hidden, weight, bias, target, tokens, groups, class_weight, temperatures,
            *how.chunking, needs_head, *how.shards, *meaning,
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
    Formulas(
        "LinearCrossEntropy", _forward, _save, _backward, _reference, results=2, complete=_complete
    )
)


class Rows(NamedTuple):
    """What is known of every token before its logits are."""

    target: Tensor
    tokens: Tensor
    groups: Tensor
    class_weight: Tensor | None
    temperatures: Tensor | None
    dloss: Tensor | None  # None for 1, one value, or one for each token


def _run(head: Head, given: Rows, how: How, forward: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Fills the table of tokens (``forward``), and returns the gradients that are needed."""
    target, dloss = given.target.reshape(-1), given.dloss
    both = TokenTables(given.tokens, given.groups)
    class_weight, temperatures = given.class_weight, given.temperatures
    if class_weight is not None:
        class_weight = class_weight.to(given.tokens.dtype)
    if temperatures is not None:
        temperatures = temperatures.reshape(-1)

    shards, gradient = how.shards, any(how.needs)
    columns = exchange.columns(shards) if shards.bounds else (0, head.weight.shape[0])
    told: list[tuple[Places, Tensor]] = []
    of_rows = how.meaning._replace(shift=False)

    def rows(y: Tensor, at: Places, _: slice) -> Tensor:
        table, groups = both.of(at)
        each = None if temperatures is None else take(temperatures, at)
        saved = (take(target, at), table, groups, class_weight, each)
        upstream = take(dloss, at) if dloss is not None and dloss.dim() else dloss
        here = forward and not shards.bounds
        if forward and not here:
            part = ops.cross_entropy_partial.default(y, *saved, *columns, *of_rows)
            if gradient:
                exchange.merged(ops.cross_entropy_merge, part, shards, *saved, of_rows)
            else:
                told.append((at, part))
        if here or gradient:
            ops.rows.default(y, *saved, upstream, *columns, here, gradient, *of_rows)
        if forward:
            both.write(at, table)
        return y

    source = Source(head, tables.weights(given.tokens), how.meaning.shift, how.chunking)
    count, dtype = target.numel(), head.weight.dtype
    gradients = run_chunks(source, count, how.chunking, how.needs, rows, dtype, shards=shards)
    if told:  # without gradients all tokens together
        part = exchange.together(told, count)
        saved = (target, given.tokens, given.groups, class_weight, None)
        exchange.merged(ops.cross_entropy_merge, part, shards, *saved, of_rows)
    return gradients


# The operators' kernels


@kernel
def _public_kernel(
    stats: bool, inputs: Inputs, meaning: Meaning, **computed: Any
) -> tuple[Tensor, ...]:
    a = SimpleNamespace(**computed)
    chunking, shards = record(Chunking, a), record(Shards, a)
    how = How(meaning, stats, chunking, [False] * 3, inputs[0].dtype, shards=shards)
    return _run_forward(inputs, how)


def _forward_kernel(a: SimpleNamespace) -> tuple[Tensor, ...]:
    how = How(
        record(Meaning, a), a.stats, record(Chunking, a), a.needs, a.hidden.dtype,
        shards=record(Shards, a),
    )  # fmt: skip
    return _run_forward(tuple(getattr(a, name) for name in INPUTS), how)


def _run_forward(inputs: Inputs, how: How) -> tuple[Tensor, ...]:
    *head_of, target, mask, normalizer, class_weight, cu_seqlens, temperatures = inputs
    meaning = how.meaning
    head = Head(*head_of)
    hidden, weight, _ = head
    _check(head, target, temperatures, how.chunking, how.shards)
    tokens, groups = ops.weigh.default(
        target, mask, normalizer, class_weight, cu_seqlens, _classes(weight, how.shards),
        hidden.dtype == torch.float64, how.stats, *meaning,
    )  # fmt: skip
    tables.clear_results(tokens)
    unit = unit_of(hidden, tokens, groups, None) if any(how.needs) else None
    rows = Rows(target, tokens, groups, class_weight, temperatures, unit)
    gradients = _run(head, rows, how, forward=True)
    loss, stats = ops.reduce.default(tokens, groups, target, how.stats, *meaning)
    unit = tokens.new_ones(()) if unit is None else unit
    return loss, stats, tokens, groups, unit, *gradients


_run_sharded = kernel(_run_forward)


def _backward_kernel(a: SimpleNamespace) -> tuple[Tensor, ...]:
    head = Head(a.hidden, a.weight, a.bias)
    dloss = a.dloss.reshape(-1) if a.dloss.dim() else a.dloss
    unit = unit_of(a.hidden, a.tokens, a.groups, dloss)
    scaled = dloss if unit is None else dloss * unit
    rows = Rows(a.target, a.tokens, a.groups, a.class_weight, a.temperatures, scaled)
    how = How(
        record(Meaning, a), False, record(Chunking, a), a.needs, a.hidden.dtype,
        shards=record(Shards, a),
    )  # fmt: skip
    gradients = _run(head, rows, how, forward=False)
    factor = None if unit is None else 1 / unit
    return tuple(scaled_by(g, factor, a.hidden.dtype, True) for g in gradients)


def _classes(weight: Tensor, shards: Shards) -> int:
    return shards.bounds[-1] if shards.bounds else weight.shape[0]


def _check(
    head: Head,
    target: Tensor,
    temperatures: Tensor | None,
    chunking: Chunking,
    shards: Shards,
) -> None:
    checks.head(_WHO, *head, classes=not shards.bounds)
    checks.class_indices(_WHO, target)
    checks.shape(_WHO, "target", target, head.hidden.shape[:-1])
    checks.chunking(_WHO, head.weight, chunking)
    checks.temperatures(_WHO, temperatures, target.shape)


# Their fakes


def _check_all(a: SimpleNamespace) -> None:
    chunking, shards = record(Chunking, a), record(Shards, a)
    _check(Head(a.hidden, a.weight, a.bias), a.target, a.temperatures, chunking, shards)
    _check_weights(a, _classes(a.weight, shards))


def _fake(a: SimpleNamespace, stats: bool, needs: list[bool]) -> tuple[Tensor, ...]:
    _check_all(a)
    chunking, shards = record(Chunking, a), record(Shards, a)
    wide = a.hidden.dtype == torch.float64
    tokens, groups = _fake_tables(a, _classes(a.weight, shards), wide, stats)
    of_logits = a.weight.dtype
    dtype = dweight_dtype(of_logits, a.weight, a.target.numel(), chunking, shards)
    return (
        tables.fake_loss(tokens, a.reduction, a.target.shape),
        tables.fake_stats(tokens, stats),
        tokens,
        groups,
        tokens.new_empty(()),
        *fake_gradients(a, needs, dtype, tables.loss_dtype(a.weight)),
    )


def _check_weights(a: SimpleNamespace, classes: int) -> None:
    checks.formula(_WHO, a)
    checks.weights(
        _WHO, a.target, a.mask, a.normalizer, a.class_weight, a.reduction, classes, a.shift
    )
    checks.cu_seqlens(_WHO, a.cu_seqlens)


def _fake_tables(
    a: SimpleNamespace, classes: int, wide: bool, stats: bool
) -> tuple[Tensor, Tensor]:
    _check_weights(a, classes)
    like = a.target.new_empty((), dtype=torch.float64 if wide else torch.float32)
    fields = tables.TOKEN_FIELDS if stats else tables.SAVED
    return (
        tables.fake_tokens(like, fields, a.target.shape),
        tables.fake_groups(like, a.reduction, a.target.shape, a.cu_seqlens),
    )


fake("linear_cross_entropy")(lambda a: _fake(a, False, [False] * 3))
fake("linear_cross_entropy_stats")(lambda a: _fake(a, True, [False] * 3))
fake("linear_cross_entropy_forward")(lambda a: _fake(a, a.stats, a.needs))
fake("linear_cross_entropy_backward")(
    lambda a: fake_gradients(a, a.needs, a.weight.dtype, a.weight.dtype)
)


fake("weigh")(lambda a: _fake_tables(a, a.classes, a.wide, a.stats))


@fake("reduce")
def _fake_reduce(a: SimpleNamespace) -> tuple[Tensor, ...]:
    return (
        tables.fake_loss(a.tokens, a.reduction, a.target.shape),
        tables.fake_stats(a.tokens, a.stats),
    )


fake_nothing("rows", "scale")

implement("linear_cross_entropy_forward", _forward_kernel)
_run_backward = implement("linear_cross_entropy_backward", _backward_kernel)
batch_by_loop("linear_cross_entropy_forward", "linear_cross_entropy_backward")

linear_cross_entropy, linear_cross_entropy_stats = (
    Operator(name, INPUTS, partial(_call, stats), partial(_public_kernel, stats), check=_check_all)
    for name, stats in (("linear_cross_entropy", False), ("linear_cross_entropy_stats", True))
)
cast_under_autocast(INPUTS[:3], "linear_cross_entropy", "linear_cross_entropy_stats")
