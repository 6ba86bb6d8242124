# SPDX-License-Identifier: BSD-3-Clause
"""masked_moments and masked_whiten against torch.var_mean of what is not masked.

Over several ranks: test_distributed.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from masked_loss import masked_moments, masked_whiten

NAN = float("nan")


def problem(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values far from 0, whose masked ones are NaN."""
    values, mask = 100 + torch.randn(6, 9), torch.rand(6, 9) < 0.6
    mask[2] = False
    mask[3] = torch.arange(9) == 4
    return values.masked_fill(~mask, NAN).to(dtype), mask


@pytest.mark.parametrize("correction", [0, 1, 0.5])
def test_moments(dtype: torch.dtype, device: str, correction: float) -> None:
    values, mask = (x.to(device) for x in problem(dtype))
    mean, var, count = masked_moments(values, mask, correction=correction)
    active = values[mask].double()
    truth = torch.var_mean(active, correction=correction)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert mean.dtype == var.dtype == wide
    assert count.dtype == torch.float64
    torch.testing.assert_close(var.double(), truth[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(mean.double(), truth[1], rtol=1e-7, atol=0)
    assert count == mask.sum()


@pytest.mark.parametrize("dim", [-1, 0, 1, (0, 1), (1,)])
def test_dimensions(dim: int | tuple[int, ...]) -> None:
    values, mask = problem(torch.float64)
    moments = masked_moments(values, mask, dim=dim, correction=1)
    together = dim == (0, 1)
    rows = values[None].flatten(1) if together else values if dim in (-1, 1, (1,)) else values.t()
    masks = mask[None].flatten(1) if together else mask if dim in (-1, 1, (1,)) else mask.t()
    for i, (row, active) in enumerate(zip(rows, masks, strict=True)):
        ours = [m if together else m[i] for m in moments]
        n = int(active.sum())
        var = row[active].var() if n > 1 else torch.zeros(())
        mean = row[active].mean() if n else torch.zeros(())
        for got, truth in zip(ours, (mean, var, n), strict=True):
            torch.testing.assert_close(got, torch.as_tensor(truth).double())


def test_weights_count_like_repetitions() -> None:
    values, times = torch.randn(5).double(), torch.tensor([1, 3, 0, 2, 1])
    repeated = values.repeat_interleave(times)
    for mask in (times, times.float(), times.to(torch.uint8)):
        mean, var, count = masked_moments(values, mask, correction=1)
        torch.testing.assert_close(mean, repeated.mean())
        torch.testing.assert_close(var, repeated.var())
        assert count == 7


@pytest.mark.parametrize("shape", [(), (3,), (0,), (2, 0)])
def test_nothing_active_is_zero_and_attached(shape: tuple[int, ...]) -> None:
    values = torch.full(shape, NAN, requires_grad=True)
    moments = masked_moments(values, torch.zeros(shape))
    assert [m.item() for m in moments] == [0, 0, 0]
    (moments[0] + moments[1]).backward()
    assert (values.grad == 0).all()
    assert (masked_whiten(values, torch.zeros(shape)) == 0).all()


def test_a_count_of_correction_or_less_has_no_variance() -> None:
    values = torch.tensor([3.0, 5.0], requires_grad=True)
    mean, var, count = masked_moments(values, torch.tensor([1, 0]), correction=1)
    assert (mean.item(), var.item(), count.item()) == (3, 0, 1)
    mean, var, count = masked_moments(values, correction=2)
    assert (mean.item(), var.item(), count.item()) == (4, 0, 2)
    (gradient,) = torch.autograd.grad(var, values)
    assert (gradient == 0).all()


def test_moments_are_differentiable() -> None:
    values = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(4, 5, dtype=torch.float64)
    mask = (mask * (mask > 0.3)).requires_grad_()

    def moments(values: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return masked_moments(values, mask.where(mask > 0.3, 0), dim=-1, correction=0.5)

    assert torch.autograd.gradcheck(moments, (values, mask))


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten(dtype: torch.dtype, device: str, shift_mean: bool) -> None:
    values, mask = (x.to(device) for x in problem(dtype))
    white = masked_whiten(values, mask, shift_mean=shift_mean, correction=1)
    active = values[mask].double()
    truth = (active - active.mean()) / (active.var() + 1e-8).sqrt()
    truth = truth if shift_mean else truth + active.mean()
    torch.testing.assert_close(white[mask].double(), truth, rtol=1e-6, atol=1e-6)
    assert (white[~mask] == 0).all()
    assert white.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_statistics_are_constants_in_backward() -> None:
    values, mask = problem(torch.float32)
    values.requires_grad_()
    upstream = torch.randn_like(values)
    masked_whiten(values, mask, eps=0.25).backward(upstream)
    std = (values[mask].detach().double().var(correction=0) + 0.25).sqrt()
    expected = (upstream.double() / std).where(mask, 0).float()
    torch.testing.assert_close(values.grad, expected)


def test_one_value_becomes_zero() -> None:
    for correction in (0, 1):
        white = masked_whiten(torch.tensor([3.0, NAN]), torch.tensor([1, 0]), correction=correction)
        assert white.tolist() == [0, 0]


def test_compiled() -> None:
    values, mask = problem(torch.float32)

    def step(values: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return masked_whiten(values, mask), *masked_moments(values, mask, dim=-1)

    for ours, truth in zip(
        torch.compile(step, fullgraph=True, backend="aot_eager")(values, mask),
        step(values, mask),
        strict=True,
    ):
        torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("function", [masked_moments, masked_whiten])
def test_errors(function) -> None:
    who, values = function.__name__, torch.zeros(2, 3)
    with pytest.raises(TypeError, match=f"{who}: values must be a tensor, got list"):
        function([1.0])
    with pytest.raises(TypeError, match=f"{who}: values must be float64, .*, got int64"):
        function(values.long())
    with pytest.raises(TypeError, match=f"{who}: mask must be a tensor, got list"):
        function(values, [1])
    with pytest.raises(TypeError, match=f"{who}: mask must be bool, .*, got complex64"):
        function(values, values.to(torch.complex64))
    with pytest.raises(ValueError, match=rf"{who}: mask must have shape \[2, 3\], got \[3\]"):
        function(values, values[0])
    with pytest.raises(ValueError, match=f"{who}: correction must be at least 0, got -1"):
        function(values, correction=-1)
    for option in ("correction", "eps"):
        with pytest.raises(TypeError, match=f"masked_whiten: {option} must be a number, got str"):
            masked_whiten(values, **{option: "1"})
    with pytest.raises(ValueError, match="masked_whiten: eps must be at least 0, got -1"):
        masked_whiten(values, eps=-1)
    with pytest.raises(IndexError, match="Dimension out of range"):
        masked_moments(values, dim=2)
