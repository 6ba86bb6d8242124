# SPDX-License-Identifier: BSD-3-Clause
"""What can be run of benchmarks/gpu*.py without a GPU: its check, on the emulated kernels."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from masked_loss import masked_cross_entropy

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
sys.path.append(str(Path(__file__).resolve().parents[1] / "kernels"))

import gpu_check
from cuda_emulator.build import build
from cuda_emulator.operators import emulated, load


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_the_kernels_pass_the_check(seed: int) -> None:
    """The very lines that a first run on a GPU begins with; whatever the seed."""
    load(build())
    with emulated():
        assert gpu_check.check("cpu", tokens=16, seed=seed) == []


def test_the_check_reports_every_failure() -> None:
    calls = 0

    def wrong(logits: Tensor, target: Tensor, **options: object) -> Tensor:
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            raise RuntimeError("boom")
        return masked_cross_entropy(logits, target, **options) * (1 + 1e-3 * (calls % 2))  # type: ignore[arg-type]

    found = gpu_check.check("cpu", wrong, dtypes=[torch.float32], classes=[5, 1000], tokens=8)
    assert any("boom" in line for line in found)
    assert any("two runs differ" in line for line in found)
    assert any("times as far off as allowed" in line for line in found)
    assert all(any(f"V = {v}," in line for line in found) for v in (5, 1000))
