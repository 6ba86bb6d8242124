# SPDX-License-Identifier: BSD-3-Clause
"""The CUDA emulator notices what a device forbids; and no result depends on its order."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from accuracy import run
from cuda_emulator.build import NAMESPACE
from cuda_emulator.checks import EVERYTHING, Configure, same_bits
from samples import FEW_CASES, REDUCE_CASES, Case
from torch import Tensor

from masked_loss import masked_cross_entropy, masked_reduce

pytestmark = pytest.mark.usefixtures("emulator")

FORBIDDEN = {
    "shared memory": "a block wrote beyond its shared memory",
    "launch": "a launch with more shared memory than the kernel was allowed to take",
    "calls": "lanes of a warp wait at different calls",
    "barrier": "deadlock: some threads wait at a barrier or shuffle that others never reach",
    "cluster": "deadlock: some blocks wait for others of their cluster",
    "no cluster": "a block waits for a cluster, and is in none",
}


@pytest.mark.parametrize("fault", FORBIDDEN)
def test_what_a_device_forbids_is_noticed(fault: str, module: ModuleType) -> None:
    with pytest.raises(RuntimeError, match=FORBIDDEN[fault]):
        module.make_fault(fault, 0, 0)


def test_target_out_of_range(capfd: pytest.CaptureFixture[str]) -> None:
    for bad in (10, -1):
        with pytest.raises(RuntimeError, match="device-side assert"):
            masked_cross_entropy(torch.randn(3, 10), torch.tensor([1, bad, 2]))
        expected = f"target of token 1 is {bad}, expected 0 <= target < 10"
        assert expected in capfd.readouterr().out


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("shape", [(9, 60), (5, 3000), (3, 20_000), (1, 80_000)], ids=str)
def test_the_order_of_threads_does_not_matter(
    shape: tuple[int, int], options: dict[str, Any], configure: Configure
) -> None:
    """The same bits whatever runs first: every barrier is where it must be."""
    for dtype in (torch.float32, torch.bfloat16):
        first = None
        for seed in range(2):
            configure(seed=seed, multiprocessors=16, max_blocks=3)
            case = Case("order", shape[:1], shape[1], "odd", options=options)
            results = run(masked_cross_entropy, case.sample(dtype), return_stats=bool(options))
            first = first or results
            same_bits(first, results, f"seed {seed}")


@pytest.mark.parametrize("case", [*FEW_CASES, *REDUCE_CASES[::5]], ids=str)
def test_the_order_of_threads_does_not_matter_to_reductions(
    case: Case, configure: Configure
) -> None:
    function = masked_reduce if case.classes is None else masked_cross_entropy
    first = None
    for seed in range(3):
        configure(seed=seed, max_blocks=2)
        results = run(function, case.sample(torch.float32))
        first = first or results
        same_bits(first, results, f"seed {seed}")


OPTIONS = {"cu_seqlens": None, "temperatures": None, "stats": False, "reduction": "sum"}


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def everything_that_waits(seed: int, configure: Configure) -> list[Tensor]:
    """Results of every kernel with a barrier: reductions, rows of each team size, divergences."""
    ops = getattr(torch.ops, NAMESPACE)
    settings = {"seed": seed, "max_blocks": 2}

    def fused(rows: int, classes: int) -> list[Tensor]:
        # Neither the logits nor their gradient begin with a piece: pieces go from thread to thread.
        logits, gradient = numbers(rows, classes + 3)[:, 1:-2], torch.empty(rows, classes)
        args = gradient, logits, torch.arange(rows), None, None, None
        return [ops.cross_entropy_fused(*args, **OPTIONS)[0], gradient]

    def losses(rows: int, classes: int) -> list[Tensor]:
        args = numbers(rows, classes), torch.arange(rows), None, None, None
        return [ops.cross_entropy_forward(*args, **OPTIONS)[0]]

    def divergences(rows: int, classes: int) -> list[Tensor]:
        logits, teacher = numbers(2, rows, classes).unbind()
        tokens, groups = ops.divergence_weigh(logits, None, None, None, "sum", False, True)
        gradient = torch.empty(rows, classes)
        pair = tokens, logits, teacher, None, None, groups, None, gradient
        ops.divergence_rows(*pair, forward=True, unless_one=False, kind="jsd")
        return [tokens, gradient]

    configure(**settings)
    values, mask = numbers(9000), numbers(9000) > 0
    reduced = ops.masked_reduce_forward(values, mask, None, None, False, "mean")
    ops.cross_entropy_fused(  # what it leaves in shared memory is not zero
        numbers(3, 12288), numbers(3, 12288), torch.arange(3), None, None, None, **OPTIONS
    )
    configure(**settings, shared_per_block=64 << 10)
    rows = *fused(20, 300), *fused(9, 3001), *losses(9, 3001), *divergences(5, 1100)
    return [*reduced, *rows]


def test_no_barrier_is_missing(configure: Configure) -> None:
    """What races without one, test_emulator_watch.py finds in any order."""
    first = everything_that_waits(0, configure)
    for seed in range(1, 3):
        for ours, expected in zip(everything_that_waits(seed, configure), first, strict=True):
            assert torch.equal(ours, expected)
