# SPDX-License-Identifier: BSD-3-Clause
"""The AVX2 kernels execute no more instructions than benchmarks/results/instructions.json says.

Counts are the same in every run, whatever else the machine does. Other compilers count a little
differently, hence the margin.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import instructions
import timing

MARGIN = 1.25

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(instructions.tools()), reason=f"needs {' and '.join(instructions.tools())}"
    ),
]


@pytest.fixture(scope="module")
def driver() -> Path:
    return instructions.build()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kernel", ["forward", "step"])
def test_count(driver: Path, kernel: str, dtype: str) -> None:
    noted = json.loads((timing.RESULTS / "instructions.json").read_text())["avx2"][dtype][kernel]
    assert instructions.count(driver, "avx2", kernel, dtype) <= MARGIN * noted
