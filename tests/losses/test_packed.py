# SPDX-License-Identifier: BSD-3-Clause
"""Sequences packed one after the other and told apart by cu_seqlens: as if each had its own row."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from accuracy import assert_as_accurate_as_eager
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import OPTIONS, REDUCTIONS, Case, concrete
from threads import threads
from torch import Tensor

import masked_loss
from masked_loss import linear_cross_entropy, masked_cross_entropy, masked_reduce, reference

CLASSES, WIDTH = 11, 6
# Empty sequences, of one token, at both ends; and tokens behind the last.
BOUNDS = [0, 0, 1, 6, 6, 6, 13, 14, 17]
TOKENS = 20


def packed(*, bounds: list[int], tokens: int, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    return {
        "hidden": torch.randn(tokens, WIDTH, dtype=dtype, requires_grad=True),
        "weight": torch.randn(CLASSES, WIDTH, dtype=dtype, requires_grad=True),
        "target": torch.randint(-1, CLASSES, (tokens,)),
        "mask": (torch.rand(tokens, dtype=torch.float64) * (torch.rand(tokens) < 0.8)).to(dtype),
        "cu_seqlens": torch.tensor(bounds, dtype=torch.int32),
    }


def padded(x: Tensor, bounds: list[int], fill: float) -> Tensor:
    """[S, longest, ...]: each sequence in a row of its own."""
    longest = max(b - a for a, b in pairwise(bounds))
    rows = x.new_full((len(bounds) - 1, max(1, longest), *x.shape[1:]), fill)
    for s, (a, b) in enumerate(pairwise(bounds)):
        rows[s, : b - a] = x[a:b]
    return rows


def losses(kind: str, x: dict[str, Any], options: dict[str, Any], bounds: list[int]) -> list[Any]:
    """The loss and its gradients, packed and padded; "none" as its sum."""
    leaves = (x["hidden"], x["weight"])
    if kind == "packed":
        loss = linear_cross_entropy(**x, **options)
    elif kind == "packed logits":
        logits = x["hidden"] @ x["weight"].t()
        more = {"cu_seqlens": x["cu_seqlens"], **options}
        loss = masked_cross_entropy(logits, x["target"], x["mask"], **more)
    else:
        logits = padded(x["hidden"], bounds, 0.0) @ x["weight"].t()
        target, mask = padded(x["target"], bounds, -100), padded(x["mask"], bounds, 0.0)
        if isinstance(options.get("temperature"), Tensor):
            options = {**options, "temperature": padded(options["temperature"], bounds, 1.0)}
        loss = masked_cross_entropy(logits, target, mask, **options)
    loss = loss.sum()
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("name", [n for n in OPTIONS if n not in ("inplace", "shift")])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_packed_is_padded(reduction: str, name: str, shift: bool) -> None:
    x = packed(bounds=BOUNDS, tokens=TOKENS)
    options = concrete(OPTIONS[name], (TOKENS,), CLASSES, torch.float64)
    options |= {"reduction": reduction, "shift": shift, "ignore_index": -1}
    if reduction == "none":
        options.pop("normalizer", None)
    options.pop("inplace_backward", None)
    x["target"] = x["target"].where(x["target"] >= 0, -1)
    expected = losses("padded", {**x, "target": x["target"]}, options, BOUNDS)
    for kind in ("packed", "packed logits"):
        for ours, theirs in zip(losses(kind, x, options, BOUNDS), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_split_of_a_row_into_sequences(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(0, 40))
    cuts = data.draw(st.lists(st.integers(0, tokens), max_size=12))
    bounds = [0, *sorted(cuts)]
    torch.manual_seed(data.draw(st.integers(0, 99)))
    x = packed(bounds=bounds, tokens=tokens)
    options = {
        "reduction": data.draw(st.sampled_from(REDUCTIONS)),
        "shift": data.draw(st.booleans()),
        "ignore_index": -1,
        "z_loss": 0.1,
    }
    logits = x["hidden"] @ x["weight"].t()
    args = (logits, x["target"], x["mask"])
    ours = masked_cross_entropy(*args, cu_seqlens=x["cu_seqlens"], **options)
    theirs = reference.masked_cross_entropy(*args, cu_seqlens=x["cu_seqlens"], **options)
    torch.testing.assert_close(ours, theirs)
    if len(bounds) > 1 and tokens:
        expected = losses("padded", x, options, bounds)
        for kind in ("packed", "packed logits"):
            for a, b in zip(losses(kind, x, options, bounds), expected, strict=True):
                torch.testing.assert_close(a, b)
        values = torch.randn(tokens, dtype=torch.float64)
        for reduction in ("sum", "mean"):
            each = masked_reduce(
                values, x["mask"], reduction=reduction, dim=-1, cu_seqlens=x["cu_seqlens"]
            )
            rows, mask = padded(values, bounds, 0.0), padded(x["mask"], bounds, 0.0)
            torch.testing.assert_close(each, masked_reduce(rows, mask, reduction=reduction, dim=-1))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shift", [False, True])
def test_as_accurate_as_eager(shift: bool, reduction: str, dtype: torch.dtype, device: str) -> None:
    bounds = torch.tensor([0, 2, 2, 9, 14], device=device)
    options = {"reduction": reduction, "shift": shift, "z_loss": 0.01, "cu_seqlens": bounds}
    case = Case(f"packed-{reduction}-{shift}", (15,), options=options)
    assert_as_accurate_as_eager(
        masked_cross_entropy, reference.masked_cross_entropy, case, dtype, device
    )
    if not shift:
        options = {"reduction": reduction, "cu_seqlens": bounds}
        case = Case(f"packed-reduce-{reduction}", (15,), classes=None, options=options)
        assert_as_accurate_as_eager(masked_reduce, reference.masked_reduce, case, dtype, device)


def test_tokens_of_several_rows_are_flattened() -> None:
    """The rows of the batch are bounds of shift too: nothing scores the first token of a row."""
    logits, target = torch.randn(3, 4, CLASSES), torch.randint(CLASSES, (3, 4))
    for bounds in ([0, 4, 8, 12], [0, 2, 6, 11]):
        options = {"reduction": "none", "cu_seqlens": torch.tensor(bounds)}
        loss = masked_cross_entropy(logits, target, shift=True, **options)
        firsts = torch.zeros(12, dtype=torch.bool)
        firsts[[0, 4, 8, *[b for b in bounds if b < 12]]] = True
        firsts[bounds[-1] :] = True
        assert torch.equal(loss.flatten() == 0, firsts)


def test_gradients_of_each_sequence(dtype: torch.dtype) -> None:
    values = torch.randn(TOKENS, dtype=dtype, requires_grad=True)
    mask = torch.rand(TOKENS, requires_grad=True)
    upstream = torch.randn(len(BOUNDS) - 1)
    bounds = torch.tensor(BOUNDS)
    for reduction, normalizer in (("sum", None), ("mean", None), ("mean", 3.0)):
        each = masked_reduce(
            values, mask, reduction=reduction, normalizer=normalizer, dim=-1, cu_seqlens=bounds
        )
        ours = torch.autograd.grad(each, (values, mask), upstream.to(each))
        rows = padded(values.double(), BOUNDS, 0.0), padded(mask.double(), BOUNDS, 0.0)
        expected = masked_reduce(*rows, reduction=reduction, normalizer=normalizer, dim=-1)
        theirs = torch.autograd.grad(expected, (values, mask), upstream.double())
        torch.testing.assert_close(each.double(), expected, rtol=1e-6, atol=1e-6)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


def test_everything_masked_or_empty() -> None:
    for bounds, tokens in (([0], 0), ([0], 5), ([0, 0, 0], 0), ([0, 0, 0], 3), ([0, 3], 3)):
        logits = torch.randn(tokens, CLASSES, requires_grad=True)
        target = torch.full((tokens,), -100)
        cu_seqlens = torch.tensor(bounds)
        for reduction in REDUCTIONS:
            options = {"reduction": reduction, "cu_seqlens": cu_seqlens}
            loss = masked_cross_entropy(logits, target, **options).sum()
            assert loss == 0
            (gradient,) = torch.autograd.grad(loss, logits)
            assert (gradient == 0).all()
        values = torch.randn(tokens, requires_grad=True)
        each = masked_reduce(values, torch.zeros(tokens), dim=-1, cu_seqlens=cu_seqlens)
        assert torch.equal(each, torch.zeros(len(bounds) - 1))
        (gradient,) = torch.autograd.grad(each.sum(), values)
        assert torch.equal(gradient, torch.zeros(tokens))


@pytest.mark.parametrize("reduction", ["mean", "sequence_mean"])
def test_the_same_bits_for_any_number_of_threads(reduction: str) -> None:
    """Sequences longer and shorter than what a thread takes at a time."""
    lengths = [8191, 1, 30_000, 0, 3, 8192, 8193, 16_384, *[7] * 3000]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    values, mask = torch.randn(int(bounds[-1]) + 10), torch.rand(int(bounds[-1]) + 10)
    found = []
    for number in (1, 2, 5):
        with threads(number):
            loss = masked_reduce(values, mask, reduction=reduction, cu_seqlens=bounds)
            each = masked_reduce(values, mask, dim=-1, cu_seqlens=bounds)
        found.append((loss, each))
    truth = reference.masked_reduce(
        values.double(), mask.double(), reduction=reduction, cu_seqlens=bounds
    )
    torch.testing.assert_close(found[0][0].double(), truth)
    truth = reference.masked_reduce(values.double(), mask.double(), dim=-1, cu_seqlens=bounds)
    torch.testing.assert_close(found[0][1].double(), truth, rtol=1e-6, atol=1e-6)
    for loss, each in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert torch.equal(each, found[0][1])


def test_a_compiled_graph_takes_any_bounds() -> None:
    def step(logits: Tensor, target: Tensor, bounds: Tensor) -> Tensor:
        return masked_cross_entropy(
            logits, target, reduction="sequence_mean", shift=True, cu_seqlens=bounds
        )

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for bounds in ([0, 3, 9], [0, 1, 1, 7, 12], [0, 2, 4, 6, 8, 10]):
        logits = torch.randn(bounds[-1] + 1, CLASSES, requires_grad=True)
        target = torch.randint(CLASSES, (bounds[-1] + 1,))
        args = (logits, target, torch.tensor(bounds))
        ours, theirs = compiled(*args), step(*args)
        assert torch.equal(ours, theirs)
        assert torch.equal(*(torch.autograd.grad(x, logits)[0] for x in (ours, theirs)))


@pytest.mark.parametrize(
    ("bounds", "error", "text"),
    [
        (torch.tensor([0, 4, 3]), ValueError, r"from 0 to at most 6.* cu_seqlens\[2\] = 3 after 4"),
        (torch.tensor([1, 4]), ValueError, r"from 0 .* cu_seqlens\[0\] = 1"),
        (torch.tensor([0, 7]), ValueError, r"at most 6.* cu_seqlens\[1\] = 7 after 0"),
        (torch.tensor([[0, 6]]), ValueError, r"shape \[S \+ 1\], got \[1, 2\]"),
        (torch.tensor([], dtype=torch.long), ValueError, r"shape \[S \+ 1\], got \[0\]"),
        (torch.tensor([0.0, 6.0]), TypeError, "int64 or int32, got float32"),
        ([0, 6], TypeError, "must be a tensor, got list"),
    ],
    ids=["descending", "not from 0", "beyond", "two dimensions", "nothing", "floats", "list"],
)
def test_bad_bounds(bounds: Any, error: type[Exception], text: str) -> None:
    logits, target = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
    values, hidden, weight = torch.zeros(2, 3), torch.zeros(2, 3, 4), torch.zeros(5, 4)
    for who, call in (
        ("masked_cross_entropy", lambda: masked_cross_entropy(logits, target, cu_seqlens=bounds)),
        ("masked_reduce", lambda: masked_reduce(values, cu_seqlens=bounds)),
        (
            "linear_cross_entropy",
            lambda: linear_cross_entropy(hidden, weight, target, cu_seqlens=bounds),
        ),
    ):
        with pytest.raises(error, match=f"{who}: cu_seqlens.*{text}"):
            call()
    with pytest.raises(ValueError, match="dim must be -1 with cu_seqlens, got 0"):
        masked_reduce(values, dim=0, cu_seqlens=torch.tensor([0, 6]))


def test_modules_take_bounds_with_each_batch() -> None:
    x = packed(bounds=BOUNDS, tokens=TOKENS, dtype=torch.float32)
    options = {"reduction": "sequence_mean", "ignore_index": -1}
    logits = (x["hidden"] @ x["weight"].t()).detach()
    bounds = x["cu_seqlens"]
    args = (logits, x["target"], x["mask"])
    ours = masked_loss.MaskedCrossEntropyLoss(**options)(*args, cu_seqlens=bounds)
    assert torch.equal(ours, masked_cross_entropy(*args, cu_seqlens=bounds, **options))
    ours = masked_loss.LinearCrossEntropyLoss(**options)(**x)
    assert torch.equal(ours, linear_cross_entropy(**x, **options))
