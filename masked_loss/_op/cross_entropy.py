# SPDX-License-Identifier: BSD-3-Clause
"""cross_entropy and cross_entropy_stats: the loss of logits that are there.

sharded_cross_entropy is that of a rank's shard of the classes. Forward exchanges what the shards
tell of their rows (exchange.py); backward needs no more than the tables that this fills.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from masked_loss import reference
from masked_loss._op import checks, exchange, tables
from masked_loss._op.autograd import (
    Inputs,
    are_plain,
    below_autograd,
    is_differentiated,
    is_traced,
    keeps_graph,
    kept_mask,
)
from masked_loss._op.batching import batch_by_loop, batch_reduced, batch_rows, weighted
from masked_loss._op.derivatives import Formulas, differentiable, vjp
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
from masked_loss.options import ALL_CLASSES, Meaning, Shards

INPUTS = (
    "logits", "target", "mask", "normalizer", "class_weight", "cu_seqlens", "temperatures",
)  # fmt: skip


class How(NamedTuple):
    meaning: Meaning
    stats: bool
    fused: bool
    """Forward computes the gradient too, for dloss = 1: the logits are read once, not twice.

    Backward hands it over or, for another dloss, computes it anew into the same memory: scaling it
    would round half types twice."""
    inplace: bool
    """Backward writes the gradient over the logits."""
    shards: Shards = ALL_CLASSES
    """What the other ranks have of the loss."""
    columns: tuple[int, int] | None = None
    """The first class that is here, and how many there are on all ranks."""


def _call(
    stats: bool, inputs: Inputs, meaning: Meaning, *, inplace_backward: bool, **shards: Any
) -> tuple[Tensor, ...]:
    """loss, stats if asked for, perhaps more; where nothing is differentiated, just the kernels."""
    logits, target, mask, *_ = inputs
    if shards:
        return _call_sharded(stats, inputs, meaning, inplace_backward, Shards(**shards))
    if not is_differentiated(logits, mask, target):
        return ops.cross_entropy_forward.default(*_short(inputs, stats, meaning))
    plain = are_plain(logits)
    inplace = inplace_backward and plain
    if inplace:
        require_writable("masked_cross_entropy", logits)
    fused = plain and not inplace and logits.requires_grad and meaning.reduction != "none"
    function = _with_stats if stats else _without_stats
    return function(*inputs, How(meaning, stats, fused, inplace))


def _call_sharded(
    stats: bool, inputs: Inputs, meaning: Meaning, inplace: bool, shards: Shards
) -> tuple[Tensor, ...]:
    logits, target, mask, *_ = inputs
    inplace = inplace and are_plain(logits)
    if inplace:
        require_writable("masked_cross_entropy", logits)
    # A row is not at hand any more when all ranks have told of theirs: there is nothing to fuse.
    how = How(meaning, stats, False, inplace, shards, exchange.columns(shards))
    if not is_differentiated(logits, mask, target):
        return _forward(inputs, how)
    return (_with_stats if stats else _without_stats)(*inputs, how)


def _forward(inputs: Inputs, how: How) -> tuple[Tensor, ...]:
    """loss, stats, tokens, groups, and perhaps the gradient for dloss = 1."""
    meaning, stats, fused, _, shards, _ = how
    if shards.bounds and not is_traced(*inputs):
        return _run_sharded(inputs, how)
    if shards.bounds:
        return ops.sharded_cross_entropy_forward.default(
            *inputs, stats, shards.vocab_group, shards.bounds, *meaning
        )
    given = _short(inputs, stats, meaning)
    if not fused:
        return ops.cross_entropy_forward.default(*given)
    dlogits = logits_pool.empty_like(inputs[0])
    return (*ops.cross_entropy_fused.default(dlogits, *given), dlogits)


_DEFAULTS = Meaning()
_TYPES = tuple(map(type, _DEFAULTS))


def _short(inputs: Inputs, stats: bool, meaning: Meaning) -> Inputs:
    """A forward operator's arguments, without the last ones where they are its defaults.

    PyTorch asks of each that it is given whether it is a tensor: of those 12, for as long as a
    small loss takes. The types are compared, too, since 0 == 0.0, and the operator's check is that.
    """
    _, _, _, normalizer, class_weight, cu_seqlens, temperatures = inputs
    alone = normalizer is class_weight is cu_seqlens is temperatures is None
    if alone and not stats and tuple(map(type, meaning)) == _TYPES and meaning == _DEFAULTS:
        return inputs[:3]
    return (*inputs, stats, *meaning)


def _save(inputs: Inputs, outputs: tuple[Tensor, ...], how: How) -> Inputs:
    logits, target, mask, *more = inputs
    _, _, *rest = outputs
    mask = kept_mask(mask)
    return logits, target, mask, *more, *rest


def _backward(
    saved: Inputs, how: How, upstream: Inputs, needs: tuple[bool, ...], plain: bool
) -> Inputs:
    logits, target, mask, _, class_weight, _, temperatures, tokens, groups, *dlogits = saved
    (dloss,) = upstream
    needs_logits, needs_target, needs_mask, *_ = needs
    meaning = how.meaning
    args = (dloss, logits, target, tokens, groups, class_weight, temperatures)
    dtarget = dmask = gradient = None
    if needs_target:
        rest = saved[2:]
        (dtarget,) = vjp(lambda t: reference_of((logits, t, *rest), how), [target], (dloss,))
    if needs_mask:
        index = None if target.is_floating_point() else target
        dmask = ops.mask_grad.default(
            dloss, mask, tokens, groups, index, class_weight, meaning.z_loss, False
        )
    if not needs_logits:
        pass
    elif not plain and how.columns is not None:
        gradient = ops.cross_entropy_shard_backward.default(*args, *how.columns, *meaning)
    elif not plain:
        gradient = ops.cross_entropy_backward.default(*args, *meaning)
    elif how.inplace:
        with below_autograd():  # to which logits that require grad are not to be written
            _write_gradient(logits, args, False, how)
        torch.autograd.graph.increment_version(logits)
        gradient = logits.detach()
    elif dlogits and not keeps_graph():
        (gradient,) = dlogits
        # On CUDA the operator looks at dloss itself: reading it here would wait for the device.
        if not dloss.is_cpu or dloss.item() != 1:
            _write_gradient(gradient, args, True, how)
    else:
        gradient = logits_pool.empty_like(logits)
        _write_gradient(gradient, args, False, how)
    return gradient, dtarget, dmask, None, None, None, None


def _write_gradient(into: Tensor, args: Inputs, unless_one: bool, how: How) -> None:
    if how.columns is None:
        ops.cross_entropy_backward_out.default(into, *args, unless_one, *how.meaning)
    else:
        ops.cross_entropy_shard_backward_out.default(into, *args, *how.columns, *how.meaning)


def reference_of(saved: Inputs, how: How) -> tuple[Tensor, ...]:
    exchange.require_whole("masked_cross_entropy", how.shards)
    logits, target, mask, normalizer, class_weight, cu_seqlens, temperatures, *rest = saved
    mask = tables.mask_or_weights(mask, rest, logits.shape[:-1])
    options = how.meaning._asdict()
    if temperatures is not None:
        options["temperature"] = temperatures
    loss: Any = reference.masked_cross_entropy(
        logits.to(tables.loss_dtype(logits)), target, mask, normalizer=normalizer,
        class_weight=class_weight, cu_seqlens=cu_seqlens, **options,
        return_stats=how.stats and not rest,
    )  # fmt: skip
    if how.stats and not rest:
        loss, stats = loss
        return loss, torch.stack(stats)
    return (loss,)


# Without statistics one result: to hand out another takes a twentieth of a small loss's time.
_without_stats, _with_stats = (
    differentiable(Formulas("CrossEntropy", _forward, _save, _backward, reference_of, results))
    for results in (1, 2)
)


# Of a shard of the classes


@kernel
def _run_sharded(inputs: Inputs, how: How) -> tuple[Tensor, ...]:
    logits, target, mask, normalizer, class_weight, cu_seqlens, temperatures = inputs
    meaning, stats, _, _, shards, _ = how
    first, classes = exchange.columns(shards)
    wide = logits.dtype == torch.float64
    tokens, groups = ops.weigh.default(
        target, mask, normalizer, class_weight, cu_seqlens, classes, wide, stats, *meaning
    )
    saved = (target, tokens, groups, class_weight, temperatures)
    part = ops.cross_entropy_partial.default(logits, *saved, first, classes, *meaning)
    exchange.merged(ops.cross_entropy_merge, part, shards, *saved, meaning)
    loss, statistics = ops.reduce.default(tokens, groups, target, stats, *meaning)
    return loss, statistics, tokens, groups


def _sharded_kernel(
    stats: bool, inputs: Inputs, meaning: Meaning, *, inplace_backward: bool, **shards: Any
) -> tuple[Tensor, ...]:
    return _run_sharded(inputs, How(meaning, stats, False, False, Shards(**shards)))


def _sharded_forward_kernel(a: SimpleNamespace) -> tuple[Tensor, ...]:
    inputs = tuple(getattr(a, name) for name in INPUTS)
    return _run_sharded(
        inputs, How(record(Meaning, a), a.stats, False, False, Shards(a.vocab_group, a.bounds))
    )


def require_writable(who: str, logits: Tensor) -> None:
    """Every logit has a place of its own, where the kernels find it: [batch, step, class].

    Here and not in csrc/ops/check.h: to write in place is autograd's affair, the forward kernels do
    not hear of it, and in backward it would be too late to say.
    """
    if logits.numel() == 0:
        return
    steps = logits.shape[-2] if logits.dim() > 1 else 1
    try:
        rows = logits.detach().view(-1, steps, logits.shape[-1])
        writable = rows.stride(-1) == 1 or rows.shape[-1] == 1
    except RuntimeError:  # the outer dimensions do not lie one inside the other
        writable, rows = False, logits
    reach = 1  # what lies inside the dimensions with smaller strides
    for stride, size in sorted(zip(rows.stride(), rows.shape, strict=True)):
        writable = writable and (size == 1 or stride >= reach)
        reach += stride * (size - 1)
    if not writable:
        raise RuntimeError(
            f"ValueError: {who}: inplace_backward needs logits whose classes are contiguous "
            f"and whose rows do not overlap, got shape {list(logits.shape)} with strides "
            f"{list(logits.stride())}"
        )


def _check(a: SimpleNamespace) -> None:
    who = "masked_cross_entropy"
    checks.formula(who, a)
    classes = a.bounds[-1] if hasattr(a, "bounds") else None
    checks.cross_entropy(who, a.logits, a.target, a.mask, a.class_weight, a.shift, classes)
    checks.temperatures(who, a.temperatures, a.logits.shape[:-1])
    checks.reduction(who, a.reduction, a.logits.dim() - 1, a.normalizer)
    checks.cu_seqlens(who, a.cu_seqlens)


def _fake(a: SimpleNamespace, stats: bool) -> tuple[Tensor, ...]:
    _check(a)
    shape = a.logits.shape[:-1]
    return (
        tables.fake_loss(a.logits, a.reduction, shape),
        tables.fake_stats(a.logits, stats),
        tables.fake_tokens(a.logits, tables.TOKEN_FIELDS if stats else tables.SAVED, shape),
        tables.fake_groups(a.logits, a.reduction, shape, a.cu_seqlens),
    )


fake("cross_entropy")(lambda a: _fake(a, False))
fake("cross_entropy_stats")(lambda a: _fake(a, True))
fake("cross_entropy_forward", "cross_entropy_fused")(lambda a: _fake(a, a.stats))
fake("sharded_cross_entropy")(lambda a: _fake(a, False))
fake("sharded_cross_entropy_stats")(lambda a: _fake(a, True))
fake("sharded_cross_entropy_forward")(lambda a: _fake(a, a.stats))
fake_like("logits", "cross_entropy_backward", "cross_entropy_shard_backward")
fake_like("mask", "mask_grad")
fake_nothing(
    "cross_entropy_backward_out", "cross_entropy_shard_backward_out", "cross_entropy_merge"
)


@fake("cross_entropy_partial")
def _fake_partial(a: SimpleNamespace) -> tuple[Tensor]:
    stats = a.tokens.shape[0] == len(tables.TOKEN_FIELDS)
    numbers = 3 + 2 * (a.label_smoothing != 0) + 2 * stats
    return (a.tokens.new_empty((numbers, a.tokens.shape[1])),)


def _statistics(tokens: Tensor, a: SimpleNamespace) -> Tensor:
    of = tables.by_name(tables.TOKEN_FIELDS, tokens)
    z = a.z_loss * (of["top"] + of["sum"].log()) ** 2
    return weighted(of["weight"], torch.ones_like(z), of["correct"], of["entropy"], z)


_ROWS = ("logits", "target", "mask", "temperatures")
batch_reduced("cross_entropy_forward", _ROWS, _statistics)
batch_rows("cross_entropy_backward", ("logits", "target", "temperatures"), ("tokens", "groups"))
batch_rows("mask_grad", ("mask", "target"), ("tokens", "groups"))

cross_entropy, cross_entropy_stats = (
    Operator(name, INPUTS, partial(_call, stats), check=_check)
    for name, stats in (("cross_entropy", False), ("cross_entropy_stats", True))
)
sharded_cross_entropy, sharded_cross_entropy_stats = (
    Operator(name, INPUTS, partial(_call, stats), partial(_sharded_kernel, stats), check=_check)
    for name, stats in (("sharded_cross_entropy", False), ("sharded_cross_entropy_stats", True))
)
implement("sharded_cross_entropy_forward", _sharded_forward_kernel)
batch_by_loop("sharded_cross_entropy_forward", "cross_entropy_shard_backward")
