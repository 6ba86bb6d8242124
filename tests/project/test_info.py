# SPDX-License-Identifier: BSD-3-Clause
"""python -m masked_loss.info says what a bug report needs, and the issue template asks for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import masked_loss
from masked_loss import info

ROOT = Path(__file__).resolve().parents[2]


def test_it_runs() -> None:
    output = subprocess.run(
        [sys.executable, "-m", "masked_loss.info"], check=True, capture_output=True, text=True
    ).stdout
    lines = dict(line.split("  ", 1) for line in output.splitlines())
    found = {name.strip(): value.strip() for name, value in lines.items()}
    assert found.keys() == info.info().keys()
    assert found["masked_loss"] == masked_loss.__version__
    assert found["torch"] == torch.__version__
    assert found["cpu kernels"].split()[0] == torch.ops.masked_loss.cpu_capability()


@pytest.mark.parametrize(
    ("of_nvcc", "shown"), [("", "none"), ("800", "sm_80"), ("800,900,1200", "sm_80 sm_90 sm_120")]
)
def test_architectures(of_nvcc: str, shown: str) -> None:
    assert info._cuda_kernels(of_nvcc) == shown


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKED_LOSS_KEEP_MEMORY", "0")
    assert "MASKED_LOSS_KEEP_MEMORY=0" in info.info()["environment"]


def test_a_machine_without_a_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert info.info()["driver"] == "none found"


def test_issue_template_asks_for_it() -> None:
    template = (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text()
    assert "python -m masked_loss.info" in template
