# SPDX-License-Identifier: BSD-3-Clause
"""The recipes of docs/recipes.md for policies and teachers run, and compute what they claim to."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import masked_loss

TEXT = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
B, T, V, K = 8, 7, 11, 3


def recipe(heading: str, names: dict[str, Any]) -> SimpleNamespace:
    """What the code under a heading of the document leaves, given the names that it uses."""
    section = re.split(r"^## ", TEXT, flags=re.M)
    (text,) = (part for part in section if part.startswith(f"{heading}\n"))
    code = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert code, heading
    names = {"torch": torch, "F": F, "masked_loss": masked_loss, **names}
    for block in code:
        exec(block, names)
    return SimpleNamespace(**names)


@pytest.fixture
def batch() -> dict[str, Any]:
    """Prompts of two tokens, completions of every length from 0 on, and what trainers know."""
    mask = torch.arange(T) - 2 < torch.arange(B)[:, None] % 6
    mask[:, :2] = False
    logits, others = torch.randn(2, B, T, V, dtype=torch.float64)
    logits.requires_grad_()
    ids = torch.randint(V, (B, T))
    return {
        "ids": ids,
        "mask": mask,
        "logits": logits,
        "model": lambda _: SimpleNamespace(logits=logits),
        "reference_logits": others,
        "teacher_model": lambda _: SimpleNamespace(logits=F.pad(others, (0, 2))),
        "new": log_probs(logits, ids, mask),
        "old": log_probs(logits.detach() + 0.3 * torch.randn_like(others), ids, mask),
        "reference": log_probs(others, ids, mask),
        "rewards": torch.randn(B),
    }


def log_probs(logits: Tensor, ids: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
    """As trainers write it."""
    every = (logits[:, :-1] / temperature).log_softmax(-1)
    picked = every.gather(-1, ids[:, 1:, None])[..., 0]
    return F.pad(picked, (1, 0)) * mask


def mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum()


def same(ours: Tensor, truth: Tensor, *leaves: Tensor) -> None:
    torch.testing.assert_close(ours.double(), truth.double())
    for leaf in leaves:
        gradients = (torch.autograd.grad(x, leaf, retain_graph=True)[0] for x in (ours, truth))
        torch.testing.assert_close(*gradients)


def test_log_probabilities(batch) -> None:
    r = recipe("Log-probabilities", batch)
    same(r.new, log_probs(r.logits, r.ids, r.mask, 0.8))
    p = torch.distributions.Categorical(logits=r.logits[:, :-1] / 0.8)
    same(r.entropy, F.pad(p.entropy(), (1, 0)) * r.mask)


def test_grpo(batch) -> None:
    r = recipe("GRPO", batch)
    new = log_probs(r.logits, r.ids, r.mask)
    ratio, d = torch.exp(new - r.old), r.reference - new
    advantages = torch.cat([(g - g.mean()) / (g.std() + 1e-4) for g in r.rewards.split(4)])[:, None]
    gain = torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    losses = (0.04 * (d.exp() - d - 1) - gain) * r.mask
    occupied = r.mask.any(1)
    truth = (losses.sum(1)[occupied] / r.mask.sum(1)[occupied]).mean()
    same(r.loss, truth, r.logits)


def test_averages(batch) -> None:
    """The table under GRPO."""
    losses, mask, ids = torch.randn(B, T), batch["mask"], batch["ids"]
    sums, lengths = (losses * mask).sum(1), mask.sum(1)
    active = lengths > 0

    def ours(**options: Any) -> Tensor:
        return masked_loss.masked_reduce(losses, mask, **options)

    def n(count: str) -> Tensor:
        return masked_loss.global_normalizer(ids, mask, count=count)

    same(ours(), sums.sum() / lengths.sum())
    same(ours(reduction="sum", normalizer=n("tokens")), sums.sum() / lengths.sum())
    same(ours(reduction="sequence_mean"), (sums[active] / lengths[active]).mean())
    same(ours(dim=-1).mean(), (sums / lengths.clamp(min=1)).mean())
    same(ours(reduction="sum", normalizer=n("sequences")), sums[active].mean())
    same(ours(reduction="sum", normalizer=B * T), (sums / T).mean())
    same(ours(reduction="sum"), sums.sum())


def test_ppo(batch) -> None:
    values = torch.randn(B, T, dtype=torch.float64, requires_grad=True)
    more = {"values": values, "old_values": torch.randn(B, T), "returns": torch.randn(B, T)}
    r = recipe("PPO", batch | more)
    a = (r.returns - r.old_values)[r.mask]
    advantages = torch.zeros(B, T).masked_scatter(r.mask, (a - a.mean()) / a.std(correction=0))
    ratio = torch.exp(r.new - r.old)
    near = r.old_values + (values - r.old_values).clamp(-0.2, 0.2)
    error = torch.max((values - r.returns) ** 2, (near - r.returns) ** 2)
    gain = torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    truth = 0.5 * mean(error, r.mask) - mean(gain, r.mask)
    torch.testing.assert_close(r.loss, truth, rtol=1e-5, atol=1e-6)
    d = r.new - r.old
    same(r.approx_kl, mean(d.exp() - 1 - d, r.mask))

    broken = torch.full((B, T), torch.nan, requires_grad=True)
    nothing = masked_loss.masked_mean(broken, torch.zeros_like(r.mask))
    nothing.backward()
    assert nothing == 0
    assert (broken.grad == 0).all()


def test_dpo(batch) -> None:
    r = recipe("DPO", batch)
    margin = ((r.new - r.reference) * r.mask).sum(1)
    truth = -F.logsigmoid(0.1 * (margin[: B // 2] - margin[B // 2 :])).mean()
    torch.testing.assert_close(r.loss.double(), truth)


def test_exact_kl(batch) -> None:
    r = recipe("KL estimators", batch)
    p, q = (
        torch.distributions.Categorical(logits=x[:, :-1]) for x in (r.logits, r.reference_logits)
    )
    truth = mean(torch.distributions.kl_divergence(p, q), r.mask[:, 1:])
    same(r.kl, truth, r.logits)


def test_kl_estimators() -> None:
    """The table: averages over what π draws, taken exactly, class by class."""
    y = torch.randn(V, dtype=torch.float64, requires_grad=True)
    log_ref = torch.randn(V, dtype=torch.float64).log_softmax(-1)
    log_pi = y.log_softmax(-1)
    pi = log_pi.exp().detach()
    d = log_ref - log_pi
    forward, reverse = (log_ref.exp() * d).sum(), (log_pi.exp() * -d).sum()
    k1, k2, k3 = -d, d**2 / 2, torch.expm1(d) - d

    def gradient(x: Tensor) -> Tensor:
        return torch.autograd.grad(x, y, retain_graph=True)[0]

    same((pi * k1).sum(), reverse)
    same((pi * k3).sum(), reverse)
    assert min(k2.min(), k3.min()) >= 0 > k1.min()
    torch.testing.assert_close(gradient((pi * k1).sum()), torch.zeros_like(y))
    torch.testing.assert_close(gradient((pi * k2).sum()), gradient(reverse))
    torch.testing.assert_close(gradient((pi * k3).sum()), gradient(forward))


def test_k3_in_float32() -> None:
    d = torch.tensor([1e-3, 1e-4])
    naive = torch.exp(d) - d - 1
    assert [f"{x:.2e}" for x in naive] == ["4.77e-07", "0.00e+00"]
    torch.testing.assert_close(torch.expm1(d) - d, d**2 / 2, rtol=5e-3, atol=0)


def test_distillation(batch) -> None:
    r = recipe("Distillation", batch)
    p = (r.reference_logits[:, :-1] / 2).log_softmax(-1)
    q = (r.logits[:, :-1] / 2).log_softmax(-1)
    kl = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    ce = -log_probs(r.logits, r.ids, r.mask)
    truth = 0.5 * 4 * mean(kl, r.mask[:, 1:]) + 0.5 * mean(ce, r.mask)
    same(r.loss, truth, r.logits)


def test_top_k_teacher(batch) -> None:
    top = batch["reference_logits"].log_softmax(-1).roll(1, 1).topk(K)
    r = recipe(
        "A teacher of K classes", {**batch, "top_ids": top.indices, "top_log_probs": top.values}
    )
    everything = F.pad(r.logits[:, :-1].softmax(-1), (0, 0, 1, 0), value=1 / V)
    q, p = everything.gather(-1, top.indices), top.values.exp()
    q, p = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (q, p))
    same(r.loss, mean((p * (p / q).log()).sum(-1), r.mask), r.logits)


def test_support_of_a_sampler(batch) -> None:
    kept_ids = torch.rand(B, T, V).argsort(-1)[..., :4]
    kept_ids[..., 0] = batch["ids"].where(batch["mask"], kept_ids[..., 0])
    kept_ids[..., 1:][kept_ids[..., 1:] == batch["ids"][..., None]] = -100
    kept_ids[~batch["mask"]] = -100
    r = recipe("A sampler's support", {**batch, "kept_ids": kept_ids})
    allowed = torch.zeros(B, T, V + 1, dtype=torch.bool)
    allowed.scatter_(-1, kept_ids.where(kept_ids >= 0, V), True)
    logits = (r.logits[:, :-1] / 0.8).masked_fill(~allowed[:, 1:, :V], -torch.inf)
    logits = logits.where(r.mask[:, 1:, None], 0)
    truth = log_probs(F.pad(logits * 1.0, (0, 0, 0, 1)), r.ids, r.mask)
    same((r.new * r.mask).sum(), truth.sum(), r.logits)
