# SPDX-License-Identifier: BSD-3-Clause
"""Each instruction set that this machine has runs the tests of the kernels, and is proved to run.

ATEN_CPU_CAPABILITY is read when the library is loaded, so each set has a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import masked_loss  # noqa: F401 - its operators

LOSSES = Path(__file__).resolve().parents[1] / "losses"
SUPPORTED = {
    "default": True,
    "avx2": torch.cpu._is_avx2_supported(),
    "avx512": torch.cpu._is_avx512_supported(),
}
ISAS = [isa for isa, supported in SUPPORTED.items() if supported]
HERE = torch.ops.masked_loss.cpu_capability()


def run(*command: str, capability: str | None) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("ATEN_CPU_CAPABILITY", None)
    if capability is not None:
        environment["ATEN_CPU_CAPABILITY"] = capability
    result = subprocess.run(
        [sys.executable, *command],
        cwd=LOSSES.parents[1],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert result.returncode == 0, result.stdout[-20_000:]
    return result.stdout


def capability(value: str | None) -> str:
    program = "import torch, masked_loss; print(torch.ops.masked_loss.cpu_capability())"
    return run("-c", program, capability=value).split()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != HERE])
def test_kernels(isa: str) -> None:
    """The whole operator table, in the process whose header says which kernels it runs.

    The set that this very process runs has the table without that.
    """
    output = run(
        "-m", "pytest", "-p", "no:cacheprovider", "--color=no", "-q", "-v",
        *(str(LOSSES / f"test_{story}.py") for story in (
            "cross_entropy", "masked_reduce", "semantics", "special_numbers", "statistics",
        )),
        str(Path(__file__).with_name("test_rounding.py")),
        "-k", "not number_of_rows",
        capability=isa,
    )  # fmt: skip
    assert f"masked_loss: {isa} kernels" in output
    assert " passed" in output
    assert "skipped" not in output


@pytest.mark.parametrize("isa", ISAS)
def test_capability_is_obeyed(isa: str) -> None:
    assert capability(isa) == isa


def test_capability_is_the_best_of_the_machine() -> None:
    assert capability(None) == ISAS[-1]


def test_unknown_capability_is_as_none() -> None:
    """As in PyTorch, which warns and goes on."""
    assert capability("sse9") == ISAS[-1]


def test_all_instruction_sets_agree() -> None:
    """To rounding: they add in different orders."""
    program = (
        "import torch, masked_loss\n"
        "torch.manual_seed(0)\n"
        "for dtype in (torch.float32, torch.bfloat16, torch.float16):\n"
        "    for options in ({}, {'z_loss': 0.1, 'softcap': 5.0, 'label_smoothing': 0.1}):\n"
        "        x = torch.randn(8, 5003).to(dtype).requires_grad_()\n"
        "        loss = masked_loss.masked_cross_entropy(x, torch.arange(8), **options)\n"
        "        loss.backward()\n"
        "        print(loss.item(), x.grad.double().abs().sum().item(), x.grad[3, 3].item())\n"
    )
    results = [
        torch.tensor([float(number) for number in run("-c", program, capability=isa).split()])
        for isa in ISAS
    ]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])
