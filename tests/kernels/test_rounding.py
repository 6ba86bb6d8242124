# SPDX-License-Identifier: BSD-3-Clause
"""Every store of a half type rounds to nearest even, bit by bit.

test_cpu_isa.py runs this file for each instruction set, test_cuda_rows.py the same for CUDA.
"""

from __future__ import annotations

import pytest
import torch
from rounding import (
    HALF_TYPES,
    Numbers,
    assert_rounds_to_nearest_even,
    hard_numbers,
    of_float_products,
)

from masked_loss import masked_cross_entropy


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_every_tie(dtype: torch.dtype, device: str) -> None:
    """As many as go around the caches."""
    numbers = hard_numbers(dtype)
    assert_rounds_to_nearest_even(
        of_float_products(numbers) if device == "cuda" else numbers, device
    )


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_small_gradients(dtype: torch.dtype, device: str) -> None:
    """Which stay in the caches."""
    exact, rounded = hard_numbers(dtype)
    numbers = Numbers(exact[::997], rounded[::997])
    assert_rounds_to_nearest_even(
        of_float_products(numbers) if device == "cuda" else numbers, device
    )


@pytest.mark.parametrize("column", [0, 17, 52], ids=["a pair", "a vector", "the tail"])
@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_every_number_is_read_as_it_is(dtype: torch.dtype, column: int, device: str) -> None:
    """Of a row with one class the z-loss is the square of its logit."""
    x = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    x = x[~x.isfinite() | ((x.abs() > 1e-18) & (x.abs() < 1e18))].to(device)
    logits = torch.full((len(x), 53), -torch.inf, dtype=dtype, device=device)
    logits[:, column] = x
    target = torch.full((len(x),), column, device=device)
    loss = masked_cross_entropy(logits, target, z_loss=1.0, reduction="none")
    expected = x.float() ** 2 + 0 * x.float()  # of an infinite logit NaN
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_hard_numbers_are_hard(dtype: torch.dtype) -> None:
    """Rounding down, up, or away from zero would be seen; and PyTorch rounds them the same way."""
    exact, rounded = hard_numbers(dtype)
    finite = exact.isfinite() & rounded.isfinite()
    ties = finite & (exact != rounded.float())
    assert (exact.abs() < rounded.float().abs())[ties].any()
    assert (exact.abs() > rounded.float().abs())[ties].any()
    assert torch.equal(exact.to(dtype).nan_to_num(7), rounded.nan_to_num(7))
