# SPDX-License-Identifier: BSD-3-Clause
"""masked_divergence and masked_divergence_stats: a student's logits against a teacher's."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from masked_loss import reference
from masked_loss._op import checks, tables
from masked_loss._op.autograd import (
    Inputs,
    are_plain,
    below_autograd,
    is_differentiated,
    keeps_graph,
    kept_mask,
)
from masked_loss._op.batching import batch_reduced, batch_rows, weighted
from masked_loss._op.cross_entropy import require_writable
from masked_loss._op.derivatives import Formulas, differentiable
from masked_loss._op.factory import (
    Operator,
    fake,
    fake_like,
    fake_nothing,
    implement,
    kernel,
    record,
)
from masked_loss._op.memory import logits_pool
from masked_loss._op.tables import ops
from masked_loss.options import Divergence

_WHO = "masked_divergence"
INPUTS = (
    "logits", "teacher_logits", "mask", "normalizer", "cu_seqlens", "temperatures",
    "teacher_temperatures",
)  # fmt: skip

# What DivergenceStats sums up, after the weights.
_SUMMED = ("value", "entropy", "teacher_entropy", "agreement")


class How(NamedTuple):
    divergence: Divergence
    reduction: str
    stats: bool
    fused: bool
    """Forward computes the gradient too, for dloss = 1: as for the cross entropy."""
    inplace: bool


def _call(
    stats: bool, inputs: Inputs, divergence: Divergence, *, reduction: str, inplace_backward: bool
) -> tuple[Tensor, ...]:
    """loss, stats if asked for, perhaps more."""
    logits, _, mask, *_ = inputs
    how = How(divergence, reduction, stats, False, False)
    if not is_differentiated(logits, mask):
        return _forward(inputs, how)
    plain = are_plain(*inputs)
    inplace = inplace_backward and plain
    if inplace:
        require_writable(_WHO, logits)
    fused = plain and not inplace and logits.requires_grad and reduction != "none"
    function = _with_stats if stats else _without_stats
    return function(*inputs, how._replace(fused=fused, inplace=inplace))


def _forward(inputs: Inputs, how: How) -> tuple[Tensor, ...]:
    """loss, stats, tokens, groups, and perhaps the gradient for dloss = 1."""
    if how.fused:
        dlogits = logits_pool.empty_like(inputs[0])
        return (*_run(inputs, how, dlogits), dlogits)
    return ops.masked_divergence_forward.default(*inputs, how.reduction, how.stats, *how.divergence)


@kernel
def _run(inputs: Inputs, how: How, dlogits: Tensor | None = None) -> tuple[Tensor, ...]:
    logits, teacher, mask, normalizer, cu_seqlens, *temperatures = inputs
    tokens, groups = ops.divergence_weigh.default(
        logits, mask, normalizer, cu_seqlens, how.reduction, how.divergence.shift, how.stats
    )
    ops.divergence_rows.default(
        tokens, logits, teacher, *temperatures, groups, None, dlogits, True, False, *how.divergence
    )
    loss, _ = ops.reduce.default(tokens, groups, logits[..., 0], False, how.reduction)
    return loss, statistics_of(tokens, how.stats), tokens, groups


def statistics_of(tokens: Tensor, stats: bool) -> Tensor:
    """Sums over the tokens, in the order of DivergenceStats."""
    if not stats:
        return tokens.new_empty(0, dtype=torch.float64)
    tokens = tokens.double()
    weight = tables.weights(tokens)
    of = tables.by_name(tables.DIVERGENCE_FIELDS, tokens)
    columns = (of[name] for name in _SUMMED)
    # masked_reduce, whose sums have a fixed order.
    sums = [ops.masked_reduce.default(column, weight, reduction="sum") for column in columns]
    return torch.stack([ops.masked_reduce.default(weight, reduction="sum"), *sums])


def fake_statistics(like: Tensor, stats: bool) -> Tensor:
    return tables.fake_stats(like, stats, count=1 + len(_SUMMED))


def _save(inputs: Inputs, outputs: tuple[Tensor, ...], how: How) -> Inputs:
    logits, teacher, mask, *more = inputs
    _, _, *rest = outputs
    mask = kept_mask(mask)
    return logits, teacher, mask, *more, *rest


def _backward(
    saved: Inputs, how: How, upstream: Inputs, needs: tuple[bool, ...], plain: bool
) -> Inputs:
    logits, teacher, mask, _, _, own, others, tokens, groups, *dlogits = saved
    (dloss,) = upstream
    needs_logits, _, needs_mask, *_ = needs
    dmask = gradient = None
    if needs_mask:
        dmask = ops.mask_grad.default(dloss, mask, tokens, groups, None, None, 0.0, False)

    def write(to: Tensor, unless_one: bool = False) -> Tensor:
        with below_autograd():  # to which logits that require grad are not to be written
            ops.divergence_rows.default(
                tokens, logits, teacher, own, others, groups,
                dloss.reshape(-1) if dloss.dim() else dloss, to, False, unless_one,
                *how.divergence,
            )  # fmt: skip
        return to

    if not needs_logits:
        pass
    elif not plain:
        gradient = ops.masked_divergence_backward.default(
            dloss, logits, teacher, own, others, tokens, groups, *how.divergence
        )
    elif how.inplace:
        gradient = write(logits.detach())
        torch.autograd.graph.increment_version(logits)
    elif dlogits and not keeps_graph():
        (gradient,) = dlogits
        # On CUDA the operator looks at dloss itself: reading it here would wait for the device.
        if not dloss.is_cpu or dloss.item() != 1:
            write(gradient, unless_one=True)
    else:
        gradient = write(logits_pool.empty_like(logits))
    return gradient, None, dmask, None, None, None, None


def reference_of(saved: Inputs, how: How) -> tuple[Tensor, ...]:
    logits, teacher, mask, normalizer, cu_seqlens, own, others, *rest = saved
    mask = tables.mask_or_weights(mask, rest, logits.shape[:-1])
    stats, wide = how.stats and not rest, tables.loss_dtype(logits)
    options = how.divergence._asdict()
    for name, each in (("temperature", own), ("teacher_temperature", others)):
        if each is not None:
            options[name] = each
    loss: Any = reference.masked_divergence(
        logits.to(wide), teacher.to(wide), mask, normalizer=normalizer, cu_seqlens=cu_seqlens,
        **options, reduction=how.reduction, return_stats=stats,
    )  # fmt: skip
    return (loss[0], torch.stack(loss[1])) if stats else (loss,)


_without_stats, _with_stats = (
    differentiable(Formulas("MaskedDivergence", _forward, _save, _backward, reference_of, results))
    for results in (1, 2)
)


# The operators' kernels and fakes


def _public_kernel(
    stats: bool, inputs: Inputs, divergence: Divergence, *, reduction: str, inplace_backward: bool
) -> tuple[Tensor, ...]:
    return _run(inputs, How(divergence, reduction, stats, False, False))


def _forward_kernel(a: SimpleNamespace) -> tuple[Tensor, ...]:
    how = How(record(Divergence, a), a.reduction, a.stats, False, False)
    return _run(tuple(getattr(a, name) for name in INPUTS), how)


def _backward_kernel(a: SimpleNamespace) -> Tensor:
    dlogits = torch.empty_like(a.logits, memory_format=torch.contiguous_format)
    dloss = a.dloss.reshape(-1) if a.dloss.dim() else a.dloss
    ops.divergence_rows.default(
        a.tokens, a.logits, a.teacher_logits, a.temperatures, a.teacher_temperatures, a.groups,
        dloss, dlogits, False, False, *record(Divergence, a),
    )  # fmt: skip
    return dlogits


def _check(a: SimpleNamespace) -> None:
    _check_weights(a)
    checks.classes(_WHO, a.logits)
    checks.floating(_WHO, "teacher_logits", a.teacher_logits)
    checks.shape(_WHO, "teacher_logits", a.teacher_logits, a.logits.shape)
    checks.divergence(_WHO, a, a.logits.shape[:-1])


def _check_weights(a: SimpleNamespace) -> None:
    checks.rows(_WHO, a.logits, a.shift)
    checks.divergence_weights(_WHO, a, a.logits.shape[:-1])


def _fake(a: SimpleNamespace, stats: bool) -> tuple[Tensor, ...]:
    _check(a)
    shape = a.logits.shape[:-1]
    return (
        tables.fake_loss(a.logits, a.reduction, shape),
        fake_statistics(a.logits, stats),
        *_fake_tables(a, stats),
    )


def _fake_tables(a: SimpleNamespace, stats: bool) -> tuple[Tensor, Tensor]:
    shape = a.logits.shape[:-1]
    return (
        tables.fake_tokens(a.logits, tables.divergence_fields(stats), shape),
        tables.fake_groups(a.logits, a.reduction, shape, a.cu_seqlens),
    )


fake("masked_divergence")(lambda a: _fake(a, False))
fake("masked_divergence_stats")(lambda a: _fake(a, True))
fake("masked_divergence_forward")(lambda a: _fake(a, a.stats))
fake_like("logits", "masked_divergence_backward")


@fake("divergence_weigh")
def _fake_weigh(a: SimpleNamespace) -> tuple[Tensor, Tensor]:
    _check_weights(a)
    return _fake_tables(a, a.stats)


fake_nothing("divergence_rows")

implement("masked_divergence_forward", _forward_kernel)
implement("masked_divergence_backward", _backward_kernel)


def _statistics(tokens: Tensor, a: SimpleNamespace) -> Tensor:
    of = tables.by_name(tables.DIVERGENCE_FIELDS, tokens)
    weight = of["weight"]
    return weighted(weight, torch.ones_like(weight), *(of[name] for name in _SUMMED))


_ROWS = ("logits", "teacher_logits", "temperatures", "teacher_temperatures")
batch_reduced("masked_divergence_forward", (*_ROWS, "mask"), _statistics)
batch_rows("masked_divergence_backward", _ROWS, ("tokens", "groups"))

masked_divergence, masked_divergence_stats = (
    Operator(
        name, INPUTS, partial(_call, stats), partial(_public_kernel, stats), Divergence, _check
    )
    for name, stats in (("masked_divergence", False), ("masked_divergence_stats", True))
)
