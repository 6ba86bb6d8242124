# SPDX-License-Identifier: BSD-3-Clause
"""What the tests on the emulated device ask of a result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accuracy import Results, assert_as_accurate_as_eager
from samples import Case

from masked_loss import masked_cross_entropy, reference

Configure = Callable[..., None]

EVERYTHING: dict[str, Any] = {
    "label_smoothing": 0.1,
    "z_loss": 0.01,
    "softcap": 5.0,
    "class_weight": True,
}


def same_bits(a: Results, b: Results, what: str) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), f"{what}: {name}"


def check(case: Case, dtype: torch.dtype, **more: Any) -> None:
    """A cross-entropy as exact as eager PyTorch's, and one rounding more."""
    if "softcap" in case.options and dtype != torch.float64:
        more.setdefault("roundings", 2)  # its tanh is of ex2.approx, which is always off here
    assert_as_accurate_as_eager(
        masked_cross_entropy, reference.masked_cross_entropy, case, dtype, **more
    )
