# SPDX-License-Identifier: BSD-3-Clause
"""masked_reduce and masked_mean against their specification."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_as_accurate_as_eager
from samples import REDUCE_CASES, REDUCTIONS, Case

import masked_loss
from masked_loss import masked_mean, masked_reduce, reference

NAN = float("nan")


@pytest.mark.parametrize("case", REDUCE_CASES, ids=str)
def test_every_option(case: Case, dtype: torch.dtype, device: str) -> None:
    assert_as_accurate_as_eager(masked_reduce, reference.masked_reduce, case, dtype, device)


def test_masked_mean_is_the_mean() -> None:
    values, mask = torch.randn(4, 7), torch.rand(4, 7) < 0.5
    assert torch.equal(masked_mean(values, mask), masked_reduce(values, mask, reduction="mean"))
    torch.testing.assert_close(masked_mean(values, mask), values[mask].mean())


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_without_a_mask(reduction: str) -> None:
    values = torch.randn(4, 7)
    expected = {"none": values, "sum": values.sum()}.get(reduction, values.mean())
    torch.testing.assert_close(masked_reduce(values, reduction=reduction), expected)


@pytest.mark.parametrize("steps", [8191, 8192, 8193, 16_385])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_around_what_a_thread_takes_at_a_time(reduction: str, steps: int) -> None:
    values, mask = torch.randn(2, steps).double(), torch.rand(2, steps).double()
    leaves = values.requires_grad_(), mask.requires_grad_()
    found = []
    for function in (masked_reduce, reference.masked_reduce):
        loss = function(*leaves, reduction=reduction)
        found.append((loss, *torch.autograd.grad(loss.sum(), leaves)))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")])
def test_masked_values_are_never_read(bad: float, reduction: str) -> None:
    values = torch.tensor([[1.0, bad, 3.0], [bad, bad, bad]], requires_grad=True)
    mask = torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 0.0]], requires_grad=True)
    clean = values.detach().where(mask != 0, 0).requires_grad_()
    loss = masked_reduce(values, mask, reduction=reduction)
    expected = masked_reduce(clean, mask, reduction=reduction)
    assert loss.isfinite().all()
    assert torch.equal(loss, expected)
    ours = torch.autograd.grad(loss.sum(), (values, mask))
    theirs = torch.autograd.grad(expected.sum(), (clean, mask))
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    assert (ours[0][mask == 0] == 0).all()
    assert (ours[1][mask == 0] == 0).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_active_nan_comes_out(reduction: str) -> None:
    values = torch.tensor([[1.0, NAN], [2.0, 3.0]])
    assert masked_reduce(values, torch.ones(2, 2), reduction=reduction).isnan().any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_value_masked(reduction: str) -> None:
    values = torch.full((2, 3), NAN, requires_grad=True)
    loss = masked_reduce(values, torch.zeros(2, 3), reduction=reduction)
    assert (loss == 0).all()
    loss.sum().backward()
    assert (values.grad == 0).all()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("normalizer", [0, 5, torch.tensor(0.0)])
def test_every_value_masked_with_a_normalizer(
    normalizer: float | torch.Tensor, reduction: str
) -> None:
    values = torch.full((2, 3), NAN, requires_grad=True)
    loss = masked_reduce(values, torch.zeros(2, 3), reduction=reduction, normalizer=normalizer)
    assert (loss == 0).all()
    loss.sum().backward()
    assert (values.grad == 0).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
def test_empty(shape: tuple[int, ...], reduction: str) -> None:
    values = torch.zeros(shape, requires_grad=True)
    loss = masked_reduce(values, torch.zeros(shape), reduction=reduction)
    assert loss.shape == (shape if reduction == "none" else ())
    assert (loss == 0).all()
    loss.sum().backward()
    assert values.grad.shape == shape


def test_dtype_of_the_result(dtype: torch.dtype) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    values = torch.ones(3, dtype=dtype, requires_grad=True)
    for reduction in REDUCTIONS:
        loss = masked_reduce(values, torch.ones(3), reduction=reduction)
        assert loss.dtype == wide
        (gradient,) = torch.autograd.grad(loss.sum(), values)
        assert gradient.dtype == dtype


def test_half_values_are_added_in_float32() -> None:
    values = torch.full((5000,), 1.001, dtype=torch.bfloat16)
    torch.testing.assert_close(masked_reduce(values), values.double().mean().float())
    assert masked_reduce(torch.full((70000,), 1.0, dtype=torch.float16), reduction="sum") == 70000


def test_reduced_loss() -> None:
    """The bug this library is named after: the mask of a loss that is a scalar already."""
    logits, target = torch.randn(6, 5), torch.randint(5, (6,))
    mask = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 0.0])
    reduced = torch.nn.functional.cross_entropy(logits, target)
    for call in (
        lambda: masked_mean(reduced, mask),
        lambda: masked_reduce(reduced, mask),
        lambda: masked_reduce(reduced, mask, reduction="sum"),
    ):
        with pytest.raises(masked_loss.ReducedLossError, match=r"reduction=.none."):
            call()
    assert issubclass(masked_loss.ReducedLossError, ValueError)
    kept = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(
        masked_mean(kept, mask), masked_loss.masked_cross_entropy(logits, target, mask)
    )


def test_scalar_with_a_scalar_mask() -> None:
    value, mask = torch.tensor(3.0), torch.tensor(0.5)
    assert masked_reduce(value, mask, reduction="sum") == 1.5
    assert masked_reduce(value) == 3


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("dim", [-1, 0, (0, 1), (1, 2)])
@pytest.mark.parametrize("normalizer", [None, 3])
def test_some_dimensions(
    reduction: str, dim: int | tuple[int, ...], normalizer: float | None, dtype: torch.dtype
) -> None:
    values = torch.randn(2, 3, 4).to(dtype)
    mask = torch.rand(2, 3, 4) * (torch.rand(2, 3, 4) < 0.7)
    mask[0, 0] = 0  # a sequence without a token
    dirty = values.masked_fill(mask == 0, NAN).requires_grad_()
    mask.requires_grad_()
    ours = masked_reduce(dirty, mask, reduction=reduction, dim=dim, normalizer=normalizer)
    weighted = mask.double() * values.double()
    denominator = normalizer or (mask.double().sum(dim) if reduction == "mean" else 1)
    expected = (weighted.sum(dim) / denominator).nan_to_num(0)
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(ours, expected.to(ours.dtype))
    for gradient in torch.autograd.grad(ours.sum(), (dirty, mask)):
        assert gradient.isfinite().all()
        assert (gradient[mask == 0] == 0).all()


def test_sequence_sums_are_those_of_the_mean() -> None:
    values, mask = torch.randn(4, 7), torch.rand(4, 7) < 0.5
    means = masked_reduce(values, mask, dim=-1)
    torch.testing.assert_close(means.mean(), masked_reduce(values, mask, reduction="sequence_mean"))


def test_dimensions_of_a_reduction_that_has_none() -> None:
    values = torch.zeros(2, 3)
    for reduction in ("none", "sequence_mean"):
        with pytest.raises(ValueError, match=r"masked_reduce: dim needs reduction .*, got"):
            masked_reduce(values, reduction=reduction, dim=-1)
    with pytest.raises(ValueError, match=r"masked_reduce: normalizer must .* got shape \[2\]"):
        masked_reduce(values, normalizer=torch.ones(2), dim=-1)
    with pytest.raises(IndexError, match="Dimension out of range"):
        masked_reduce(values, dim=2)
    with pytest.raises(ValueError, match=r"masked_reduce: mask must have shape \[2, 3\]"):
        masked_reduce(values, torch.zeros(3), dim=-1)
