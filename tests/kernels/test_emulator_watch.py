# SPDX-License-Identifier: BSD-3-Clause
"""The CUDA kernels with each access of memory watched, on the emulator.

"address": beyond a tensor, which on a device may go unnoticed. "accesses": a byte that two blocks
of one launch touch and one of them writes, so that a result depends on which of them comes first.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_emulator.build import CXX, ROOT, build

pytestmark = pytest.mark.slow

CALLS = """
import sys
import torch
from cuda_emulator.operators import emulated, load
from masked_loss import linear_cross_entropy, masked_cross_entropy, masked_reduce

module = load(__import__("pathlib").Path(sys.argv[1]))
settings = module.Settings()
settings.multiprocessors = 16  # rows are few: they are cut into parts
module.configure(settings)
torch.set_num_threads(1)

def rows(tokens, classes, dtype, first, reduction, inplace, **options):
    # Of exactly their size: what is read beyond is beyond the allocation.
    logits = torch.randn(tokens * classes + first, dtype=dtype)[first:].view(tokens, classes)
    logits.requires_grad_()
    mask = torch.ones(tokens)
    mask[1] = 0
    loss = masked_cross_entropy(
        logits * 1 if inplace else logits, torch.arange(tokens), mask,
        reduction=reduction, inplace_backward=inplace, **options)
    (3 * loss.sum()).backward()

if len(sys.argv) > 2:
    numbers = torch.zeros(5)
    module.make_fault(sys.argv[2], numbers.data_ptr(), len(numbers))
with emulated():
    for tokens, classes in ((9, 37), (5, 3001), (2, 40_001)):
        for dtype in (torch.float32, torch.bfloat16):
            for first in (0, 1):
                rows(tokens, classes, dtype, first, "mean", False)
                rows(tokens, classes, dtype, first, "none", first == 1)
        rows(tokens, classes, torch.bfloat16, 1, "mean", True, softcap=5.0, label_smoothing=0.1)
    for shape in ((5000,), (3, 2049), (300, 2)):
        masked_reduce(torch.randn(shape, requires_grad=True), reduction="sequence_mean").backward()
    hidden, weight = torch.randn(6, 16, requires_grad=True), torch.randn(3000, 16)
    linear_cross_entropy(hidden, weight.requires_grad_(), torch.arange(6)).backward()
print("all calls made")
"""

# What is watched: a fault of faults.cu, and what is said of it.
FAULTS = {
    "address": ("beyond", "heap-buffer-overflow"),
    "accesses": ("race", "what another block of the launch"),
}


def run(module: Path, watch: str, *fault: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'kernels'}"}
    environment["OMP_NUM_THREADS"] = "1"
    if watch == "address":
        command = [*CXX, "-print-file-name=libasan.so"]
        library = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if not Path(library).is_absolute():
            pytest.skip("the compiler has no address sanitizer")
        # What Python and torch leave at exit is not the kernels'.
        environment |= {"LD_PRELOAD": library, "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-c", CALLS, str(module), *fault]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("watch", FAULTS)
def test_nothing_is_found(watch: str) -> None:
    result = run(build(watch=watch), watch)
    assert result.stdout.endswith("all calls made\n"), result.stderr[-3000:]


@pytest.mark.parametrize("watch", FAULTS)
def test_a_fault_is_found(watch: str) -> None:
    fault, complaint = FAULTS[watch]
    result = run(build(watch=watch), watch, fault)
    assert complaint in result.stderr
    assert "all calls made" not in result.stdout
