# SPDX-License-Identifier: BSD-3-Clause
"""The divergence from a teacher of whom only the K likeliest classes are known."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from masked_loss._op.arguments import (
    require_bool,
    require_constant,
    require_device,
    require_floating,
    require_kind,
    require_mask,
)
from masked_loss._op.overrides import is_overridden, override
from masked_loss.reduce import reduced, rounded
from masked_loss.reference import divergence

_FLOOR = 2.0**-24
"""The least probability of all other classes: what float32 can tell from a sum of 1."""


def topk_divergence(
    log_probs: Tensor,
    teacher_log_probs: Tensor,
    mask: Tensor | None = None,
    *,
    kind: str = "forward_kl",
    beta: float = 0.5,
    tail: bool = True,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    r"""The divergence of a student from a teacher, from the log-probabilities of K classes each.

    With :math:`p_k, q_k` what teacher and student give to the K classes, the rest becomes one class
    more,

    .. math::
        p_{K+1} = 1 - \sum_{k \le K} p_k, \qquad q_{K+1} = 1 - \sum_{k \le K} q_k, \qquad
        \text{value} = D(p_{1 \dots K+1}, q_{1 \dots K+1})

    and D is one of the kinds of :func:`masked_loss.masked_divergence`. So it is a divergence: never
    negative, 0 only where all K + 1 agree, and never above the divergence over all classes. The
    same sum over the K classes alone is none of that; it is not offered.

    Args:
        log_probs: [..., K] the student's, float64, float32, bfloat16 or float16, from
            :func:`masked_loss.token_log_probs` of the teacher's classes; a temperature is applied
            there. They carry the gradient.
        teacher_log_probs: [..., K], of the same classes in the same order. -inf says that the place
            holds no class, whatever log_probs has there: a list shorter than K ends in them.
        mask: [...] bool, integer or floating: the weight of each token; None stands for 1.
        kind: ``"forward_kl"``, ``"reverse_kl"``, ``"jsd"``, ``"skew_forward_kl"`` or
            ``"skew_reverse_kl"``.
        beta: the share of the mixture, for ``"jsd"`` and the skewed ones.
        tail: False leaves the rest out, and divides both by their sums over the K classes: how much
            of its mass the student has elsewhere is not seen then. With K = 1 that is always 0.
        reduction: ``"none"``, ``"sum"``, ``"mean"`` or ``"sequence_mean"``.
        normalizer: as in :func:`masked_loss.masked_reduce`.
        cu_seqlens: the bounds of packed sequences, as in :func:`masked_loss.masked_reduce`.

    Returns:
        float32 (float64 for float64 log_probs), of the shape of mask for ``"none"``, else 0-dim.

    The student's rest is at least 2**-24, with no gradient below; the teacher's is at least 0, for
    ``"reverse_kl"`` 2**-24: probabilities that sum to a little more than 1, as rounded ones do, are
    no harm.

    Raises:
        TypeError: a dtype that is not offered, or not a tensor.
        ValueError: shapes that do not fit, an unknown kind or reduction, beta out of its range,
            teacher_log_probs that require grad.

    Source: docs/semantics.md.

    >>> import torch, masked_loss
    >>> student = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log()
    >>> teacher = torch.tensor([[0.6, 0.3, 0.1, 0.0]]).log()
    >>> top = teacher.topk(2)
    >>> masked_loss.topk_divergence(student.gather(-1, top.indices), top.values)
    tensor(0.1212)
    """
    if is_overridden(log_probs, teacher_log_probs, mask):
        return override(topk_divergence, locals())
    who = "topk_divergence"
    require_floating(who, "log_probs", log_probs)
    require_floating(who, "teacher_log_probs", teacher_log_probs)
    require_constant(who, "teacher_log_probs", teacher_log_probs)
    if log_probs.dim() == 0 or log_probs.shape != teacher_log_probs.shape:
        raise ValueError(
            f"{who}: log_probs and teacher_log_probs must have the same shape [..., K], "
            f"got {list(log_probs.shape)} and {list(teacher_log_probs.shape)}"
        )
    require_device(who, "teacher_log_probs", teacher_log_probs, log_probs)
    require_mask(who, mask, log_probs.shape[:-1], log_probs)
    require_bool(who, tail=tail)
    require_kind(who, kind, beta)
    values = _values(log_probs, teacher_log_probs, mask, kind, beta, tail)
    names = {"values": "log_probs"}
    loss = reduced(who, values, mask, reduction, normalizer, None, cu_seqlens, names)
    return rounded(loss, log_probs)


def _values(
    log_probs: Tensor,
    teacher_log_probs: Tensor,
    mask: Tensor | None,
    kind: str,
    beta: float,
    tail: bool,
) -> Tensor:
    """One divergence for each token, in float64: these tensors are small, and log q - log p is a
    difference of numbers that are close."""
    log_q, log_p = log_probs.double(), teacher_log_probs.double()
    if mask is not None:
        active = (mask != 0)[..., None]
        log_q, log_p = log_q.where(active, 0), log_p.where(active, 0)
    is_class = log_p > -torch.inf
    log_q = log_q.where(is_class, -torch.inf)
    sum_q, sum_p = (_log_sum(x, is_class) for x in (log_q, log_p))
    if tail:
        rest_q, rest_p = (_log_rest(x.clamp(max=-_FLOOR)) for x in (sum_q, sum_p))
        if kind != "reverse_kl":  # infinite for a teacher without a rest
            rest_p = rest_p.where(sum_p < 0, -torch.inf)
        log_q, log_p = torch.cat([log_q, rest_q], dim=-1), torch.cat([log_p, rest_p], dim=-1)
    else:
        log_q, log_p = (
            x - sums.where(sums > -torch.inf, 0) for x, sums in ((log_q, sum_q), (log_p, sum_p))
        )
    return divergence(log_p, log_q, kind, beta)


def _log_sum(x: Tensor, is_class: Tensor) -> Tensor:
    """logsumexp, whose gradient is NaN where there is nothing to sum up."""
    some = is_class.any(dim=-1, keepdim=True)
    return x.where(some, 0).logsumexp(dim=-1, keepdim=True).where(some, -torch.inf)


def _log_rest(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, exact at both ends."""
    near = x > -math.log(2)
    return torch.where(
        near,
        torch.log(-torch.expm1(x.where(near, -1))),
        torch.log1p(-torch.exp(x.where(~near, -1))),
    )
