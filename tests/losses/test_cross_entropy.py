# SPDX-License-Identifier: BSD-3-Clause
"""masked_cross_entropy against its specification: values, gradients, statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accuracy import assert_as_accurate_as_eager
from samples import CASES, LONG_WIDTHS, REDUCTIONS, WIDTHS, Case

from masked_loss import masked_cross_entropy, reference


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_option(case: Case, dtype: torch.dtype, device: str) -> None:
    assert_as_accurate_as_eager(
        masked_cross_entropy, reference.masked_cross_entropy, case, dtype, device
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_statistics(case: Case, device: str) -> None:
    assert_as_accurate_as_eager(
        masked_cross_entropy,
        reference.masked_cross_entropy,
        case,
        torch.float32,
        device,
        return_stats=True,
    )


@pytest.mark.parametrize("layout", ["contiguous", "odd"])
@pytest.mark.parametrize("classes", WIDTHS)
def test_every_width(classes: int, layout: str, dtype: torch.dtype, device: str) -> None:
    """Both the fused pass (a scalar loss) and the separate ones (a loss for each token)."""
    for reduction in ("mean", "none"):
        for options in ({}, {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0}):
            case = Case(
                f"{reduction}-{classes}-{layout}",
                (7,),
                classes,
                layout,
                options={"reduction": reduction, **options},
            )
            assert_as_accurate_as_eager(
                masked_cross_entropy,
                reference.masked_cross_entropy,
                case,
                dtype,
                device,
                return_stats=True,
            )


@pytest.mark.parametrize("layout", ["contiguous", "odd"])
@pytest.mark.parametrize("classes", LONG_WIDTHS)
def test_rows_of_many_segments(classes: int, layout: str, dtype: torch.dtype, device: str) -> None:
    for reduction in ("mean", "none"):
        options = {"reduction": reduction, "label_smoothing": 0.1, "class_weight": True}
        case = Case(f"{reduction}-{classes}", (3,), classes, layout, options=options)
        assert_as_accurate_as_eager(
            masked_cross_entropy, reference.masked_cross_entropy, case, dtype, device
        )


def test_logits_far_below_zero_that_fill_their_segments(device: str) -> None:
    """Behind the last segment there is no other, of which a top of 0 would leave nothing."""
    logits = torch.randn(2, 32768, device=device) - 1000
    target = torch.tensor([0, 32767], device=device)
    loss = masked_cross_entropy(logits, target, reduction="none")
    expected = torch.nn.functional.cross_entropy(logits + 1000, target, reduction="none")
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("classes", [9, 1000, 40000])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1000.0])
def test_scale_of_the_logits(scale: float, classes: int, dtype: torch.dtype, device: str) -> None:
    """From nearly uniform rows to rows whose largest logit is all that counts."""
    for reduction in ("mean", "none"):
        case = Case(f"scale-{scale}", (6,), classes, options={"reduction": reduction}, scale=scale)
        assert_as_accurate_as_eager(
            masked_cross_entropy, reference.masked_cross_entropy, case, dtype, device
        )


@pytest.mark.parametrize("rows", [1, 2, 3, 17, 1000])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_number_of_rows(rows: int, reduction: str, device: str) -> None:
    for shape in [(rows,), (rows, 3)]:
        case = Case(f"rows-{rows}", shape, 37, options={"reduction": reduction})
        assert_as_accurate_as_eager(
            masked_cross_entropy,
            reference.masked_cross_entropy,
            case,
            torch.float32,
            device,
            return_stats=True,
        )


@pytest.mark.parametrize("classes", [2, 17, 1000, 40000])
def test_float64_against_extended_precision(classes: int) -> None:
    """float64 has no wider type in PyTorch; numpy's 80-bit floats are its truth."""
    logits = 5 * torch.randn(8, classes, dtype=torch.float64)
    target = torch.randint(classes, (8,))
    wide = logits.numpy().astype(np.longdouble)
    top = wide.max(axis=1, keepdims=True)
    lse = top[:, 0] + np.log(np.exp(wide - top).sum(axis=1))
    truth = lse - wide[np.arange(8), target.numpy()]
    ours = masked_cross_entropy(logits, target, reduction="none").numpy()
    assert np.abs(ours - truth).max() <= 4 * np.finfo(np.float64).eps * np.abs(lse).max()


def test_classes_with_a_stride() -> None:
    """V that is not contiguous costs a copy, and nothing else."""
    strided = torch.randn(7, 5).t().requires_grad_()
    target = torch.tensor([0, 6, 2, 3, -100])
    loss = masked_cross_entropy(strided, target)
    copy = strided.detach().contiguous().requires_grad_()
    expected = masked_cross_entropy(copy, target)
    torch.testing.assert_close(loss, expected)
    gradients = torch.autograd.grad(loss, strided), torch.autograd.grad(expected, copy)
    torch.testing.assert_close(*gradients)


def test_strided_target_and_mask() -> None:
    logits = torch.randn(4, 6, 11)
    target = torch.randint(11, (6, 8)).t()[::2]
    mask = torch.rand(6, 8).t()[::2]
    for reduction in REDUCTIONS:
        loss = masked_cross_entropy(logits, target, mask, reduction=reduction)
        copies = target.contiguous(), mask.contiguous()
        expected = masked_cross_entropy(logits, *copies, reduction=reduction)
        torch.testing.assert_close(loss, expected)
