# SPDX-License-Identifier: BSD-3-Clause
"""What a mask hides whatever it is, and what comes out of numbers that are not finite."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from samples import REDUCTIONS, problem
from torch import Tensor

import masked_loss
from masked_loss import masked_cross_entropy, reference

pytestmark = pytest.mark.usefixtures("on_the_device")
INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("options", [
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"reduction": "sequence_mean"},
    {"normalizer": 0},
    {"normalizer": 5.0, "reduction": "sum"},
    {"normalizer": torch.tensor(0.0)},
    {"class_weight": torch.ones(5), "label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0},
    {"shift": True},
], ids=lambda options: "-".join(options) or "mean")  # fmt: skip
@pytest.mark.parametrize("how", ["mask", "ignore_index", "both"])
def test_every_token_masked(
    how: str, options: dict[str, Any], dtype: torch.dtype, device: str
) -> None:
    """The loss is 0 and attached to the graph, the gradients are exactly 0, and a count tells."""
    options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    logits = torch.full((2, 3, 5), NAN, dtype=dtype, requires_grad=True)
    target = torch.full((2, 3), -100 if how != "mask" else 3)
    mask = torch.zeros(2, 3) if how != "ignore_index" else torch.ones(2, 3)
    mask.requires_grad_()
    loss, stats = masked_cross_entropy(logits, target, mask, return_stats=True, **options)
    assert (loss == 0).all()
    assert loss.requires_grad
    loss.sum().backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))
    assert torch.equal(mask.grad, torch.zeros_like(mask))
    assert all(value == 0 for value in stats)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shift", [False, True])
def test_masked_rows_are_never_read(
    shift: bool, reduction: str, bad: float, dtype: torch.dtype, device: str
) -> None:
    """The loss and every gradient have the bits that zeros in those rows would have given."""
    mask = torch.tensor([[1.0, 0.0, 2.0, 1.0], [0.0, 0.0, 1.0, 0.0]], device=device)
    target = torch.tensor([[1, 99, 2, -100], [99, -5, 4, 7]], device=device)
    used = (mask != 0) & (target != -100)
    if shift:
        used = torch.cat([used[:, 1:], torch.zeros_like(used[:, :1])], dim=1)
    clean = torch.randn(2, 4, 5, device=device).to(dtype) * used[..., None]
    dirty = clean.masked_fill(~used[..., None], bad)
    options: dict[str, Any] = {
        "reduction": reduction,
        "shift": shift,
        "label_smoothing": 0.1,
        "z_loss": 0.1,
        "softcap": 3.0,
        "class_weight": torch.rand(5, device=device),
        "return_stats": True,
    }
    results = []
    for logits in (clean, dirty):
        leaves = [logits.requires_grad_(), mask.clone().requires_grad_()]
        loss, stats = masked_cross_entropy(leaves[0], target, leaves[1], **options)
        results.append([loss, *stats, *torch.autograd.grad(loss.sum(), leaves)])
    for ours, expected in zip(results[1], results[0], strict=True):
        assert ours.isfinite().all()
        assert torch.equal(ours, expected)
    assert (results[1][-2][~used] == 0).all()


def test_masked_target_may_be_anything() -> None:
    logits, target = problem(4)
    target[:2] = torch.tensor([2**62, -(2**62)])
    mask = torch.tensor([0, 0, 1, 1])
    loss = masked_cross_entropy(logits, target, mask, class_weight=torch.rand(5))
    loss.backward()
    assert logits.grad.isfinite().all()


def test_negative_zero_is_a_mask() -> None:
    logits = torch.full((2, 5), NAN)
    logits[0] = 0
    loss = masked_cross_entropy(logits, torch.tensor([1, 1]), torch.tensor([1.0, -0.0]))
    torch.testing.assert_close(loss, torch.tensor(math.log(5)))


@pytest.mark.parametrize("width", [3, 40, 20000])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_active_nan_comes_out(reduction: str, width: int, dtype: torch.dtype, device: str) -> None:
    """Nothing is hidden, wherever in the row it is."""
    for column in (0, width // 2, width - 1):
        logits = torch.zeros(2, width, dtype=dtype, device=device)
        logits[1, column] = NAN
        logits.requires_grad_()
        target = torch.zeros(2, dtype=torch.long, device=device)
        loss = masked_cross_entropy(logits, target, reduction=reduction)
        assert loss.isnan().any()
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert gradient[1].isnan().all()
        assert gradient[0].isfinite().all()


def test_nan_weight_comes_out(dtype: torch.dtype) -> None:
    logits, target = problem(2)
    mask = torch.tensor([1.0, NAN], dtype=dtype)
    for reduction in ("sum", "mean"):
        assert masked_cross_entropy(logits, target, mask, reduction=reduction).isnan()


@pytest.mark.parametrize("width", [2, 17, 20000])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_row_of_minus_infinity_except_the_target(
    reduction: str, width: int, dtype: torch.dtype, device: str
) -> None:
    logits = torch.full((2, width), -INF, dtype=dtype, device=device)
    target = torch.tensor([0, width - 1], device=device)
    logits[[0, 1], target] = torch.tensor([3.0, -4.0], device=device).to(dtype)
    logits.requires_grad_()
    loss, stats = masked_cross_entropy(logits, target, reduction=reduction, return_stats=True)
    assert (loss == 0).all()
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert torch.equal(gradient, torch.zeros_like(gradient))
    assert stats.entropy == 0
    assert stats.correct == 2


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
def test_logits_of_minus_infinity_are_classes_that_cannot_be(temperature: float) -> None:
    loss_of = partial(masked_cross_entropy, temperature=temperature)
    logits, target = problem(4, classes=6)
    logits = logits.detach()
    target[:] = torch.tensor([0, 1, 2, 3])
    cut = logits.clone()
    cut[:, 4:] = -INF
    cut.requires_grad_()
    loss = loss_of(cut, target)
    torch.testing.assert_close(loss, loss_of(logits[:, :4], target))
    loss.backward()
    assert (cut.grad[:, 4:] == 0).all()
    assert cut.grad.isfinite().all()


def test_target_of_minus_infinity() -> None:
    logits = torch.tensor([[0.0, -INF, 1.0]], requires_grad=True)
    loss = masked_cross_entropy(logits, torch.tensor([1]))
    assert loss == INF
    (gradient,) = torch.autograd.grad(loss, logits)
    (expected,) = torch.autograd.grad(F.cross_entropy(logits, torch.tensor([1])), logits)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(
    "options",
    [*({"reduction": x} for x in REDUCTIONS), {"normalizer": 2.0}],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_an_infinite_loss_is_its_own_tokens(options: dict[str, Any]) -> None:
    """The weights of the others keep their gradients, unless a mean divides by the sum of all."""
    logits, target = problem(2, 3)
    logits = logits.detach()
    logits[0, 1, 2], target[0, 1] = -INF, 2
    values = torch.tensor([[1.0, INF, 2.0], [3.0, 4.0, 5.0]], dtype=torch.float64)
    teacher = torch.randn(2, 3, 5, dtype=torch.float64)
    for name, args in (
        ("masked_cross_entropy", (logits, target)),
        ("masked_divergence", (logits, teacher)),
        ("masked_reduce", (values,)),
    ):
        gradients = []
        for module in (masked_loss, reference):
            mask = torch.full((2, 3), 0.5, dtype=torch.float64, requires_grad=True)
            loss = getattr(module, name)(*args, mask, **options)
            assert not loss.isfinite().all()
            gradients += torch.autograd.grad(loss, mask, torch.ones_like(loss))
        torch.testing.assert_close(*gradients, equal_nan=True)
        assert gradients[0][1].isfinite().all() == (options != {"reduction": "mean"})


@pytest.mark.parametrize("width", [1, 3, 20000])
def test_row_of_nothing_but_minus_infinity(width: int, dtype: torch.dtype) -> None:
    logits = torch.full((2, width), -INF, dtype=dtype)
    logits[0] = 1
    target = torch.tensor([0, 0])
    loss = masked_cross_entropy(logits, target, reduction="none")
    assert F.cross_entropy(logits, target, reduction="none")[1].isnan()
    assert loss[1].isnan()
    assert loss[0].isfinite()


def test_plus_infinity_is_not_hidden() -> None:
    logits = torch.tensor([[0.0, INF, 1.0], [0.0, 1.0, 2.0]])
    loss = masked_cross_entropy(logits, torch.tensor([1, 1]), reduction="none")
    assert not loss[0].isfinite()
    assert loss[1].isfinite()
