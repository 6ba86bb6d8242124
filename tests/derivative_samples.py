# SPDX-License-Identifier: BSD-3-Clause
"""Every loss beside its specification, as functions of logits, target and mask; transforms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from masked_loss import (
    cross_entropy,
    linear_cross_entropy,
    linear_divergence,
    linear_token_log_probs,
    masked_cross_entropy,
    masked_divergence,
    masked_reduce,
    reference,
    token_log_probs,
)

Loss = Callable[..., Tensor]
ops = torch.ops.masked_loss
CLASSES = 5


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def problem(*shape: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """logits, target, mask; one token is ignored."""
    target = torch.randint(CLASSES, shape)
    target.view(-1)[0] = -100
    return [torch.randn(*shape, CLASSES, dtype=dtype), target, torch.rand(shape, dtype=dtype) + 0.1]


HEAD = torch.eye(CLASSES, dtype=torch.float64) + 0.1
TEACHER = torch.linspace(-1, 1, CLASSES, dtype=torch.float64)


def of_logits(x: Tensor, mask: Tensor) -> Tensor:
    return reference.linear_logits(x, HEAD, None, mask)


def likelihood(f: Loss) -> Loss:
    """Of a function that gives log-probabilities and entropies."""

    def loss(x: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        log_probs, entropy = f(x, target, mask)
        return (mask * (log_probs.exp() + 0.1 * entropy)).sum()

    return loss


LOSSES: dict[str, tuple[Loss, Loss]] = {
    "mean": (masked_cross_entropy, reference.masked_cross_entropy),
    "none": (
        lambda *a: masked_cross_entropy(*a, reduction="none", z_loss=0.1, shift=True).sum(),
        lambda *a: reference.masked_cross_entropy(
            *a, reduction="none", z_loss=0.1, shift=True
        ).sum(),
    ),
    "statistics": (
        lambda *a: masked_cross_entropy(*a, return_stats=True)[0],
        reference.masked_cross_entropy,
    ),
    "drop-in": (
        lambda x, t, m: cross_entropy(x.movedim(-1, 1), t, mask=m),
        lambda x, t, m: reference.cross_entropy(x.movedim(-1, 1), t, mask=m),
    ),
    "probabilities": (
        lambda x, t, m: cross_entropy(x.movedim(-1, 1), x.movedim(-1, 1).softmax(1), mask=m),
        lambda x, t, m: reference.cross_entropy(
            x.movedim(-1, 1), x.movedim(-1, 1).softmax(1), mask=m
        ),
    ),
    "masked_reduce": (
        lambda x, t, m: masked_reduce(x[..., 0] ** 2, m, reduction="sequence_mean"),
        lambda x, t, m: reference.masked_reduce(x[..., 0] ** 2, m, reduction="sequence_mean"),
    ),
    "linear": (
        lambda x, t, m: linear_cross_entropy(x, HEAD, t, m),
        lambda x, t, m: reference.masked_cross_entropy(of_logits(x, m), t, m),
    ),
    "log-probabilities": (
        likelihood(lambda *a: token_log_probs(*a, return_entropy=True)),
        likelihood(lambda *a: reference.token_log_probs(*a, return_entropy=True)),
    ),
    "linear log-probabilities": (
        likelihood(lambda x, t, m: linear_token_log_probs(x, HEAD, t, m, return_entropy=True)),
        likelihood(
            lambda x, t, m: reference.token_log_probs(of_logits(x, m), t, m, return_entropy=True)
        ),
    ),
    "divergence": (
        lambda x, t, m: masked_divergence(x, TEACHER.expand_as(x), m, kind="jsd"),
        lambda x, t, m: reference.masked_divergence(x, TEACHER.expand_as(x), m, kind="jsd"),
    ),
    "linear divergence": (
        lambda x, t, m: linear_divergence(x, HEAD, x.new_ones(*m.shape, 1), TEACHER[:, None], m),
        lambda x, t, m: reference.masked_divergence(of_logits(x, m), TEACHER.expand_as(x), m),
    ),
}
# The same through the operators, and nothing that is not one.
OPERATORS: dict[str, tuple[Loss, Loss]] = {
    "cross_entropy": (lambda *a: ops.cross_entropy(*a), reference.masked_cross_entropy),
    "cross_entropy_stats": (
        lambda *a: ops.cross_entropy_stats(*a)[0],
        reference.masked_cross_entropy,
    ),
    "masked_reduce": (
        lambda x, t, m: ops.masked_reduce(x[..., 0] ** 2, m, reduction="sequence_mean"),
        LOSSES["masked_reduce"][1],
    ),
    "linear_cross_entropy": (
        lambda x, t, m: ops.linear_cross_entropy(x, HEAD, t, m),
        LOSSES["linear"][1],
    ),
    "token_log_probs": (
        likelihood(lambda x, t, m: ops.token_log_probs_entropy(x, t, m)),
        LOSSES["log-probabilities"][1],
    ),
    "linear_token_log_probs": (
        likelihood(lambda x, t, m: ops.linear_token_log_probs_entropy(x, HEAD, t, m)),
        LOSSES["linear log-probabilities"][1],
    ),
    "masked_divergence": (
        lambda x, t, m: ops.masked_divergence(x, TEACHER.expand_as(x), m, kind="jsd"),
        LOSSES["divergence"][1],
    ),
    "linear_divergence": (
        lambda x, t, m: ops.linear_divergence(
            x, HEAD, x.new_ones(*m.shape, 1), TEACHER[:, None], m
        ),
        LOSSES["linear divergence"][1],
    ),
}
EVERYTHING = {**LOSSES, **{f"ops.{name}": pair for name, pair in OPERATORS.items()}}
all_losses = pytest.mark.parametrize("loss", LOSSES)
all_operators = pytest.mark.parametrize("loss", EVERYTHING)


def push(f: Loss) -> Loss:
    return lambda x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1]


def penalty(f: Loss) -> Loss:
    """A second derivative through a nonlinear function of the first."""
    return torch.func.grad(lambda x: (torch.func.grad(f)(x) ** 2).sum())


TRANSFORMS: dict[str, Callable[[Loss], Loss]] = {
    "grad": torch.func.grad,
    "vjp": lambda f: lambda x: torch.func.vjp(f, x)[1](torch.ones_like(f(x)))[0],
    "jvp": push,
    "jacrev": torch.func.jacrev,
    "jacfwd": torch.func.jacfwd,
    "hessian": torch.func.hessian,
    "reverse over reverse": lambda f: torch.func.jacrev(torch.func.jacrev(f)),
    "reverse over forward": lambda f: torch.func.jacrev(torch.func.jacfwd(f)),
    "forward over forward": lambda f: torch.func.jacfwd(torch.func.jacfwd(f)),
    "grad of jvp": lambda f: torch.func.grad(push(f)),
    "jvp of vjp": lambda f: lambda x: push(torch.func.vjp(f, x)[1])(torch.ones_like(f(x))),
    "penalty": penalty,
    "linearize": lambda f: lambda x: torch.func.linearize(f, x)[1](x),
    "third": lambda f: torch.func.grad(lambda x: (penalty(f)(x) ** 2).sum()),
    "forward over third": lambda f: push(penalty(f)),
}


def total(which: int) -> Loss:
    """The sum of several losses: to compile one graph of them takes less than a graph of each."""
    names = ("mean", "masked_reduce", "linear", "log-probabilities", "divergence")
    return lambda *args: sum(LOSSES[name][which](*args) for name in names)
