# SPDX-License-Identifier: BSD-3-Clause
"""A small language model, its like with fused loss, and how the two are compared."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import masked_loss

V, D, B, T = 37, 16, 3, 7


def shifted(logits: Tensor, ids: Tensor) -> Tensor:
    """The loss as MiniMind writes it."""
    x, y = logits[..., :-1, :].contiguous(), ids[..., 1:].contiguous()
    return F.cross_entropy(x.view(-1, x.size(-1)), y.view(-1), ignore_index=-100)


class Model(nn.Module):
    """A body, a head, a loss: what the tests vary is the loss."""

    def __init__(
        self,
        loss: Callable[[Tensor, Tensor], Any] = shifted,
        bias: bool = False,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.body = nn.Linear(D, D)
        self.lm_head = nn.Linear(D, V, bias=bias)
        if tied:
            self.lm_head.weight = self.embed.weight
        self.loss = loss

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> tuple[Any, Tensor]:
        logits = self.lm_head(self.body(self.embed(ids)).tanh())
        return (None if labels is None else self.loss(logits, labels)), logits


def both(**options: Any) -> tuple[Model, Model]:
    """A model, and its like with fused loss."""
    model = Model(**options)
    return model, masked_loss.fuse_linear_loss(copy.deepcopy(model))


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(stock: nn.Module, fused: nn.Module, **tolerance: float) -> None:
    expected, got = grads(stock), grads(fused)
    assert expected.keys() == got.keys()
    assert any(g.abs().max() > 0 for g in expected.values())
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad, msg=lambda m, n=name: f"{n}: {m}", **tolerance)


def assert_no_less_accurate(
    got: Iterable[Tensor], stock: Iterable[Tensor], truth: Iterable[Tensor], dtype: torch.dtype
) -> None:
    """No further from the truth than the stock computation in the same type, and two roundings."""
    info = torch.finfo(dtype)
    for ours, theirs, right in zip(got, stock, truth, strict=True):
        least = right.numel() ** 0.5 * info.smallest_normal
        rounding = info.eps * max(least, right.norm().item())
        assert (ours - right).norm() <= (theirs - right).norm() + 2 * rounding


def flat(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(logits.reshape(-1, V), labels.reshape(-1), **options)


def capped(logits: Tensor, cap: float) -> Tensor:
    logits = logits / cap
    logits = torch.tanh(logits)
    return logits * cap
