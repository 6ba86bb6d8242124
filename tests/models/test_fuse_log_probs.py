# SPDX-License-Identifier: BSD-3-Clause
"""Log-probabilities of given tokens from lazy logits: the code of DPO, PPO and GRPO, unpatched."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import masked_loss
from masked_loss.fuse import LazyLogits

V, D, B, T = 37, 16, 3, 7


class Model(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.embed, self.lm_head = nn.Embedding(V, D), nn.Linear(D, V, bias=bias)

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.embed(ids).tanh())


def row_by_row(x: Tensor, ids: Tensor) -> Tensor:
    """MiniMind's rollouts, and TRL's selective_log_softmax of half types."""
    rows = zip(x, ids, strict=True)
    picked = [torch.gather(a.log_softmax(dim=-1), 1, b.unsqueeze(1)).squeeze(1) for a, b in rows]
    return torch.stack(picked)


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "DPO": lambda x, y: torch.gather(F.log_softmax(x, dim=2), dim=2, index=y.unsqueeze(2)),
    "GRPO": lambda x, y: F.log_softmax(x[:, :-1, :], dim=-1).gather(2, y[:, 1:].unsqueeze(-1)),
    "row by row": row_by_row,
    "float, temperature": lambda x, y: (x.float() / 0.8).log_softmax(-1).gather(-1, y[..., None]),
    "dtype": lambda x, y: F.log_softmax(x, dim=-1, dtype=torch.float64).gather(-1, y[..., None]),
    "softcap": lambda x, y: torch.log_softmax(3 * (x / 3).tanh(), -1).gather(-1, y.unsqueeze(-1)),
    "special": lambda x, y: torch.special.log_softmax(x, -1).gather(index=y.unsqueeze(-1), dim=-1),
    "flat, indexed": lambda x, y: x.view(-1, V).log_softmax(1)[torch.arange(B * T), y.view(-1)],
    "indexed": lambda x, y: x.log_softmax(-1)[torch.arange(B)[:, None], torch.arange(T), y],
    "some, in another order": lambda x, y: x.log_softmax(-1)[
        torch.tensor([2, 0, -1]), torch.tensor([-2, 1, 1]), torch.tensor([-1, 5, 5])
    ],
    "nll_loss": lambda x, y: F.nll_loss(F.log_softmax(x.view(-1, V), -1), y.view(-1)),
    "nll_loss, options": lambda x, y: F.nll_loss(
        F.log_softmax(x, -1).view(-1, V), y.view(-1), torch.linspace(0, 1, V), ignore_index=5,
        reduction="sum",
    ),
    "NLLLoss": lambda x, y: nn.NLLLoss(reduction="none")(x.log_softmax(-1).mT, y),
    "classes second": lambda x, y: F.nll_loss(x.transpose(1, 2).log_softmax(1), y),
}  # fmt: skip


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("way", WAYS)
def test_without_the_logits(way: str, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(V, (B, T))
    stock = Model(bias)
    fused = masked_loss.fuse_linear_loss(copy.deepcopy(stock))
    expected = WAYS[way](stock(ids), ids)
    upstream = torch.randn_like(expected)
    expected.backward(upstream)

    def computed(self: LazyLogits, reason: str) -> Tensor:
        raise AssertionError(f"the logits were computed for {reason}")

    monkeypatch.setattr(LazyLogits, "_value", computed)
    got = WAYS[way](fused(ids), ids)
    got.backward(upstream)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected)
    for p, q in zip(stock.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad)
    assert masked_loss.is_fused(fused)
    with torch.no_grad():
        assert not WAYS[way](fused(ids), ids).requires_grad


UNIFORM = torch.full((V,), 1 / V)
OTHERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "entropy": lambda x, y: -(x.log_softmax(-1).exp() * x.log_softmax(-1)).sum(-1),
    "several ids": lambda x, y: x.log_softmax(-1).gather(-1, torch.stack((y, y, 1 + y % 9), -1)),
    "fewer tokens": lambda x, y: x.log_softmax(-1).gather(-1, y[:2, :4, None]),
    "over tokens": lambda x, y: x.log_softmax(1).gather(-1, y[..., None]),
    "of logits": lambda x, y: x.gather(-1, y[..., None]),
    "scaled": lambda x, y: (2 * x.log_softmax(-1)).gather(-1, y[..., None]),
    "classes first": lambda x, y: x.log_softmax(-1).mT.gather(1, y[:, None]),
    "rows": lambda x, y: torch.stack([row.softmax(-1) for row in x]),
    "scaled rows": lambda x, y: torch.stack([(row / 2).exp() for row in x.unbind(1)]),
    "tokens one by one": lambda x, y: torch.stack([row[3] for row in x.view(-1, V)]),
    "unbound classes": lambda x, y: torch.stack(x.unbind(-1)),
    "divergence": lambda x, y: F.kl_div(x.log_softmax(-1), UNIFORM, reduction="none"),
    "indexed by slices": lambda x, y: x.log_softmax(-1)[0, :, y[0, 0]],
    "cross entropy of them": lambda x, y: F.cross_entropy(x.log_softmax(-1).mT, y),
}  # fmt: skip


@pytest.mark.parametrize("way", OTHERS)
def test_everything_else_gets_the_numbers(way: str) -> None:
    ids = torch.randint(V, (B, T))
    stock = Model()
    fused = masked_loss.fuse_linear_loss(copy.deepcopy(stock))
    expected, got = (OTHERS[way](model(ids), ids) for model in (stock, fused))
    torch.testing.assert_close(got, expected)
    upstream = torch.randn_like(expected)
    expected.backward(upstream)
    got.backward(upstream)
    for p, q in zip(stock.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad)


def test_rows_are_computed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []
    value = LazyLogits._value
    monkeypatch.setattr(
        LazyLogits, "_value", lambda self, why: computed.append(self.shape) or value(self, why)
    )
    fused = masked_loss.fuse_linear_loss(Model())
    for row in fused(torch.randint(V, (B, T))):
        (row / 2).softmax(-1)
    assert computed == [(B, T, V)]


def test_a_sampler_computes_its_logits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes into a copy, from which the other logits are still apart."""
    computed = []
    value = LazyLogits._value
    monkeypatch.setattr(
        LazyLogits, "_value", lambda self, why: computed.append(self.shape) or value(self, why)
    )
    stock = Model()
    fused, ids = masked_loss.fuse_linear_loss(copy.deepcopy(stock)), torch.randint(V, (B, T))

    def sampler(model: nn.Module) -> tuple[Tensor, Tensor]:
        every = model(ids)
        last = every[:, -1] / 0.8
        last[last < last.topk(2)[0][..., -1, None]] = -torch.inf
        return every, last

    with torch.no_grad():
        (every, last), (logits, picked) = sampler(stock), sampler(fused)
        assert computed == [(B, V)]
        torch.testing.assert_close(picked.softmax(-1), last.softmax(-1))
        torch.testing.assert_close(picked.log_softmax(-1) + 0, last.log_softmax(-1))
        torch.testing.assert_close(logits + 0, every)
        torch.testing.assert_close(picked + 0, last)
        logits[:, -1].zero_()
        assert logits[:, -1].count_nonzero() == 0
        torch.testing.assert_close(picked + 0, last)


@pytest.mark.parametrize("index", [-100, -1, V])
def test_ids_that_gather_refuses_are_refused(index: int) -> None:
    ids = torch.randint(V, (B, T))
    fused = masked_loss.fuse_linear_loss(Model())
    log_probs = fused(ids).log_softmax(-1)
    ids[1, 2] = index
    with pytest.raises((IndexError, RuntimeError), match=r"out of bounds|expected 0 <= target"):
        log_probs.gather(-1, ids[..., None])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_not_rounded_to(dtype: torch.dtype) -> None:
    """log_softmax in bfloat16 is wrong by up to 0.06: the ratio of two policies by 6 %."""
    ids = torch.randint(V, (B, T))
    stock = Model().to(dtype)
    fused = masked_loss.fuse_linear_loss(copy.deepcopy(stock))
    with torch.no_grad():
        truth = stock(ids).double().log_softmax(-1).gather(-1, ids[..., None])
        got = fused(ids).log_softmax(-1).gather(-1, ids[..., None])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), truth, rtol=1e-6, atol=1e-6)
