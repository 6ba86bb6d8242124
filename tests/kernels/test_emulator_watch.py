# SPDX-License-Identifier: BSD-3-Clause
"""The CUDA kernels with each access of memory watched, on the emulator.

"address": beyond a tensor, which on a device may go unnoticed. "accesses": a byte that two threads
of one launch touch, and one of them writes, with no barrier of both between, so that a result
depends on which of them comes first.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_emulator.build import CXX, ROOT, build

pytestmark = pytest.mark.slow

CALLS = """
import sys
from pathlib import Path
import torch
from cuda_emulator.operators import emulated, load
from masked_loss import (
    linear_cross_entropy, masked_cross_entropy, masked_divergence, masked_reduce, token_log_probs)

module = load(Path(sys.argv[1]))
settings = module.Settings()
settings.multiprocessors = 16  # rows are few: they are cut into parts
settings.max_blocks = 3  # and blocks take several, one after the other
torch.set_num_threads(1)

def rows(tokens, classes, dtype, first, reduction, inplace, **options):
    # Of exactly their size: what is read beyond is beyond the allocation.
    logits = torch.randn(tokens * classes + first, dtype=dtype)[first:].view(tokens, classes)
    logits.requires_grad_()
    mask = torch.ones(tokens)
    mask[1::3] = 0
    loss = masked_cross_entropy(
        logits * 1 if inplace else logits, torch.arange(tokens), mask,
        reduction=reduction, inplace_backward=inplace, **options)
    (3 * loss.sum()).backward()

def pairs(dtype, teacher_dtype, first, inplace, kind):
    # As above. Few are kept in shared memory, so that the others are read from where they are.
    settings.shared_per_block = 64 << 10
    module.configure(settings)
    student, teacher = (
        torch.randn(4 * 1101 + first).to(of)[first:].view(4, 1101) for of in (dtype, teacher_dtype))
    student.requires_grad_()
    loss = masked_divergence(
        student * 1 if inplace else student, teacher, torch.tensor([1.0, 0, 1, 1]),
        kind=kind, inplace_backward=inplace)
    (3 * loss).backward()
    settings.shared_per_block = 227 << 10
    module.configure(settings)

def calls():
    for shape in ((5000,), (3, 3049), (300, 2)):
        masked_reduce(torch.randn(shape, requires_grad=True), reduction="sequence_mean").backward()
    student, teacher = torch.randn(9, 700, requires_grad=True), torch.randn(9, 700)
    masked_divergence(student, teacher, kind="jsd", return_stats=True)[0].backward()
    for kind in ("forward_kl", "jsd"):
        for dtype in (torch.float32, torch.bfloat16):
            for first in (0, 1):
                pairs(dtype, dtype, first, False, kind)
                pairs(dtype, dtype, first, True, kind)
            pairs(dtype, torch.float16, 1, False, kind)
    token_log_probs(student, torch.arange(27).view(9, 3)).sum().backward()
    shard = {"vocab_group": "", "bounds": [0, 3001]}
    for name in ("sharded_cross_entropy_stats", "sharded_token_log_probs_entropy"):
        logits = torch.randn(9, 3001, requires_grad=True)
        call = getattr(torch.ops.masked_loss, name)
        call(logits, torch.arange(9), **shard)[0].sum().backward()
    for tokens, classes in ((9, 37), (9, 3001), (2, 40_001)):
        for dtype in (torch.float32, torch.bfloat16):
            for first in (0, 1):
                rows(tokens, classes, dtype, first, "mean", False)
                rows(tokens, classes, dtype, first, "none", first == 1)
        rows(tokens, classes, torch.bfloat16, 1, "mean", True, softcap=5.0, label_smoothing=0.1)
    settings.shared_per_block = 8 << 10  # which a row does not fit into: a cluster shares it
    module.configure(settings)
    for dtype in (torch.float32, torch.bfloat16):
        rows(9, 6001, dtype, 1, "mean", dtype == torch.bfloat16)
    settings.shared_per_block = 227 << 10
    module.configure(settings)
    hidden, weight = torch.randn(6, 16, requires_grad=True), torch.randn(3000, 16)
    linear_cross_entropy(hidden, weight.requires_grad_(), torch.arange(6)).backward()

if sys.argv[2] == "fault":
    numbers = torch.zeros(5)
    module.make_fault(sys.argv[3], numbers.data_ptr(), len(numbers))
with emulated():
    for barrier in sys.argv[3:] if sys.argv[2] == "missing" else [""]:
        settings.missing_barrier = barrier
        module.configure(settings)
        try:
            calls()
        except RuntimeError as error:
            if not barrier or "no barrier of both" not in str(error):
                raise
        else:
            print("all calls made", barrier)
"""

# What is watched, a fault of faults.cu, and what is said of it.
FAULTS = [
    ("address", "beyond", "heap-buffer-overflow"),
    ("accesses", "race", "wrote, and no barrier of both lies between"),
    ("accesses", "cluster race", "no barrier of both lies between"),
    ("accesses", "order", "wrote, and no barrier of both lies between"),
]


def barriers() -> list[str]:
    """Every line of the kernels that waits: file and number."""
    return [
        f"{path.name}:{number}"
        for path in sorted((ROOT / "csrc" / "kernels" / "cuda").iterdir())
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(r"__(syncthreads|syncwarp|cluster_barrier_wait)\(\)", line)
    ]


def run(watch: str, what: str = "", *names: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'kernels'}"}
    environment["OMP_NUM_THREADS"] = "1"
    if watch == "address":
        command = [*CXX, "-print-file-name=libasan.so"]
        library = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if not Path(library).is_absolute():
            pytest.skip("the compiler has no address sanitizer")
        # What Python and torch leave at exit is not the kernels'.
        environment |= {"LD_PRELOAD": library, "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-c", CALLS, str(build(watch=watch)), what, *names]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("watch", ["address", "accesses"])
def test_nothing_is_found(watch: str) -> None:
    result = run(watch)
    assert result.stdout.endswith("all calls made \n"), result.stderr[-3000:]


@pytest.mark.parametrize(("watch", "fault", "complaint"), FAULTS)
def test_a_fault_is_found(watch: str, fault: str, complaint: str) -> None:
    result = run(watch, "fault", fault)
    assert complaint in result.stderr
    assert "all calls made" not in result.stdout


def test_a_missing_barrier_is_noticed() -> None:
    """Of each barrier: with it left out, two threads race. None is there without need."""
    assert barriers()
    result = run("accesses", "missing", *barriers())
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout == ""
