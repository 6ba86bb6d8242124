# SPDX-License-Identifier: BSD-3-Clause
"""linear_token_log_probs and linear_token_log_probs_entropy: of logits that nobody holds.

Forward does not know the upstream gradients of its tokens: backward computes the logits again.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from masked_loss._op.autograd import Formulas, Inputs, differentiable, is_differentiated
from masked_loss._op.checks import checked
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
from masked_loss._op.linear_chunks import Head, scaled_by
from masked_loss._op.linear_rows import Source, check_head, run_rows, take, unit_for
from masked_loss._op.log_probs import fake_weights
from masked_loss._op.tables import ops
from masked_loss.options import Chunking, Scoring

_WHO = "linear_token_log_probs"
INPUTS = ("hidden", "weight", "bias", "target", "mask", "cu_seqlens", "temperatures")

_OPTIONS = "float temperature, int ignore_index, float? softcap, bool shift, bool entropy"
_CHUNKING = "int? chunk_tokens, ScalarType? accumulation_dtype, bool pack"
_PUBLIC = (
    "(Tensor hidden, Tensor weight, Tensor target, Tensor? mask=None, *, Tensor? bias=None, "
    "Tensor? cu_seqlens=None, Tensor? temperatures=None, float temperature=1.0, "
    "int ignore_index=-100, float? softcap=None, bool shift=False, int? chunk_tokens=None, "
    "ScalarType? accumulation_dtype=None, bool pack=True) -> "
)
library.define(f"{_WHO}{_PUBLIC}Tensor")
library.define(f"{_WHO}_entropy{_PUBLIC}(Tensor log_probs, Tensor entropy)")
library.define(
    f"{_WHO}_forward(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? mask, "
    f"Tensor? cu_seqlens, Tensor? temperatures, {_OPTIONS}, {_CHUNKING}) -> "
    "(Tensor log_probs, Tensor entropy, Tensor tokens, Tensor weights)"
)
library.define(
    f"{_WHO}_backward(Tensor dlog_probs, Tensor? dentropy, Tensor hidden, Tensor weight, "
    "Tensor? bias, Tensor target, Tensor? temperatures, Tensor tokens, Tensor weights, "
    f"{_OPTIONS}, {_CHUNKING}, bool[3] needs) -> (Tensor dhidden, Tensor dweight, Tensor dbias)"
)


class Options(NamedTuple):
    temperature: float
    ignore_index: int
    softcap: float | None
    shift: bool
    entropy: bool

    @property
    def of_rows(self) -> tuple[float, int, float | None, bool]:
        """Of rows that are there one by one: the shift is taken care of."""
        return self.temperature, self.ignore_index, self.softcap, False


class How(NamedTuple):
    options: Options
    chunking: Chunking


def _call(entropy: bool, inputs: Inputs, scoring: Scoring, **chunking: Any) -> tuple[Tensor, ...]:
    hidden, *_ = inputs
    if not hidden.is_meta and torch.is_autocast_enabled(hidden.device.type):
        inputs = (*map(_autocast, inputs[:3]), *inputs[3:])
    options = Options(*scoring, entropy)
    how = How(options, Chunking(**chunking))
    if not is_differentiated(*inputs[:3]):
        return _forward(inputs, how)[: 1 + entropy]
    return (_with_entropy if entropy else _without_entropy)(*inputs, how)


def _forward(inputs: Inputs, how: How) -> tuple[Tensor, ...]:
    """log_probs, perhaps the entropy; the table of tokens, and which of them are computed."""
    results = ops.linear_token_log_probs_forward.default(*inputs, *how.options, *how.chunking)
    log_probs, entropy, *rest = results
    return (log_probs, entropy, *rest) if how.options.entropy else (log_probs, *rest)


def _save(inputs: Inputs, outputs: tuple[Tensor, ...], how: How) -> Inputs:
    hidden, weight, bias, target, _, _, temperatures = inputs
    return hidden, weight, bias, target, temperatures, *outputs[-2:]


def _backward(
    saved: Inputs, how: How, upstream: Inputs, needs: tuple[bool, ...], plain: bool
) -> Inputs:
    target, tokens = saved[3], saved[5]
    dlog_probs, *dentropy = upstream
    if dlog_probs is None:
        dlog_probs = tokens.new_zeros(target.shape)
    needs_head = list(needs[:3])
    gradients = ops.linear_token_log_probs_backward.default(
        dlog_probs, *(dentropy or [None]), *saved, *how.options, *how.chunking, needs_head
    )
    results = (g if need else None for g, need in zip(gradients, needs_head, strict=True))
    return *results, None, None, None, None


_without_entropy, _with_entropy = (
    differentiable(Formulas("LinearTokenLogProbs", _forward, _save, _backward, results, results))
    for results in (1, 2)
)


# The operators' kernels


@kernel
def _run_forward(inputs: Inputs, how: How) -> tuple[Tensor, ...]:
    hidden, weight, bias, target, mask, cu_seqlens, temperatures = inputs
    options, chunking = how
    head = Head(hidden, weight, bias)
    check_head(_WHO, head, chunking)
    keep_ignored = options.entropy and target.dim() == hidden.dim()
    weights = ops.log_probs_weigh.default(
        hidden[..., :1], target, mask, cu_seqlens, weight.shape[0], options.ignore_index,
        options.shift, keep_ignored,
    )  # fmt: skip
    count = weights.numel()
    ids = target.reshape(count, *target.shape[hidden.dim() - 1 :])
    each = None if temperatures is None else temperatures.reshape(-1)
    log_probs = weights.new_zeros(ids.shape)
    entropy = weights.new_zeros(count if options.entropy else 0)
    tokens = weights.new_zeros(3 if options.entropy else 2, count)

    def rows(y: Tensor, at: Any, _: slice) -> Tensor:
        given = None if each is None else take(each, at)
        values, spread, table = ops.token_log_probs_forward.default(
            y, take(ids, at), take(weights, at), None, given, *options.of_rows, options.entropy
        )
        log_probs[at], tokens[:, at] = values, table
        if options.entropy:
            entropy[at] = spread
        return y

    source = Source(head, weights, options.shift, chunking)
    run_rows(source, count, chunking, [False] * 3, rows, weight.dtype)
    shape = target.shape[: hidden.dim() - 1]
    return (
        log_probs.view(target.shape),
        entropy.view(shape) if options.entropy else entropy,
        tokens,
        weights,
    )


@kernel
def _backward_kernel(*args: Any) -> tuple[Tensor, ...]:
    a = _backward_arguments.bind(args, {})
    options, chunking = record(Options, a), record(Chunking, a)
    count = a.weights.numel()
    ids = a.target.reshape(count, *a.target.shape[a.hidden.dim() - 1 :])
    each = None if a.temperatures is None else a.temperatures.reshape(-1)
    upstream = a.dlog_probs.reshape(ids.shape)
    spread = None if a.dentropy is None else a.dentropy.reshape(-1)
    total = upstream.abs().sum(-1) if ids.dim() > 1 else upstream
    unit = unit_for(a.hidden, total, spread)
    if unit is not None:
        upstream, spread = upstream * unit, None if spread is None else spread * unit

    def rows(y: Tensor, at: Any, _: slice) -> Tensor:
        ops.token_log_probs_backward_out.default(
            y, take(upstream, at), None if spread is None else take(spread, at), y, take(ids, at),
            take(a.tokens.t(), at).t().contiguous(), None if each is None else take(each, at),
            *options.of_rows,
        )  # fmt: skip
        return y

    source = Source(Head(a.hidden, a.weight, a.bias), a.weights, options.shift, chunking)
    gradients = run_rows(source, count, chunking, a.needs, rows, a.weight.dtype)
    factor = a.weights.new_ones(()) if unit is None else 1 / unit
    return tuple(scaled_by(g, factor, a.hidden.dtype, True) for g in gradients)


def _public_kernel(
    entropy: bool, inputs: Inputs, scoring: Scoring, **chunking: Any
) -> tuple[Tensor, ...]:
    options = Options(*scoring, entropy)
    return _run_forward(inputs, How(options, Chunking(**chunking)))


def _forward_kernel(*args: Any) -> tuple[Tensor, ...]:
    a = _forward_arguments.bind(args, {})
    how = How(record(Options, a), record(Chunking, a))
    return _run_forward(tuple(getattr(a, name) for name in INPUTS), how)


# Their fakes


def _fake(a: SimpleNamespace, entropy: bool) -> tuple[Tensor, ...]:
    check_head(_WHO, Head(a.hidden, a.weight, a.bias), record(Chunking, a))
    a.logits = a.hidden
    weights = fake_weights(a)
    shape, dtype = a.hidden.shape[:-1], weights.dtype
    return (
        a.hidden.new_empty(a.target.shape, dtype=dtype),
        a.hidden.new_empty(shape if entropy else (0,), dtype=dtype),
        a.hidden.new_empty((3 if entropy else 2, *weights.shape), dtype=dtype),
        weights,
    )


fake(_WHO)(lambda a: _fake(a, False))
fake(f"{_WHO}_entropy")(lambda a: _fake(a, True))
fake(f"{_WHO}_forward")(lambda a: _fake(a, a.entropy))


@fake(f"{_WHO}_backward")
def _fake_backward(a: SimpleNamespace) -> tuple[Tensor, ...]:
    needs_hidden, needs_weight, needs_bias = a.needs
    return (
        a.hidden.new_empty(a.hidden.shape if needs_hidden else (0,)),
        torch.empty_like(a.weight) if needs_weight else a.weight.new_empty((0,)),
        a.weight.new_empty((a.weight.shape[0] if needs_bias else 0,)),
    )


_forward_arguments = Signature(f"{_WHO}_forward")
_backward_arguments = Signature(f"{_WHO}_backward")
for _name, _kernel in (("forward", _forward_kernel), ("backward", _backward_kernel)):
    _overload = getattr(ops, f"{_WHO}_{_name}").default
    library.impl(_overload._opname, checked(_overload, _kernel), "CompositeExplicitAutograd")
batch_by_loop(f"{_WHO}_forward", f"{_WHO}_backward")

linear_token_log_probs, linear_token_log_probs_entropy = (
    Operator(name, INPUTS, partial(_call, entropy), partial(_public_kernel, entropy), Scoring)
    for name, entropy in ((_WHO, False), (f"{_WHO}_entropy", True))
)
