# SPDX-License-Identifier: BSD-3-Clause
"""Rows on the CUDA emulator: every option and type, and numbers that are hard to compute with."""

from __future__ import annotations

import pytest
import torch
from accuracy import run
from cuda_emulator.build import NAMESPACE
from cuda_emulator.checks import Configure, check, same_bits
from rounding import HALF_TYPES, assert_rounds_to_nearest_even, hard_numbers, of_float_products
from samples import CASES, REDUCTIONS, Case, Sample, predictions
from torch import Tensor

from masked_loss import cross_entropy, linear_cross_entropy, masked_cross_entropy, reference

pytestmark = pytest.mark.usefixtures("emulator")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_option(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_statistics(case: Case) -> None:
    check(case, torch.float32, return_stats=True)


@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_a_device_whose_functions_are_less_exact(case: Case, configure: Configure) -> None:
    """expf and logf off as CUDA's may be, where eager PyTorch here has the C library's."""
    configure(math_errors=True)
    check(case, torch.float32, roundings=2)


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_half_types_are_rounded_to_nearest_even(dtype: torch.dtype) -> None:
    assert_rounds_to_nearest_even(of_float_products(hard_numbers(dtype), step=331))


@pytest.mark.parametrize("classes", [1, 3, 40])
def test_slope_of_a_softcap_far_out(classes: int, dtype: torch.dtype) -> None:
    """1 - tanh^2 near 1: a rounding of tanh more is many of the slope."""
    options = {"reduction": "none", "z_loss": 1e-4, "softcap": 30.0}
    check(Case(f"slope-{classes}", (30,), classes, mask="none", options=options, scale=50.0), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_probabilities(dtype: torch.dtype) -> None:
    for classes in (5, 130, 3001):
        for options in ({}, {"label_smoothing": 0.1}, {"weight": torch.rand(classes) + 0.5}):
            logits = (3 * torch.randn(6, classes)).to(dtype).requires_grad_()
            target = torch.rand(6, classes).softmax(-1).to(dtype)
            loss = cross_entropy(logits, target, **options)
            (gradient,) = torch.autograd.grad(loss, logits)
            wide = logits.detach().double().requires_grad_()
            more = {name: x.double() if isinstance(x, Tensor) else x for name, x in options.items()}
            truth = torch.nn.functional.cross_entropy(wide, target.double(), **more)
            (expected,) = torch.autograd.grad(truth, wide)
            torch.testing.assert_close(loss.double(), truth, rtol=2e-6, atol=2e-6)
            rounding = torch.finfo(dtype).eps
            atol = rounding * expected.abs().max().item()
            torch.testing.assert_close(gradient.double(), expected, rtol=rounding, atol=atol)


def test_masked_rows_are_not_read(dtype: torch.dtype) -> None:
    for reduction in REDUCTIONS:
        for classes in (9, 1500, 9000):
            case = Case("masked", (2, 4), classes, options={"reduction": reduction})
            clean, dirty = case.sample(dtype), case.sample(dtype)
            assert dirty.mask is not None
            assert dirty.target is not None
            masked = (dirty.mask == 0) | (dirty.target == -100)
            assert masked.any()
            with torch.no_grad():
                dirty.values[masked] = torch.nan
                dirty.target[masked & (dirty.mask == 0)] = 1 << 40
            same_bits(run(masked_cross_entropy, clean), run(masked_cross_entropy, dirty), "NaN")


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("classes", [3, 1500])
def test_rows_beyond_what_base_two_can_hold(classes: int, reduction: str) -> None:
    """Logits whose product with log2(e) is no float: a mask's finfo.min, a row of nothing else."""
    low = torch.finfo(torch.bfloat16).min
    logits = torch.full((4, classes), low, dtype=torch.bfloat16)
    logits[1, 1] = 2.0
    logits[2, 1] = -low
    logits[3] = torch.randn(classes)
    logits[3, ::2] = low
    sample = Sample(logits.requires_grad_(), torch.ones(4, dtype=torch.int64), None, {})
    ours = run(masked_cross_entropy, sample, reduction=reduction)
    truth = run(reference.masked_cross_entropy, sample.double(), reduction=reduction)
    torch.testing.assert_close(ours["loss"].double(), truth["loss"], rtol=1e-6, atol=1e-6)
    gradients = ours["gradient of values"].double(), truth["gradient of values"]
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-6)
    forward = masked_cross_entropy(logits.detach(), sample.target, reduction=reduction)
    torch.testing.assert_close(forward.double(), truth["loss"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("classes", [7, 1500, 9000])
def test_rows_that_are_not_finite(classes: int) -> None:
    """As the specification has it: NaN and +inf come out as NaN, -inf is a probability of 0."""
    logits = torch.randn(5, classes)
    logits[0, 3] = torch.nan
    logits[1, 2] = torch.inf
    logits[2] = -torch.inf
    logits[3] = -torch.inf
    logits[3, 1] = 2.0
    target = torch.ones(5, dtype=torch.int64)
    for return_stats in (False, True):
        sample = Sample(logits.clone().requires_grad_(), target, None, {"reduction": "none"})
        ours = run(masked_cross_entropy, sample)
        if return_stats:
            again = run(masked_cross_entropy, sample, return_stats=True)
            for name in ours:
                torch.testing.assert_close(again[name], ours[name], equal_nan=True)
        truth = run(reference.masked_cross_entropy, sample.double())
        torch.testing.assert_close(
            ours["loss"], truth["loss"].float(), equal_nan=True, rtol=1e-6, atol=1e-6
        )
        active = ours["gradient of values"][3:]
        torch.testing.assert_close(active, truth["gradient of values"][3:].float())


def test_predictions_of_rows_that_are_not_finite() -> None:
    for row, target, expected in predictions():
        _, stats = masked_cross_entropy(row[None], torch.tensor([target]), return_stats=True)
        assert stats.correct == expected, (row, target)


@pytest.mark.parametrize("classes", [7, 260, 3001])
def test_predictions_of_ties(classes: int, dtype: torch.dtype) -> None:
    """The first of equal logits wins, wherever in a row the target lies."""
    logits = torch.randint(3, (200, classes)).to(dtype)
    logits[torch.arange(200), torch.randint(classes, (200,))] = 3
    first = logits.argmax(-1)
    for target in (first, torch.randint(classes, (200,)), (first + 1) % classes):
        logits[torch.arange(200), target] = 3
        _, stats = masked_cross_entropy(logits, target, return_stats=True)
        assert stats.correct == (logits.argmax(-1) == target).sum()


def test_upstream_gradient_other_than_one() -> None:
    """The operator itself asks whether dloss is 1: on the device, in a grid that fits there."""
    ops = getattr(torch.ops, NAMESPACE)
    logits = torch.randn(40, 1000)
    target = torch.randint(1000, (40,))
    gradient = torch.empty_like(logits)
    _, _, tokens, groups = ops.cross_entropy_fused(
        gradient, logits, target, None, None, None, None, None, stats=False
    )
    once = gradient.clone()
    for scale in (1.0, 3.0):
        formula = (torch.tensor(scale), logits, target, tokens, groups, None, None)
        ops.cross_entropy_backward_out(gradient, *formula, recompute_unless_one=True)
        torch.testing.assert_close(gradient, scale * once)
    untouched = torch.full_like(logits, 7.0)
    formula = (torch.tensor(1.0), *formula[1:])
    ops.cross_entropy_backward_out(untouched, *formula, recompute_unless_one=True)
    assert (untouched == 7).all()


@pytest.mark.parametrize("bias", [False, True])
def test_linear_cross_entropy(bias: bool) -> None:
    """Chunks of logits: the gradient overwrites them in the same launch."""
    hidden = torch.randn(6, 16, requires_grad=True)
    weight = torch.randn(3000, 16, requires_grad=True)
    more = {"bias": torch.randn(3000, requires_grad=True)} if bias else {}
    target = torch.randint(3000, (6,))
    mask = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.5, 1.0])
    loss = linear_cross_entropy(hidden, weight, target, mask, **more)
    leaves = [hidden, weight, *more.values()]
    gradients = torch.autograd.grad(loss, leaves)
    logits = torch.nn.functional.linear(hidden, weight, more.get("bias"))
    truth = reference.masked_cross_entropy(logits, target, mask)
    torch.testing.assert_close(loss, truth)
    for ours, expected in zip(gradients, torch.autograd.grad(truth, leaves), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
