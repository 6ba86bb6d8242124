# SPDX-License-Identifier: BSD-3-Clause
"""What must hold whatever the numbers are, and random problems of every kind."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from accuracy import assert_as_accurate_as_eager
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from samples import LAYOUTS, MASKS, REDUCTIONS, Case
from torch import Tensor

from masked_loss import masked_cross_entropy, masked_reduce, reference

property_test = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)


@pytest.mark.parametrize("classes", [2, 17, 1000, 16385])
def test_exact_shift_of_all_logits_changes_nothing(classes: int, device: str) -> None:
    """Logits and shift are multiples of 1/8, so that float32 holds logits + shift exactly."""
    logits = torch.randint(-80, 80, (5, classes), device=device) / 8
    target = torch.randint(classes, (5,), device=device)
    results = []
    for offset in (0.0, 1.0, -1000.0, 1e6, -1e6):
        shifted = (logits + offset).requires_grad_()
        assert torch.equal(shifted - offset, logits)
        loss = masked_cross_entropy(shifted, target, reduction="none", label_smoothing=0.1)
        results.append((loss, *torch.autograd.grad(loss.sum(), shifted)))
    for loss, gradient in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(gradient, results[0][1], rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("classes", [1, 2, 3, 8, 17, 255, 1000, 16384, 40000])
@pytest.mark.parametrize("value", [0.0, 1.0, -50.0, 1e4])
def test_equal_logits_give_the_log_of_their_number(
    value: float, classes: int, dtype: torch.dtype, device: str
) -> None:
    logits = torch.full((3, classes), value, dtype=dtype, device=device).requires_grad_()
    target = torch.tensor([0, classes // 2, classes - 1], device=device)
    loss, stats = masked_cross_entropy(logits, target, return_stats=True)
    expected = torch.tensor(math.log(classes), dtype=loss.dtype, device=device)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(stats.entropy, 3 * expected.double(), rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(loss, logits)
    one_hot = torch.nn.functional.one_hot(target, classes)
    expected = ((1 / classes - one_hot.double()) / 3).to(dtype)
    torch.testing.assert_close(gradient, expected)


def test_the_rows_of_a_gradient_add_up_to_zero(device: str) -> None:
    logits = (4 * torch.randn(6, 1000, device=device)).requires_grad_()
    target = torch.randint(1000, (6,), device=device)
    masked_cross_entropy(logits, target, label_smoothing=0.1).backward()
    assert logits.grad.double().sum(-1).abs().max() < 1e-6


@pytest.mark.parametrize("classes", [3, 33, 1000])
def test_permuted_rows_give_permuted_losses(classes: int, dtype: torch.dtype, device: str) -> None:
    """To the bit: no row knows where in the batch it is."""

    def leaf(rows: Tensor) -> Tensor:
        # On a GPU the order of a row's sums follows the pieces of 16 bytes: rows begin with one.
        padding = -classes % 8 if device != "cpu" else 0
        return torch.nn.functional.pad(rows, (0, padding))[:, :classes].requires_grad_()

    logits = leaf(torch.randn(50, classes, device=device).to(dtype))
    target = torch.randint(classes, (50,), device=device)
    mask = torch.rand(50, device=device) * (torch.rand(50, device=device) < 0.7)
    order = torch.randperm(50, device=device)
    permuted = leaf(logits.detach()[order])
    options: dict[str, Any] = {"reduction": "none", "z_loss": 0.1, "softcap": 5.0}
    loss = masked_cross_entropy(logits, target, mask, **options)
    other = masked_cross_entropy(permuted, target[order], mask[order], **options)
    assert torch.equal(loss[order], other)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    (other_gradient,) = torch.autograd.grad(other.sum(), permuted)
    assert torch.equal(gradient[order], other_gradient)


def test_permuted_classes_give_the_same_loss(device: str) -> None:
    logits = torch.randn(8, 1000, dtype=torch.float64, device=device)
    target = torch.randint(1000, (8,), device=device)
    order = torch.randperm(1000, device=device)
    loss = masked_cross_entropy(logits, target, reduction="none")
    other = masked_cross_entropy(logits[:, order], order.argsort()[target], reduction="none")
    torch.testing.assert_close(loss, other)


def test_a_masked_token_can_be_left_out(device: str) -> None:
    """No bias from how much padding there is."""
    logits, target = torch.randn(4, 6, 37, device=device), torch.randint(37, (4, 6), device=device)
    lengths = torch.tensor([6, 3, 1, 2], device=device)
    mask = torch.arange(6, device=device) < lengths[:, None]
    mean = masked_cross_entropy(logits, target, mask)
    torch.testing.assert_close(mean, masked_cross_entropy(logits[mask], target[mask]))
    padded = masked_cross_entropy(
        torch.nn.functional.pad(logits, (0, 0, 0, 50), value=float("nan")),
        torch.nn.functional.pad(target, (0, 50), value=-1),
        torch.nn.functional.pad(mask, (0, 50)),
    )
    torch.testing.assert_close(mean, padded)


def test_a_weight_of_two_is_two_tokens(device: str) -> None:
    logits, target = torch.randn(5, 9, device=device), torch.randint(9, (5,), device=device)
    mask = torch.tensor([1, 2, 0, 3, 1], device=device)
    repeated = logits.repeat_interleave(mask, 0), target.repeat_interleave(mask)
    for reduction in ("sum", "mean"):
        torch.testing.assert_close(
            masked_cross_entropy(logits, target, mask, reduction=reduction, z_loss=0.1),
            masked_cross_entropy(*repeated, reduction=reduction, z_loss=0.1),
        )


@given(data=st.data())
@property_test
def test_random_problems(data: st.DataObject) -> None:
    draw = data.draw
    reduction = draw(st.sampled_from(REDUCTIONS), "reduction")
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3), "shape"))
    classes = draw(st.integers(1, 70) | st.sampled_from([127, 129, 1000, 2049]), "classes")
    options: dict[str, Any] = {"reduction": reduction, "shift": draw(st.booleans(), "shift")}
    if draw(st.booleans(), "class weights"):
        options["class_weight"] = True
    if draw(st.booleans(), "ignore a class"):
        options["ignore_index"] = draw(st.integers(0, classes - 1))
    if reduction != "none" and draw(st.booleans(), "normalize"):
        options["normalizer"] = draw(st.sampled_from([3, 0.5, "tensor"]))
    options["label_smoothing"] = draw(st.sampled_from([0.0, 0.1, 0.9]), "label_smoothing")
    options["z_loss"] = draw(st.sampled_from([0.0, 1e-4, 0.3]), "z_loss")
    options["softcap"] = draw(st.sampled_from([None, 1.5, 30.0]), "softcap")
    case = Case(
        "random",
        shape,
        classes,
        draw(st.sampled_from(LAYOUTS), "layout"),
        draw(st.sampled_from([kind for kind in MASKS if kind != "signed"]), "mask"),
        draw(st.sampled_from([torch.int64, torch.int32]), "target"),
        options,
        draw(st.sampled_from([0.1, 3.0, 50.0]), "scale"),
    )
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    assert_as_accurate_as_eager(
        masked_cross_entropy,
        reference.masked_cross_entropy,
        case,
        dtype,
        return_stats=True,
    )


@given(data=st.data())
@property_test
def test_random_reductions(data: st.DataObject) -> None:
    draw = data.draw
    reduction = draw(st.sampled_from(REDUCTIONS), "reduction")
    options: dict[str, Any] = {"reduction": reduction}
    if reduction != "none" and draw(st.booleans(), "normalize"):
        options["normalizer"] = draw(st.sampled_from([3, 0.5, "tensor"]))
    case = Case(
        "random",
        tuple(draw(st.lists(st.integers(1, 40), min_size=2, max_size=3), "shape")),
        None,
        draw(st.sampled_from(LAYOUTS), "layout"),
        draw(st.sampled_from([kind for kind in MASKS if kind != "signed"]), "mask"),
        options=options,
    )
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    assert_as_accurate_as_eager(masked_reduce, reference.masked_reduce, case, dtype)
