# SPDX-License-Identifier: BSD-3-Clause
"""cross_entropy and cross_entropy_stats: the loss of logits that are there."""

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
from masked_loss._op.derivatives import Formulas, differentiable, vjp
from masked_loss._op.factory import Operator, fake, fake_like, fake_nothing
from masked_loss._op.memory import logits_pool
from masked_loss._op.tables import ops
from masked_loss.options import Meaning

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


def _call(
    stats: bool, inputs: Inputs, meaning: Meaning, *, inplace_backward: bool
) -> tuple[Tensor, ...]:
    """loss, stats if asked for, perhaps more; where nothing is differentiated, just the kernels."""
    logits, target, mask, *_ = inputs
    if not is_differentiated(logits, mask, target):
        return ops.cross_entropy_forward.default(*inputs, stats, *meaning)
    plain = are_plain(logits)
    inplace = inplace_backward and plain
    if inplace:
        require_writable("masked_cross_entropy", logits)
    fused = plain and not inplace and logits.requires_grad and meaning.reduction != "none"
    function = _with_stats if stats else _without_stats
    return function(*inputs, How(meaning, stats, fused, inplace))


def _forward(inputs: Inputs, how: How) -> tuple[Tensor, ...]:
    """loss, stats, tokens, groups, and perhaps the gradient for dloss = 1."""
    meaning, stats, fused, _ = how
    if not fused:
        return ops.cross_entropy_forward.default(*inputs, stats, *meaning)
    dlogits = logits_pool.empty_like(inputs[0])
    return (*ops.cross_entropy_fused.default(dlogits, *inputs, stats, *meaning), dlogits)


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
    elif not plain:
        gradient = ops.cross_entropy_backward.default(*args, *meaning)
    elif how.inplace:
        with below_autograd():  # to which logits that require grad are not to be written
            ops.cross_entropy_backward_out.default(logits, *args, False, *meaning)
        torch.autograd.graph.increment_version(logits)
        gradient = logits.detach()
    elif dlogits and not keeps_graph():
        (gradient,) = dlogits
        # On CUDA the operator looks at dloss itself: reading it here would wait for the device.
        if not dloss.is_cpu or dloss.item() != 1:
            ops.cross_entropy_backward_out.default(gradient, *args, True, *meaning)
    else:
        gradient = logits_pool.empty_like(logits)
        ops.cross_entropy_backward_out.default(gradient, *args, False, *meaning)
    return gradient, dtarget, dmask, None, None, None, None


def reference_of(saved: Inputs, how: How) -> tuple[Tensor, ...]:
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
    checks.cross_entropy(who, a.logits, a.target, a.mask, a.class_weight, a.shift)
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
fake_like("logits", "cross_entropy_backward")
fake_like("mask", "mask_grad")
fake_nothing("cross_entropy_backward_out")


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
