# SPDX-License-Identifier: BSD-3-Clause
"""linear_divergence is masked_divergence of logits in float32, and holds none of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from opchecks import opchecks
from torch import Tensor

from masked_loss import linear_divergence, masked_divergence, reference

KINDS = list(reference.DIVERGENCES)
V, D, E = 501, 24, 40
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "chunks": {"chunk_tokens": 3},
    "temperatures": {"temperature": True, "teacher_temperature": 1.5, "chunk_tokens": 4},
    "softcap": {"softcap": 5.0, "teacher_softcap": 9.0},
    "shift": {"shift": True, "chunk_tokens": 5},
    "none": {"reduction": "none", "chunk_tokens": 3},
    "none, shift": {"reduction": "none", "shift": True, "temperature": True},
    "sum": {"reduction": "sum"},
    "normalizer": {"normalizer": 7.0},
    "sequence_mean": {"reduction": "sequence_mean", "chunk_tokens": 4},
}


def problem(dtype: torch.dtype, options: str = "plain") -> tuple[list[Tensor], Tensor, Any]:
    """hidden, weight, teacher's, and a mask of which a sequence and some tokens are 0."""
    heads = [
        torch.randn(3, 5, D), 1.5 * torch.randn(V, D) / D**0.5,
        torch.randn(3, 5, E), 1.5 * torch.randn(V, E) / E**0.5,
    ]  # fmt: skip
    heads = [x.to(dtype) for x in heads]
    mask = torch.rand(3, 5) * (torch.rand(3, 5) < 0.7)
    mask[0, 1], mask[2] = 1, 0
    more = dict(OPTIONS[options])
    if more.get("temperature") is True:
        more["temperature"] = 0.5 + torch.rand(3, 5)
    if more.pop("bias", False):
        more["bias"], more["teacher_bias"] = torch.randn(V).to(dtype), torch.randn(V).to(dtype)
    return heads, mask, more


def of_logits(heads: list[Tensor], mask: Tensor, kind: str, more: dict[str, Any]) -> Tensor:
    """In float64."""
    options = {k: v for k, v in more.items() if k not in ("bias", "teacher_bias", "chunk_tokens")}
    bias = [None if more.get(k) is None else more[k].double() for k in ("bias", "teacher_bias")]
    logits = [F.linear(*pair, b) for pair, b in zip((heads[:2], heads[2:]), bias, strict=True)]
    return reference.masked_divergence(*logits, mask, kind=kind, beta=0.3, **options)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_option(kind: str, options: str, dtype: torch.dtype) -> None:
    heads, mask, more = problem(dtype, options)
    wide = [x.double() for x in heads]
    leaves, truths = ([h[0], h[1]] for h in (heads, wide))
    for leaf in (*leaves, *truths):
        leaf.requires_grad_()
    weight, wide_mask = (mask.to(t).requires_grad_() for t in (torch.float32, torch.float64))
    ours = linear_divergence(*heads, weight, kind=kind, beta=0.3, **more)
    truth = of_logits(wide, wide_mask, kind, more)
    eps = torch.finfo(ours.dtype).eps
    torch.testing.assert_close(ours.double(), truth, rtol=16 * eps, atol=eps)
    upstream = torch.linspace(-1, 1, max(1, ours.numel())).view(ours.shape)
    found = torch.autograd.grad(ours, (*leaves, weight), upstream.to(ours))
    true = torch.autograd.grad(truth, (*truths, wide_mask), upstream.double())
    coarse = {torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(dtype, 80 * eps)
    for name, mine, exact in zip(("hidden", "weight", "mask"), found, true, strict=True):
        off = (mine.double() - exact).abs().max() / exact.abs().max()
        assert off <= max(coarse, torch.finfo(mine.dtype).eps), f"{name}: {off:.1e}"
    scored = F.pad(mask[:, 1:], (0, 1)) if more.get("shift") else mask
    assert (found[0][scored == 0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_not_rounded_in_between(dtype: torch.dtype) -> None:
    """A teacher close to the student: from logits of a half type the gradient is mostly noise."""
    heads, _, _ = problem(dtype)
    hidden, weight = heads[0].requires_grad_(), heads[1].requires_grad_()
    teacher = (weight + 0.03 * torch.randn(V, D) / D**0.5).detach().to(dtype)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logits, others = F.linear(*exact), F.linear(hidden.detach().double(), teacher.double())
    true = torch.autograd.grad(reference.masked_divergence(logits, others), exact)
    ours = linear_divergence(hidden, weight, hidden.detach(), teacher)
    found = torch.autograd.grad(ours, (hidden, weight))
    rounded = masked_divergence(F.linear(hidden, weight), F.linear(hidden.detach(), teacher))
    peers = torch.autograd.grad(rounded, (hidden, weight))
    for mine, theirs, exact_one in zip(found, peers, true, strict=True):
        size = exact_one.norm()
        assert (mine.double() - exact_one).norm() <= 1e-2 * size
        assert (mine.double() - exact_one).norm() < (theirs.double() - exact_one).norm()


def test_masked_hidden_states_are_never_read() -> None:
    heads, mask, _ = problem(torch.float32)
    found = []
    for fill in (0.0, float("nan")):
        h, t = (x.masked_fill((mask == 0)[..., None], fill) for x in (heads[0], heads[2]))
        h.requires_grad_()
        weight = heads[1].clone().requires_grad_()
        loss = linear_divergence(h, weight, t, heads[3], mask)
        found.append((loss.detach(), *torch.autograd.grad(loss, (h, weight))))
    for clean, dirty in zip(*found, strict=True):
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("reduction", ["none", "mean", "sequence_mean"])
def test_every_token_masked(reduction: str) -> None:
    heads, mask, _ = problem(torch.float32)
    hidden = torch.full_like(heads[0], float("nan")).requires_grad_()
    loss = linear_divergence(hidden, *heads[1:], torch.zeros_like(mask), reduction=reduction)
    assert (loss == 0).all()
    loss.sum().backward()
    assert (hidden.grad == 0).all()


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_one_token_without_dimensions(reduction: str) -> None:
    """It has a temperature of its own like any other, a tensor without dimensions."""
    heads = [torch.randn(*shape).double() for shape in ((D,), (V, D), (E,), (V, E))]
    more = {"temperature": torch.tensor(1.7), "teacher_temperature": torch.tensor(0.6)}
    hidden, mask = heads[0].requires_grad_(), torch.tensor(0.5)
    loss = linear_divergence(*heads, mask, reduction=reduction, **more)
    truth = of_logits(heads, mask, "forward_kl", {"reduction": reduction, **more})
    torch.testing.assert_close(loss, truth)
    found, true = (torch.autograd.grad(x, hidden)[0] for x in (loss, truth))
    torch.testing.assert_close(found, true)


@pytest.mark.parametrize("stats", [False, True])
def test_statistics_and_no_grad(stats: bool) -> None:
    heads, mask, _ = problem(torch.float32)
    logits = [F.linear(*pair) for pair in (heads[:2], heads[2:])]
    ours = linear_divergence(*heads, mask, chunk_tokens=4, return_stats=stats)
    truth = masked_divergence(*logits, mask, return_stats=stats)
    for mine, exact in zip(*((x[0], *x[1]) if stats else (x,) for x in (ours, truth)), strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_compiled(reduction: str) -> None:
    heads, mask, _ = problem(torch.float32)
    leaves = [x.requires_grad_() for x in heads[:2]]

    def loss(*args: Tensor) -> Tensor:
        return linear_divergence(*args, kind="jsd", reduction=reduction, chunk_tokens=4)

    found = []
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        value = call(*heads, mask)
        found.append((value.detach(), *torch.autograd.grad(value.sum(), leaves)))
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(eager, compiled)


def test_errors() -> None:
    h, w, t, u = torch.zeros(2, 3, D), torch.zeros(V, D), torch.zeros(2, 3, E), torch.zeros(V, E)
    who = "linear_divergence"
    with pytest.raises(ValueError, match=rf"{who}: weight must have shape \[V, 24\]"):
        linear_divergence(h, u, t, u)
    with pytest.raises(ValueError, match=rf"{who}: teacher_weight must have shape \[501\]"):
        linear_divergence(h, w, t, u[1:])
    with pytest.raises(TypeError, match=f"{who}: weight must be float32 like hidden, got float64"):
        linear_divergence(h, w.double(), t, u)
    with pytest.raises(ValueError, match=f"{who}: teacher_weight is not differentiable"):
        linear_divergence(h, w, t, u.clone().requires_grad_())
    with pytest.raises(ValueError, match=rf"{who}: mask must have shape \[2, 3\], got \[3\]"):
        linear_divergence(h, w, t, u, torch.ones(3))
    with pytest.raises(ValueError, match=f"{who}: chunk_tokens must be at least 1, got 0"):
        linear_divergence(h, w, t, u, chunk_tokens=0)
    with pytest.raises(ValueError, match=f"{who}: kind must be one of"):
        linear_divergence(h, w, t, u, kind="kl")


WRONG: dict[str, Any] = {
    "teacher_hidden": torch.zeros(2, 4, 3),
    "mask": torch.ones(3),
    "kind": "nope",
    "beta": 1.0,  # of a jsd
    "softcap": -1.0,
    "teacher_softcap": 0.0,
    "temperature": 0.0,
    "reduction": "avg",
}


@pytest.mark.parametrize("name", WRONG)
def test_the_same_errors_whoever_looks(name: str) -> None:
    """Eager, without a token to compute, on meta tensors, and with tangents."""
    shapes = {"hidden": (2, 3, 4), "weight": (7, 4), "teacher_hidden": (2, 3, 3)}
    given = {k: torch.zeros(v) for k, v in {**shapes, "teacher_weight": (7, 3)}.items()}
    given |= {"mask": torch.zeros(2, 3), "kind": "jsd", name: WRONG[name]}

    def with_tangents() -> Any:
        more = {k: v for k, v in given.items() if k != "hidden"}
        x = given["hidden"]
        return torch.func.jvp(lambda x: linear_divergence(x, **more), (x,), (x,))

    def on_meta() -> Any:
        return linear_divergence(
            **{k: x.to("meta") if isinstance(x, Tensor) else x for k, x in given.items()}
        )

    texts = set()
    for call in (lambda: linear_divergence(**given), with_tangents, on_meta):
        with pytest.raises(ValueError, match=r"^linear_divergence: .*got") as raised:
            call()
        texts.add(str(raised.value))
    assert len(texts) == 1


@opchecks(
    "linear_divergence", "linear_divergence_stats",
    "linear_divergence_forward", "linear_divergence_backward",
)  # fmt: skip
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_opcheck(reduction: str) -> None:
    ops = torch.ops.masked_loss
    heads, mask, _ = problem(torch.float32)
    leaves = [x.clone().requires_grad_() for x in heads[:2]]
    bounds = torch.tensor([0, 1, 4])
    more = {"reduction": reduction, "kind": "jsd", "chunk_tokens": 4, "pack": False}
    more["cu_seqlens"] = bounds
    for name in ("linear_divergence", "linear_divergence_stats"):
        torch.library.opcheck(getattr(ops, name).default, (*leaves, *heads[2:], mask), more)
    both = (heads[0], heads[1], None, heads[2], heads[3], None)
    how = (4, None, False, [True, True, False])
    kind = {"kind": "jsd", "beta": 0.3, "teacher_temperature": 2.0, "teacher_softcap": 9.0}
    kind["shift"] = True
    forward = (*both, mask, None, bounds, None, None, reduction, True, *how)
    loss, _, tokens, groups, *_ = ops.linear_divergence_forward(*forward, **kind)
    backward = (torch.ones_like(loss), *both, None, None, tokens, groups, *how)
    for name, args in {
        "linear_divergence_forward": forward, "linear_divergence_backward": backward,
    }.items():  # fmt: skip
        torch.library.opcheck(getattr(ops, name).default, args, kind)
