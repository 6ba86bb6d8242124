# SPDX-License-Identifier: BSD-3-Clause
"""What a loss tells about its batch besides the loss."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

from torch import Tensor


class LossStats(NamedTuple):
    """Weighted sums over the active tokens of a batch, as 0-dim float64 tensors without a graph.

    Sums, not means: add them up over micro-batches and ranks, then divide by the sum of ``tokens``.
    A batch whose every token is masked has ``tokens == 0``.

    >>> import torch, masked_loss
    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [5.0, 0.0]])
    >>> mask = torch.tensor([True, True, False])
    >>> loss, stats = masked_loss.masked_cross_entropy(
    ...     logits, torch.tensor([0, 0, 1]), mask, return_stats=True)
    >>> stats.tokens, stats.correct / stats.tokens
    (tensor(2., dtype=torch.float64), tensor(0.5000, dtype=torch.float64))
    >>> int((stats + stats).tokens), int(sum([stats, stats, stats]).tokens)
    (4, 6)
    """

    tokens: Tensor
    """Σ w: the number of tokens, where the mask is of zeros and ones."""
    correct: Tensor
    """Σ w·[argmax logits = target]; the first of equal logits is the argmax."""
    entropy: Tensor
    """Σ w·H(softmax(logits)), in nats."""
    z_loss: Tensor
    """Σ w·z_loss·logsumexp(logits)²: what the z-loss adds to the sum of losses."""

    def __add__(self, other: Any) -> LossStats:
        return _sum(self, other)

    def __radd__(self, other: Any) -> LossStats:
        return _sum(self, other)


class DivergenceStats(NamedTuple):
    """Weighted sums over the active tokens of a batch, as 0-dim float64 tensors without a graph.

    As :class:`LossStats`: sums, to be added up and divided by the sum of ``tokens``.

    >>> import torch, masked_loss
    >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, -1.0]])
    >>> loss, stats = masked_loss.masked_divergence(student, teacher, return_stats=True)
    >>> [round(float(x), 4) for x in (stats.entropy, stats.teacher_entropy, stats.agreement)]
    [0.6931, 0.3653, 1.0]
    """

    tokens: Tensor
    """Σ w: the number of tokens, where the mask is of zeros and ones."""
    divergence: Tensor
    """Σ w·D."""
    entropy: Tensor
    """Σ w·H(student), in nats."""
    teacher_entropy: Tensor
    """Σ w·H(teacher), in nats."""
    agreement: Tensor
    """Σ w·[argmax student = argmax teacher]; the first of equal logits is the argmax."""

    def __add__(self, other: Any) -> DivergenceStats:
        return _sum(self, other)

    def __radd__(self, other: Any) -> DivergenceStats:
        return _sum(self, other)


_Sums = TypeVar("_Sums", bound=tuple[Tensor, ...])


def _sum(a: _Sums, b: Any) -> _Sums:
    """Of both batches; the 0 with which sum() begins is no batch."""
    if type(b) is type(a):
        return type(a)(*(x + y for x, y in zip(a, b, strict=True)))
    return a if type(b) is int and b == 0 else NotImplemented


def _take_an_iterable(kind: Any) -> None:
    """Where a tensor subclass's ``__torch_function__`` converts a tuple, it makes another of it."""
    of_fields = kind.__new__

    def new(cls: Any, *fields: Any, **named: Any) -> Any:
        if len(fields) == 1 and not named and not isinstance(fields[0], Tensor):
            return cls._make(fields[0])
        return of_fields(cls, *fields, **named)

    kind.__new__ = new


_take_an_iterable(LossStats)
_take_an_iterable(DivergenceStats)
