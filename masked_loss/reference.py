# SPDX-License-Identifier: BSD-3-Clause
"""The specification of masked_loss: each function in a few lines of eager PyTorch.

The kernels are tested against this file. It computes in the dtype it is given, so with float64
inputs it is the truth that the tests compare with, and every line of it is differentiable.
It checks no arguments and saves no memory; use :mod:`masked_loss` itself for that.

A token takes part when its weight is not 0. Every other token is *masked*: its logits are
replaced by zeros before anything is computed, so a NaN in a masked row reaches neither the loss
nor a gradient.

>>> import torch
>>> from masked_loss import reference
>>> logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0], [float("nan"), 0.0, 0.0]])
>>> target = torch.tensor([0, 2, 1])
>>> mask = torch.tensor([1.0, 3.0, 0.0])
>>> reference.masked_cross_entropy(logits, target, mask, reduction="none")
tensor([0.4076, 3.2958, 0.0000])
>>> reference.masked_cross_entropy(logits, target, mask)
tensor(0.9259)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

Stats = tuple[Tensor, ...]


def masked_cross_entropy(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    ignore_index: int = -100,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    shift: bool = False,
    cu_seqlens: Tensor | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, Stats]:
    """Cross entropy of ``logits`` [..., V] and ``target`` [...], weighted by ``mask`` [...].

    Args:
        logits: the scores, one row of V for each token.
        target: the class of each token; ``ignore_index`` gives it the weight 0. A floating
            ``target`` [..., V] holds class probabilities: no index is ignored, and the class
            weights do not count in the mean's denominator.
        mask: the weight of each token: bool, or any integer or float type. None stands for 1.
        reduction: "none", "sum", "mean" or "sequence_mean", as in :func:`masked_reduce`.
        normalizer: what "mean" and "sum" divide by, instead of the sum of the weights or 1;
            with "sequence_mean", instead of the number of sequences.
        ignore_index: the target value of tokens that take no part.
        class_weight: [V], the weight of each class, as in ``F.cross_entropy``.
        label_smoothing: the share of the target that is spread evenly over all classes.
        z_loss: adds ``z_loss * logsumexp(logits) ** 2`` to the loss of each token.
        softcap: replaces logits by ``softcap * tanh(logits / softcap)`` first.
        temperature: what the logits are divided by, after the softcap: one, or one for each token.
        shift: ``logits[..., t, :]`` scores ``target[..., t + 1]``, with the weight of the latter.
        cu_seqlens: [S + 1], the bounds of sequences in the flattened tokens, instead of the rows.
        return_stats: returns (loss, (tokens, correct, entropy, z_loss)), sums over all tokens.

    >>> logits = torch.zeros(2, 3, 10)
    >>> target = torch.tensor([[4, 4, -100], [4, -100, -100]])
    >>> masked_cross_entropy(logits, target, reduction="sum")
    tensor(6.9078)
    """
    probabilities = target.is_floating_point()
    scored = None if probabilities else target != ignore_index
    weight = token_weights(logits, mask, scored, shift, cu_seqlens)
    sequences = None if cu_seqlens is None else _sequences(cu_seqlens, weight.shape)
    if shift:
        sequences = None if sequences is None else sequences.after_first()
        first = weight[..., :1]  # Nothing scores the first token.
        logits, target, weight = logits[..., :-1, :], target[..., 1:], weight[..., 1:]
        temperature = _after_first(temperature)

    active = weight != 0
    y = _scaled(logits, active, softcap, temperature)

    lse = y.logsumexp(dim=-1)
    nll = -y.log_softmax(dim=-1)  # lse - y, without the rounding of lse
    c = y.new_ones(y.shape[-1]) if class_weight is None else class_weight.to(y.dtype)
    if probabilities:
        p = target.where(active[..., None], 0).to(y.dtype)
        p = (1 - label_smoothing) * p + label_smoothing / y.shape[-1]
        index, ce, share = p.argmax(dim=-1), (c * p * nll).sum(dim=-1), weight
    else:
        index = target.where(active, 0).long()
        # gather: c[index] would ask the host for an index without dimensions, which a vmap has not.
        of_class = c.expand(y.shape).gather(-1, index[..., None])[..., 0]
        ce, share = of_class * nll.gather(-1, index[..., None])[..., 0], weight * of_class
        if label_smoothing:
            ce = (1 - label_smoothing) * ce + label_smoothing * (c * nll).mean(dim=-1)

    # The mean of the cross entropy divides by the class weights too, that of the z-loss does not.
    loss = _reduce(ce, weight, share, reduction, normalizer, sequences)
    if z_loss:
        loss = loss + _reduce(z_loss * lse**2, weight, weight, reduction, normalizer, sequences)
    if shift and reduction == "none":
        loss = torch.cat([first, loss], dim=-1)
    if not return_stats:
        return loss

    weight, y, lse = weight.detach().double(), y.detach(), lse.detach()
    right = logits.detach().where(active[..., None], 0).argmax(dim=-1) == index
    entropy = torch.special.entr(y.softmax(dim=-1)).sum(dim=-1)
    return loss, (
        weight.sum(),
        (weight * right).sum(),
        (weight * entropy).sum(),
        (weight * z_loss * lse**2).sum(),
    )


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """``F.cross_entropy`` with a mask: classes in dimension 1, indices or probabilities as target.

    A float ``target`` of the shape of ``input`` holds class probabilities. ``ignore_index`` does
    not apply to them, and their mean divides by the sum of the mask alone, as in PyTorch.

    >>> cross_entropy(torch.zeros(2, 10, 5), torch.zeros(2, 5, dtype=torch.long))
    tensor(2.3026)
    """
    logits, rows = (x.movedim(1, -1) if x.dim() == input.dim() > 1 else x for x in (input, target))
    loss = masked_cross_entropy(
        logits,
        rows,
        mask,
        reduction=reduction,
        ignore_index=ignore_index,
        class_weight=weight,
        label_smoothing=label_smoothing,
    )
    assert isinstance(loss, Tensor)
    return loss


def token_log_probs(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    softcap: float | None = None,
    shift: bool = False,
    cu_seqlens: Tensor | None = None,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The log-probabilities of ``target`` [...] or [..., K], and the entropy [...] of each row.

    ``mask`` selects: where it is 0 both results are 0. So they are where ``target`` [...] is
    ``ignore_index``; of K ids, the ignored ones alone are 0.

    >>> token_log_probs(torch.zeros(2, 10), torch.tensor([4, -100]), return_entropy=True)
    (tensor([-2.3026,  0.0000]), tensor([2.3026, 0.0000]))
    """
    several = target.dim() == logits.dim()
    ids = target if several else target[..., None]
    if cu_seqlens is not None:
        mask = token_weights(logits, mask, None, shift, cu_seqlens)
    if shift:
        first = [logits.new_zeros(x[..., :1, :].shape) for x in (ids, ids[..., :1])]
        logits, ids = logits[..., :-1, :], ids[..., 1:, :]
        mask = None if mask is None else mask[..., 1:]
        temperature = _after_first(temperature)

    scored = ids != ignore_index
    active = (
        scored.any(dim=-1) if not (several and return_entropy) else torch.ones_like(ids[..., 0])
    )
    active = active != 0 if mask is None else (active != 0) & (mask != 0)
    scored = scored & active[..., None]
    log_p = _log_softmax(logits, active, softcap, temperature)
    index = ids.where(scored, 0).long()
    log_probs = log_p.gather(-1, index).where(scored, 0)
    entropy = -(log_p.exp() * log_p.where(log_p > -torch.inf, 0)).sum(dim=-1, keepdim=True)
    entropy = entropy.where(active[..., None], 0)
    if shift:
        log_probs, entropy = (
            torch.cat(parts, dim=-2) for parts in zip(first, (log_probs, entropy), strict=True)
        )
    log_probs = log_probs if several else log_probs[..., 0]
    return (log_probs, entropy[..., 0]) if return_entropy else log_probs


DIVERGENCES = {
    "forward_kl": lambda beta: (1.0, 0.0, 0.0),
    "reverse_kl": lambda beta: (0.0, 1.0, 1.0),
    "jsd": lambda beta: (beta, 1 - beta, beta),
    "skew_forward_kl": lambda beta: (1.0, 0.0, beta),
    "skew_reverse_kl": lambda beta: (0.0, 1.0, 1 - beta),
}
"""Each kind is ``a KL(p || m) + b KL(q || m)`` with ``m = c p + (1 - c) q``: its (a, b, c)."""


def masked_divergence(
    logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    kind: str = "forward_kl",
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    shift: bool = False,
    cu_seqlens: Tensor | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, Stats]:
    """The divergence of q, the softmax of ``logits``, from p, that of ``teacher_logits``.

    ``return_stats`` adds (tokens, divergence, entropy, teacher_entropy, agreement), sums over all
    tokens. With ``shift`` the mask of token t + 1 is that of the rows t.

    >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, -1.0]])
    >>> masked_divergence(student, teacher), masked_divergence(student, teacher, kind="jsd")
    (tensor(0.3278), tensor(0.0895))
    """
    if teacher_temperature is None:
        teacher_temperature = temperature
    weight = token_weights(logits, mask, None, shift, cu_seqlens)
    sequences = None if cu_seqlens is None else _sequences(cu_seqlens, weight.shape)
    if shift:
        sequences = None if sequences is None else sequences.after_first()
        first, weight = weight[..., :1], weight[..., 1:]
        logits, teacher_logits = logits[..., :-1, :], teacher_logits[..., :-1, :]
        temperature, teacher_temperature = map(_after_first, (temperature, teacher_temperature))

    log_q = _log_softmax(logits, weight != 0, softcap, temperature)
    teacher_logits = teacher_logits.to(logits.dtype)
    log_p = _log_softmax(teacher_logits, weight != 0, teacher_softcap, teacher_temperature)
    values = divergence(log_p, log_q, kind, beta)
    loss = _reduce(values, weight, weight, reduction, normalizer, sequences)
    if shift and reduction == "none":
        loss = torch.cat([first, loss], dim=-1)
    if not return_stats:
        return loss

    weight, log_q = weight.detach().double(), log_q.detach()
    entropies = (torch.special.entr(x.exp()).sum(dim=-1) for x in (log_q, log_p))
    agreement = log_q.argmax(dim=-1) == log_p.argmax(dim=-1)
    sums = [(weight * x).sum() for x in (values.detach(), *entropies, agreement)]
    return loss, (weight.sum(), *sums)


def divergence(log_p: Tensor, log_q: Tensor, kind: str, beta: float) -> Tensor:
    """The divergence between distributions over the last dimension, given by their logarithms.

    >>> log_p, log_q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    >>> divergence(log_p, log_q, "forward_kl", 0.5), divergence(log_p, log_q, "reverse_kl", 0.5)
    (tensor([0.1438]), tensor([0.1308]))
    """
    a, b, c = DIVERGENCES[kind](beta)
    log_m = log_p if c == 1 else log_q
    if 0 < c < 1:
        nowhere = (log_p == -torch.inf) & (log_q == -torch.inf)  # logaddexp has no gradient there
        parts = (log_p + math.log(c), log_q + math.log1p(-c))
        log_m = torch.logaddexp(*(x.masked_fill(nowhere, 0) for x in parts))
        log_m = log_m.masked_fill(nowhere, -torch.inf)
    terms = [weight * _kl(x, log_m) for x, weight in ((log_p, a), (log_q, b)) if weight]
    return sum(terms[1:], terms[0])


def _kl(log_p: Tensor, log_m: Tensor) -> Tensor:
    """KL(p || m) as the sum of ``m - p + p log(p / m)``: the terms are not negative, the sums of m
    and of p cancel. Where p is 0 a term is m; where only m is, it is infinite."""
    p, m = log_p.exp(), log_m.exp()
    occurs = log_p != -torch.inf
    r = (log_m - log_p).where(occurs, 0)
    far = r > 16  # there expm1(r) may overflow, and nothing cancels
    near, beyond = r.masked_fill(far, 0), r.masked_fill(~far, 0)
    terms = (m - p - p * beyond).where(far, p * (torch.expm1(near) - near)).where(occurs, m)
    excluded = occurs & (log_m == -torch.inf)
    return terms.masked_fill(excluded & (p == 0), torch.inf).sum(dim=-1)


def masked_reduce(
    values: Tensor,
    mask: Tensor | None = None,
    *,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dim: int | None = None,
) -> Tensor:
    """Weighs ``values`` by ``mask`` of the same shape and reduces them.

    With w the mask and x the values where the mask is not 0:

    - "none": ``w x``
    - "sum": ``sum(w x)``
    - "mean": ``sum(w x) / sum(w)``
    - "sequence_mean": the "mean" along the last dimension, then the mean over those sequences
      that have a weight that is not 0

    ``cu_seqlens`` [S + 1] bounds sequences in the flattened values, instead of the last dimension.
    A ``normalizer`` is the denominator of "sum" and "mean", and of the mean over sequences. Without
    any weight that is not 0 the result is 0. With ``dim=-1`` there is a "sum" or "mean" for each
    sequence.

    >>> values = torch.tensor([[1.0, 2.0, 3.0], [7.0, float("nan"), float("nan")]])
    >>> mask = torch.tensor([[True, True, True], [True, False, False]])
    >>> masked_reduce(values, mask), masked_reduce(values, mask, reduction="sequence_mean")
    (tensor(3.2500), tensor(4.5000))
    """
    weight = token_weights(values[..., None], mask, cu_seqlens=cu_seqlens)
    sequences = None if cu_seqlens is None else _sequences(cu_seqlens, values.shape)
    values = values.where(weight != 0, 0)
    return _reduce(values, weight, weight, reduction, normalizer, sequences, dim is not None)


def _log_softmax(
    logits: Tensor, active: Tensor, softcap: float | None, temperature: float | Tensor
) -> Tensor:
    """Log-probabilities of the active rows; the others are those of zeros."""
    return _scaled(logits, active, softcap, temperature).log_softmax(dim=-1)


def _scaled(
    logits: Tensor, active: Tensor, softcap: float | None, temperature: float | Tensor
) -> Tensor:
    """The logits of active rows as losses take them, and zeros."""
    y = logits.where(active[..., None], 0)
    if softcap is not None:
        y = softcap * torch.tanh(y / softcap)
    if isinstance(temperature, Tensor):
        temperature = temperature.expand(active.shape).where(active, 1).to(y.dtype)[..., None]
    return y / temperature


def _after_first(temperature: float | Tensor) -> float | Tensor:
    """Without the first token, if there is one value for each."""
    if isinstance(temperature, Tensor) and temperature.dim() and temperature.shape[-1] > 1:
        return temperature[..., 1:]
    return temperature


def _weight(mask: Tensor | None, shape: torch.Size, like: Tensor) -> Tensor:
    """The mask in the dtype of ``like``. An entry that is 0 is a constant: its gradient is 0."""
    if mask is None:
        return like.new_ones(shape)
    return mask.to(like.dtype).where(mask != 0, 0)


def token_weights(
    logits: Tensor,
    mask: Tensor | None,
    scored: Tensor | None = None,
    shift: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The weight of each token; 0 where it is not ``scored``, and where nothing scores it."""
    weight = _weight(mask, logits.shape[:-1], logits)
    if scored is not None:
        weight = weight.where(scored, 0)
    if shift:
        weight = torch.cat([torch.zeros_like(weight[..., :1]), weight[..., 1:]], dim=-1)
    if cu_seqlens is not None:
        number, count = _sequences(cu_seqlens, weight.shape)
        weight = weight.where(number < count, 0)
        if shift:
            step = torch.diff(number.flatten(), prepend=number.new_full((1,), -1))
            weight = weight.where((step == 0).view(weight.shape), 0)
    return weight


def linear_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, weights: Tensor, shift: bool = False
) -> Tensor:
    """``F.linear``, for which hidden states are zeros where they score a token of weight 0.

    >>> hidden = torch.tensor([[1.0, 2.0], [float("nan"), 0.0]])
    >>> linear_logits(hidden, torch.eye(2), None, torch.tensor([1.0, 0.0]))
    tensor([[1., 2.],
            [0., 0.]])
    """
    if shift:
        weights = torch.cat([weights[..., 1:], torch.zeros_like(weights[..., :1])], dim=-1)
    hidden = hidden.where((weights != 0)[..., None], 0)
    return torch.nn.functional.linear(hidden, weight, bias)


class Sequences(NamedTuple):
    """The number of each token's sequence, ``total`` behind the last, and how many there are."""

    number: Tensor
    total: int

    def after_first(self) -> Sequences:
        return Sequences(self.number[..., 1:], self.total)


def _sequences(cu_seqlens: Tensor, shape: torch.Size) -> Sequences:
    tokens = torch.arange(math.prod(shape), device=cu_seqlens.device).view(shape)
    number = torch.bucketize(tokens, cu_seqlens.to(tokens), right=True) - 1
    return Sequences(number, len(cu_seqlens) - 1)


def _reduce(
    values: Tensor,
    weight: Tensor,
    share: Tensor,
    reduction: str,
    normalizer: float | Tensor | None,
    sequences: Sequences | None = None,
    per_sequence: bool = False,
) -> Tensor:
    """Sums ``weight * values`` and divides by the sum of ``share``, as ``reduction`` says."""
    weighted = weight * values
    active = weight != 0
    if normalizer is not None:
        normalizer = torch.as_tensor(normalizer, dtype=values.dtype, device=values.device)
    if reduction == "none":
        return weighted
    if reduction == "sequence_mean" or per_sequence:
        totals, shares, counts = (_sums(x.to(values), sequences) for x in (weighted, share, active))
        occupied = counts > 0
        if per_sequence and normalizer is not None:
            shares = normalizer
        elif per_sequence and reduction == "sum":
            shares = torch.ones_like(totals)
        means = totals / shares.where(occupied, 1)
        if per_sequence:
            return means
        weighted, share = means, occupied.to(means.dtype)
    if normalizer is not None:
        denominator = normalizer
    elif reduction in ("mean", "sequence_mean"):
        denominator = share.sum()
    elif reduction == "sum":
        denominator = torch.ones_like(weighted.sum())
    else:
        raise ValueError(f"reduction must be none, sum, mean or sequence_mean, got {reduction!r}")
    return weighted.sum() / denominator.where(active.any(), 1)


def _sums(x: Tensor, sequences: Sequences | None) -> Tensor:
    """Over each sequence: along the last dimension, or as they are packed."""
    if sequences is None:
        return x.sum(dim=-1)
    number, count = sequences
    # What is behind the last sequence adds to one that nobody sees.
    return x.new_zeros(count + 1).index_add(0, number.flatten(), x.flatten())[:-1]
