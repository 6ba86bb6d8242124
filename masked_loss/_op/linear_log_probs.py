# SPDX-License-Identifier: BSD-3-Clause
"""linear_token_log_probs and linear_token_log_probs_entropy: of logits that nobody holds.

Forward does not know the upstream gradients of its tokens: backward computes the logits again.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch import Tensor

from masked_loss import reference
from masked_loss._op import checks, exchange, log_probs
from masked_loss._op.autograd import Inputs, is_differentiated, is_traced
from masked_loss._op.batching import batch_by_loop
from masked_loss._op.derivatives import Formulas, differentiable
from masked_loss._op.factory import Operator, fake, implement, kernel, record
from masked_loss._op.linear_chunks import (
    Head,
    Places,
    Source,
    autocast_head,
    cast_under_autocast,
    dense_logits,
    fake_gradients,
    run_chunks,
    scaled_by,
    take,
    unit_for,
)
from masked_loss._op.log_probs import check_weights, fake_weights
from masked_loss._op.log_probs import merged as log_probs_of
from masked_loss._op.tables import LOG_PROB_FIELDS, log_prob_fields, ops
from masked_loss.options import ALL_CLASSES, Chunking, Scoring, Shards

_WHO = "linear_token_log_probs"
INPUTS = ("hidden", "weight", "bias", "target", "mask", "cu_seqlens", "temperatures")


class How(NamedTuple):
    scoring: Scoring
    entropy: bool
    chunking: Chunking
    shards: Shards = ALL_CLASSES

    @property
    def of_rows(self) -> Scoring:
        """Of rows that are there one by one: the shift is taken care of."""
        return self.scoring._replace(shift=False)


def _call(entropy: bool, inputs: Inputs, scoring: Scoring, **computed: Any) -> tuple[Tensor, ...]:
    inputs = autocast_head(inputs, 3)
    hidden, weight, bias, target, mask, *more = inputs
    if mask is not None and mask.requires_grad:  # it selects
        inputs = hidden, weight, bias, target, mask.detach(), *more
    a = SimpleNamespace(**computed)
    how = How(scoring, entropy, record(Chunking, a), record(Shards, a))
    if not is_differentiated(hidden, weight, bias):
        return _forward(inputs, how)[: 1 + entropy]
    return (_with_entropy if entropy else _without_entropy)(*inputs, how)


def _forward(inputs: Inputs, how: How) -> tuple[Tensor, ...]:
    """log_probs, perhaps the entropy; the table of tokens, and which of them are computed."""
    if how.shards.bounds and not is_traced(*inputs):
        results = _run_forward(inputs, how)
    else:
        results = ops.linear_token_log_probs_forward.default(
            *inputs, how.entropy, *how.chunking, *how.shards, *how.scoring
        )
    log_probs, entropy, *rest = results
    return (log_probs, entropy, *rest) if how.entropy else (log_probs, *rest)


def _save(inputs: Inputs, outputs: tuple[Tensor, ...], how: How) -> Inputs:
    hidden, weight, bias, target, _, *more = inputs
    *_, tokens, weights = outputs
    return hidden, weight, bias, target, None, *more, tokens, weights


def _backward(
    saved: Inputs, how: How, upstream: Inputs, needs: tuple[bool, ...], plain: bool
) -> Inputs:
    *head, target, _, _, temperatures, tokens, weights = saved
    dlog_probs, *dentropy = upstream
    if dlog_probs is None:
        dlog_probs = tokens.new_zeros(target.shape)
    needs_head = list(needs[:3])
    backward: Any = ops.linear_token_log_probs_backward.default
    if how.shards.bounds and not is_traced(*saved, *upstream):
        backward = _run_backward
    gradients = backward(
        dlog_probs, *(dentropy or [None]), *head, target, temperatures, tokens, weights,
        *how.chunking, needs_head, *how.shards, *how.scoring,
    )  # fmt: skip
    results = (g if need else None for g, need in zip(gradients, needs_head, strict=True))
    return *results, None, None, None, None


def _reference(saved: Inputs, how: How) -> tuple[Tensor, ...]:
    exchange.require_whole(_WHO, how.shards)
    hidden, weight, bias, target, mask, cu_seqlens, temperatures, *rest = saved
    if rest:
        mask = rest[1].reshape(hidden.shape[:-1])
    scored, shift = target != how.scoring.ignore_index, how.scoring.shift
    if target.dim() == hidden.dim():  # several ids; the entropy is of the token
        scored = scored.any(dim=-1) | how.entropy
    weights = reference.token_weights(hidden, mask, scored, shift, cu_seqlens)
    logits = dense_logits(Head(hidden, weight, bias), weights, shift)
    dense = log_probs.How(how.scoring, how.entropy, False)
    return log_probs.reference_of((logits, target, mask, cu_seqlens, temperatures), dense)


_without_entropy, _with_entropy = (
    differentiable(
        Formulas("LinearTokenLogProbs", _forward, _save, _backward, _reference, results, results)
    )
    for results in (1, 2)
)


# The operators' kernels


@kernel
def _run_forward(inputs: Inputs, how: How) -> tuple[Tensor, ...]:
    hidden, weight, bias, target, mask, cu_seqlens, temperatures = inputs
    scoring, with_entropy, chunking, shards = how
    head = Head(hidden, weight, bias)
    given = zip(INPUTS, inputs, strict=True)
    options = {**scoring._asdict(), **chunking._asdict(), **shards._asdict()}
    _check(SimpleNamespace(**dict(given), **options))
    columns = exchange.columns(shards) if shards.bounds else (0, weight.shape[0])
    keep_ignored = with_entropy and target.dim() == hidden.dim()
    weights = ops.log_probs_weigh.default(
        hidden[..., :1], target, mask, cu_seqlens, columns[1], scoring.ignore_index,
        scoring.shift, keep_ignored,
    )  # fmt: skip
    count = weights.numel()
    ids = target.reshape(count, *target.shape[hidden.dim() - 1 :])
    each = None if temperatures is None else temperatures.reshape(-1)
    log_probs = weights.new_zeros(ids.shape)
    entropy = weights.new_zeros(count if with_entropy else 0)
    tokens = weights.new_zeros(len(log_prob_fields(with_entropy)), count)
    told: list[tuple[Places, Tensor]] = []
    if shards.bounds:
        tokens[LOG_PROB_FIELDS.index("sum")] = weights

    def rows(y: Tensor, at: Places, _: slice) -> Tensor:
        given = None if each is None else take(each, at)
        if shards.bounds:
            table = take(tokens.t(), at).t().contiguous()
            part = ops.token_log_probs_partial.default(
                y, take(ids, at), table, given, with_entropy, *columns, *how.of_rows
            )
            told.append((at, part))
            return y
        values, spread, table = ops.token_log_probs_forward.default(
            y, take(ids, at), take(weights, at), None, given, with_entropy, *how.of_rows
        )
        log_probs[at], tokens[:, at] = values, table
        if with_entropy:
            entropy[at] = spread
        return y

    source = Source(head, weights, scoring.shift, chunking)
    run_chunks(source, count, chunking, [False] * 3, rows, weight.dtype, shards=shards)
    if told:
        part = exchange.together(told, count)
        log_probs, entropy = log_probs_of(part, shards, ids, tokens, with_entropy, scoring)
    shape = target.shape[: hidden.dim() - 1]
    return (
        log_probs.view(target.shape),
        entropy.view(shape) if with_entropy else entropy,
        tokens,
        weights,
    )


def _backward_kernel(a: SimpleNamespace) -> tuple[Tensor, ...]:
    shards = record(Shards, a)
    how = How(record(Scoring, a), a.dentropy is not None, record(Chunking, a), shards)
    backward, columns = ops.token_log_probs_backward_out, tuple[int, ...]()
    if shards.bounds:
        backward, columns = ops.token_log_probs_shard_backward_out, exchange.columns(shards)
    count = a.weights.numel()
    ids = a.target.reshape(count, *a.target.shape[a.hidden.dim() - 1 :])
    each = None if a.temperatures is None else a.temperatures.reshape(-1)
    upstream = a.dlog_probs.reshape(ids.shape)
    spread = None if a.dentropy is None else a.dentropy.reshape(-1)
    total = upstream.abs().sum(-1) if ids.dim() > 1 else upstream
    unit = unit_for(a.hidden, total, spread)
    if unit is not None:
        upstream, spread = upstream * unit, None if spread is None else spread * unit

    def rows(y: Tensor, at: Places, _: slice) -> Tensor:
        backward.default(
            y, take(upstream, at), None if spread is None else take(spread, at), y, take(ids, at),
            take(a.tokens.t(), at).t().contiguous(), None if each is None else take(each, at),
            *columns, *how.of_rows,
        )  # fmt: skip
        return y

    source = Source(Head(a.hidden, a.weight, a.bias), a.weights, a.shift, how.chunking)
    gradients = run_chunks(
        source, count, how.chunking, a.needs, rows, a.weight.dtype, shards=shards
    )
    factor = None if unit is None else 1 / unit
    return tuple(scaled_by(g, factor, a.hidden.dtype, True) for g in gradients)


def _public_kernel(
    entropy: bool, inputs: Inputs, scoring: Scoring, **computed: Any
) -> tuple[Tensor, ...]:
    a = SimpleNamespace(**computed)
    return _run_forward(inputs, How(scoring, entropy, record(Chunking, a), record(Shards, a)))


def _forward_kernel(a: SimpleNamespace) -> tuple[Tensor, ...]:
    how = How(record(Scoring, a), a.entropy, record(Chunking, a), record(Shards, a))
    return _run_forward(tuple(getattr(a, name) for name in INPUTS), how)


# Their fakes


def _check(a: SimpleNamespace) -> None:
    checks.head(_WHO, a.hidden, a.weight, a.bias, classes=not record(Shards, a).bounds)
    checks.chunking(_WHO, a.weight, record(Chunking, a))
    checks.formula(_WHO, a)
    checks.temperatures(_WHO, a.temperatures, a.hidden.shape[:-1])
    a.logits = a.hidden
    check_weights(a)


def _fake(a: SimpleNamespace, entropy: bool) -> tuple[Tensor, ...]:
    _check(a)
    weights = fake_weights(a)
    shape, dtype = a.hidden.shape[:-1], weights.dtype
    return (
        a.hidden.new_empty(a.target.shape, dtype=dtype),
        a.hidden.new_empty(shape if entropy else (0,), dtype=dtype),
        a.hidden.new_empty((len(log_prob_fields(entropy)), *weights.shape), dtype=dtype),
        weights,
    )


fake(_WHO)(lambda a: _fake(a, False))
fake(f"{_WHO}_entropy")(lambda a: _fake(a, True))
fake(f"{_WHO}_forward")(lambda a: _fake(a, a.entropy))


fake(f"{_WHO}_backward")(lambda a: fake_gradients(a, a.needs, a.weight.dtype, a.weight.dtype))

implement(f"{_WHO}_forward", _forward_kernel)
_run_backward = implement(f"{_WHO}_backward", _backward_kernel)
batch_by_loop(f"{_WHO}_forward", f"{_WHO}_backward")

linear_token_log_probs, linear_token_log_probs_entropy = (
    Operator(
        name, INPUTS, partial(_call, entropy), partial(_public_kernel, entropy), Scoring, _check
    )
    for name, entropy in ((_WHO, False), (f"{_WHO}_entropy", True))
)
cast_under_autocast(INPUTS[:3], _WHO, f"{_WHO}_entropy")
