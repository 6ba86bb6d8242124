# SPDX-License-Identifier: BSD-3-Clause
"""linear_token_log_probs is token_log_probs of F.linear, and holds no logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from opchecks import opchecks
from torch import Tensor

from masked_loss import linear_token_log_probs, reference

V, D, K = 301, 24, 3
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "chunks": {"chunk_tokens": 3},
    "temperatures": {"temperature": True, "chunk_tokens": 4},
    "softcap": {"softcap": 5.0},
    "shift": {"shift": True, "chunk_tokens": 5},
    "everything": {"shift": True, "temperature": True, "softcap": 5.0, "bias": True},
}


def problem(dtype: torch.dtype, several: bool, options: str) -> tuple[Any, ...]:
    hidden, weight = torch.randn(3, 5, D).to(dtype), (2 * torch.randn(V, D) / D**0.5).to(dtype)
    target = torch.randint(V, (3, 5, K) if several else (3, 5))
    target[torch.rand(target.shape) < 0.2] = -100
    mask = torch.rand(3, 5) < 0.7
    mask[0, 1], mask[2] = True, False
    more = dict(OPTIONS[options])
    if more.get("temperature") is True:
        more["temperature"] = 0.5 + torch.rand(3, 5)
    if more.get("bias"):
        more["bias"] = torch.randn(V).to(dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), target, mask, more


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_every_option(options: str, several: bool, entropy: bool, dtype: torch.dtype) -> None:
    hidden, weight, target, mask, more = problem(dtype, several, options)
    ours = linear_token_log_probs(hidden, weight, target, mask, return_entropy=entropy, **more)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    bias = more.pop("bias", None)
    logits = F.linear(*exact, None if bias is None else bias.double())
    more.pop("chunk_tokens", None)
    truth = reference.token_log_probs(logits, target, mask, return_entropy=entropy, **more)
    ours, truth = (x if entropy else (x,) for x in (ours, truth))
    coarse = {torch.bfloat16: 3e-2, torch.float16: 4e-3}.get(dtype, 1e-5)
    upstream = [torch.linspace(-1, 1, x.numel()).view(x.shape) for x in truth]
    for mine, exact_one in zip(ours, truth, strict=True):
        assert mine.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(mine.double(), exact_one, rtol=coarse, atol=coarse)
        assert ((mine == 0) == (exact_one == 0)).all()
    found = torch.autograd.grad(ours, (hidden, weight), [u.to(ours[0]) for u in upstream])
    true = torch.autograd.grad(truth, exact, [u.double() for u in upstream])
    for name, mine, exact_one in zip(("hidden", "weight"), found, true, strict=True):
        off = (mine.double() - exact_one).abs().max() / exact_one.abs().max()
        assert off <= coarse, f"{name}: {off:.1e}"


def test_float16_gradients_do_not_underflow() -> None:
    """Upstream gradients of a mean over many tokens are below the smallest float16."""
    hidden, weight, target, mask, _ = problem(torch.float16, False, "plain")
    found = []
    for h, w in ((hidden, weight), (hidden.detach().double(), weight.detach().double())):
        leaves = [h.requires_grad_(), w.requires_grad_()]
        log_probs, entropy = linear_token_log_probs(*leaves, target, mask, return_entropy=True)
        upstream = [torch.full_like(x, 2.0**-22) for x in (log_probs, entropy)]
        found.append(torch.autograd.grad((log_probs, entropy), leaves, upstream))
    for mine, exact in zip(*found, strict=True):
        bound = 4e-3 * exact.abs().max() + 2**-24  # the last is what float16 can hold
        assert (mine.double() - exact).abs().max() <= bound


def test_masked_hidden_states_are_never_read() -> None:
    hidden, weight, target, mask, _ = problem(torch.float32, False, "plain")
    found = []
    for fill in (0.0, float("nan")):
        h = hidden.detach().masked_fill(~mask[..., None], fill).requires_grad_()
        values, entropy = linear_token_log_probs(h, weight, target, mask, return_entropy=True)
        gradients = torch.autograd.grad(values.sum() + entropy.sum(), (h, weight))
        found.append((values.detach(), entropy.detach(), *gradients))
        assert (values[~mask] == 0).all()
        assert (gradients[0][~mask] == 0).all()
    for clean, dirty in zip(*found, strict=True):
        assert torch.equal(clean, dirty)


def test_every_token_masked() -> None:
    hidden, weight, target, mask, _ = problem(torch.float32, False, "plain")
    values = linear_token_log_probs(hidden, weight, target, mask & False)
    values.sum().backward()
    assert (values == 0).all()
    assert (hidden.grad == 0).all()
    assert (weight.grad == 0).all()


@pytest.mark.parametrize("several", [False, True])
def test_compiled(several: bool) -> None:
    hidden, weight, target, mask, _ = problem(torch.float32, several, "plain")

    def both(h: Tensor, w: Tensor, m: Tensor) -> Any:
        return linear_token_log_probs(h, w, target, m, return_entropy=True, chunk_tokens=4)

    found = []
    for call in (both, torch.compile(both, fullgraph=True, backend="aot_eager")):
        values, entropy = call(hidden, weight, mask)
        gradients = torch.autograd.grad(values.sum() - entropy.sum(), (hidden, weight))
        found.append((values.detach(), entropy.detach(), *gradients))
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(eager, compiled)


def test_errors() -> None:
    who, h, w = "linear_token_log_probs", torch.zeros(2, 3, D), torch.zeros(V, D)
    target = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=rf"{who}: target must have shape \[2, 3\], or one"):
        linear_token_log_probs(h, w, target[0])
    with pytest.raises(TypeError, match=f"{who}: target must be int64 or int32 .*, got float32"):
        linear_token_log_probs(h, w, target.float())
    with pytest.raises(ValueError, match=rf"{who}: mask must have shape \[2, 3\], got \[3\]"):
        linear_token_log_probs(h, w, target, torch.ones(3))
    with pytest.raises(ValueError, match=f"{who}: softcap must be greater than 0"):
        linear_token_log_probs(h, w, target, torch.zeros(2, 3), softcap=-1.0)  # nothing to compute
    target[1, 2] = V
    text = rf"{who}: target\[1, 2\] is {V}, expected 0 <= target < {V}"
    with pytest.raises(IndexError, match=text):
        linear_token_log_probs(h, w, target)
    linear_token_log_probs(h, w, target, torch.tensor([[1, 1, 1], [1, 1, 0]]))


@opchecks(
    "linear_token_log_probs", "linear_token_log_probs_entropy",
    "linear_token_log_probs_forward", "linear_token_log_probs_backward",
)  # fmt: skip
@pytest.mark.parametrize("several", [False, True])
def test_opcheck(several: bool) -> None:
    ops = torch.ops.masked_loss
    hidden, weight, target, mask, _ = problem(torch.float32, several, "plain")
    bounds = torch.tensor([0, 1, 4])
    more = {"chunk_tokens": 4, "temperature": 2.0, "pack": False, "cu_seqlens": bounds}
    for name in ("linear_token_log_probs", "linear_token_log_probs_entropy"):
        torch.library.opcheck(getattr(ops, name).default, (hidden, weight, target, mask), more)
    head = (hidden.detach(), weight.detach(), None)
    how, options = (4, None, False), {"temperature": 2.0, "shift": True}
    forward = (*head, target, mask, bounds, None, True, *how)
    values, entropy, tokens, weights = ops.linear_token_log_probs_forward(*forward, **options)
    upstream = (torch.ones_like(values), torch.ones_like(entropy))
    backward = (*upstream, *head, target, None, tokens, weights, *how, [True, True, False])
    for name, args in {
        "linear_token_log_probs_forward": forward, "linear_token_log_probs_backward": backward,
    }.items():  # fmt: skip
        torch.library.opcheck(getattr(ops, name).default, args, options)
