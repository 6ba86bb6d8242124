# SPDX-License-Identifier: BSD-3-Clause
"""tools/cuda_model.py: what it says of the L2, and its table beside what a GPU took."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))

import cuda_model
from cuda_model import Prediction, Problem

FORWARD, FUSED = (Problem(8192, 32000, "bfloat16", fused) for fused in (False, True))
FOUND = {
    p: Prediction("rows_kernel", 1, {"H100": 2e-4, "H200": 1e-4}, {}) for p in (FORWARD, FUSED)
}


def test_the_l2_lets_go_what_is_beyond_its_size_and_at_last_everything() -> None:
    sizes = [1e6, 34e6, 35e6, 50e6, 70e6, 1e9]
    shares = [cuda_model.lost(size) for size in sizes]
    assert shares[:2] == [0, 0]
    assert shares == sorted(shares)
    assert 0 < shares[2] < 0.1
    assert 0.99 < shares[-1] < 1


def measured(monkeypatch: pytest.MonkeyPatch, *gpus: str, **changes: Any) -> str:
    row = {"tokens": 8192, "classes": 32000, "dtype": "bfloat16", "pass": "step", "loss": "mean"}
    row |= {"masked": 0.0, "candidate": "ours", "kernels": {"rows_kernel": 4e-4, "zero": 9.0}}
    environment = {"date": "2026-11-26", "command": "gpu.py"}
    runs = [{"environment": environment | {"gpu": gpu}, "rows": [row | changes]} for gpu in gpus]
    monkeypatch.setattr(cuda_model, "results", lambda: runs)
    return cuda_model.table(FOUND)


def test_predictions_stand_beside_what_the_same_gpu_took(monkeypatch: pytest.MonkeyPatch) -> None:
    text = measured(monkeypatch, "NVIDIA H100 80GB HBM3")
    case = "| 8192 x 32000 bfloat16"
    assert f"{case} | forward | 2.62 (78%) | 5.24 (109%) | - | - |" in text
    assert f"{case} | fused | 5.24 (157%) | 10.49 (218%) | 2.62 (78%) | +100% |" in text
    assert "on 2026-11-26, `gpu.py`" in text


def test_each_gpu_has_columns_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    text = measured(monkeypatch, "NVIDIA H200", "NVIDIA H100 80GB HBM3")
    assert "H100, measured | prediction off by | H200, measured | prediction off by |" in text
    assert "| 2.62 (78%) | +100% | 2.62 (55%) | +300% |" in text
    assert "on an NVIDIA H100 80GB HBM3 on 2026-11-26, `gpu.py`, and on an NVIDIA H200" in text


@pytest.mark.parametrize("gpus", [[], ["NVIDIA A100"]], ids=["none", "other"])
def test_predictions_stand_alone(monkeypatch: pytest.MonkeyPatch, gpus: list[str]) -> None:
    text = measured(monkeypatch, *gpus)
    assert "measured" not in text
    assert "| 8192 x 32000 bfloat16 | forward | 2.62 (78%) | 5.24 (109%) |\n" in text


@pytest.mark.parametrize("other", [{"candidate": "Liger"}, {"masked": 0.5}, {"loss": "none"}])
def test_other_rows_are_not_taken_for_the_kernel(
    monkeypatch: pytest.MonkeyPatch, other: dict[str, Any]
) -> None:
    assert "+100%" not in measured(monkeypatch, "NVIDIA H100", **other)
