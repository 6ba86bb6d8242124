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


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_hard_numbers_are_hard(dtype: torch.dtype) -> None:
    """Rounding down, up, or away from zero would be seen; and PyTorch rounds them the same way."""
    exact, rounded = hard_numbers(dtype)
    finite = exact.isfinite() & rounded.isfinite()
    ties = finite & (exact != rounded.float())
    assert (exact.abs() < rounded.float().abs())[ties].any()
    assert (exact.abs() > rounded.float().abs())[ties].any()
    assert torch.equal(exact.to(dtype).nan_to_num(7), rounded.nan_to_num(7))
