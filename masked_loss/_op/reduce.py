# SPDX-License-Identifier: BSD-3-Clause
"""masked_reduce: losses computed elsewhere."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

from torch import Tensor

from masked_loss import reference
from masked_loss._op import checks, tables
from masked_loss._op.autograd import Inputs, is_differentiated, kept_mask
from masked_loss._op.batching import batch_reduced, batch_rows
from masked_loss._op.derivatives import Formulas, differentiable
from masked_loss._op.factory import Operator, fake, fake_like
from masked_loss._op.tables import ops
from masked_loss.options import Meaning

INPUTS = ("values", "mask", "normalizer", "cu_seqlens")


class How(NamedTuple):
    reduction: str
    per_sequence: bool


def _call(inputs: Inputs, meaning: Meaning, *, per_sequence: bool) -> tuple[Tensor, ...]:
    values, mask, *_ = inputs
    how = How(meaning.reduction, per_sequence)
    if not is_differentiated(values, mask):
        return _forward(inputs, how)
    return _reduce(*inputs, how)


def _forward(inputs: Inputs, how: How) -> tuple[Tensor, ...]:
    """loss, tokens, groups"""
    return ops.masked_reduce_forward.default(*inputs, how.per_sequence, how.reduction)


def _save(inputs: Inputs, outputs: tuple[Tensor, ...], how: How) -> Inputs:
    values, mask, normalizer, cu_seqlens = inputs
    _, tokens, groups = outputs
    mask = kept_mask(mask)
    return values, mask, normalizer, cu_seqlens, tokens, groups


def _backward(
    saved: Inputs, how: How, upstream: Inputs, needs: tuple[bool, ...], plain: bool
) -> Inputs:
    values, mask, _, _, tokens, groups = saved
    (dloss,) = upstream
    needs_values, needs_mask, *_ = needs
    dvalues = dmask = None
    if needs_values:
        dvalues = ops.masked_reduce_backward.default(
            dloss, values, tokens, groups, how.per_sequence
        )
    if needs_mask:
        dmask = ops.mask_grad.default(
            dloss, mask, tokens, groups, None, None, 0.0, how.per_sequence
        )
    return dvalues, dmask, None, None


def _reference(saved: Inputs, how: How) -> tuple[Tensor, ...]:
    values, mask, normalizer, cu_seqlens, *rest = saved
    mask = tables.mask_or_weights(mask, rest, values.shape)
    loss = reference.masked_reduce(
        values.to(tables.loss_dtype(values)), mask, reduction=how.reduction, normalizer=normalizer,
        cu_seqlens=cu_seqlens, dim=-1 if how.per_sequence else None,
    )  # fmt: skip
    return (loss,)


_reduce = differentiable(Formulas("MaskedReduce", _forward, _save, _backward, _reference))


def _check(a: SimpleNamespace) -> None:
    who, shape = "masked_reduce", a.values.shape
    checks.floating(who, "values", a.values)
    if a.mask is not None:
        checks.mask_of(who, a.mask, shape)
    checks.reduction(who, a.reduction, len(shape), a.normalizer)
    checks.cu_seqlens(who, a.cu_seqlens)
    if a.per_sequence:
        checks.per_sequence(who, a.reduction, len(shape))


@fake("masked_reduce", "masked_reduce_forward")
def _fake(a: SimpleNamespace) -> tuple[Tensor, ...]:
    _check(a)
    shape = a.values.shape
    if a.per_sequence:
        sequences = shape[:-1] if a.cu_seqlens is None else (a.cu_seqlens.shape[0] - 1,)
        loss = a.values.new_empty(sequences, dtype=tables.loss_dtype(a.values))
    else:
        loss = tables.fake_loss(a.values, a.reduction, shape)
    return (
        loss,
        tables.fake_tokens(a.values, tables.VALUE_FIELDS, shape),
        tables.fake_groups(a.values, a.reduction, shape, a.cu_seqlens, a.per_sequence),
    )


fake_like("values", "masked_reduce_backward")
batch_reduced("masked_reduce_forward", ("values", "mask"), trailing=0)
batch_rows("masked_reduce_backward", ("values",), ("tokens", "groups"))

masked_reduce = Operator("masked_reduce", INPUTS, _call, check=_check)
