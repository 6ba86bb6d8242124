# SPDX-License-Identifier: BSD-3-Clause
"""The main cases stay fast: ratios to eager PyTorch taken in one run, with generous bounds.

A time says little about a shared machine, so what is asserted is the median ratio of calls that
take turns, in processor time and on one thread: what others do does not count. pytest-benchmark
keeps our own times for whoever compares two commits: ``pytest tests/benchmarks
--benchmark-autosave``, then ``pytest-benchmark compare``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from threads import threads

pytest.importorskip("pytest_benchmark")
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import cpu
import timing

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        torch.backends.cpu.get_cpu_capability() == "DEFAULT",
        reason="the portable kernels are there to be right, not fast",
    ),
]

LARGE = cpu.Case(512, 20000, "fp32")  # 39 MiB: beyond most caches
HALF = cpu.Case(512, 20000, "bf16")
SMALL = cpu.Case(256, 1000, "fp32")
TINY = cpu.Case(4, 7, "fp32")  # what a call costs


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


# Half of what an undisturbed machine shows, or less.
FASTER: list[tuple[str, cpu.Case, float]] = [
    (cpu.FORWARD, LARGE, 2.5),
    (cpu.FORWARD, HALF, 2.0),
    (cpu.FORWARD, SMALL, 0.8),
    (cpu.STEP, LARGE, 2.5),
    (cpu.STEP, HALF, 2.0),
    (cpu.STEP, SMALL, 0.8),
    (cpu.STEP, TINY, 0.7),
    (cpu.INPLACE, LARGE, 2.5),
    (cpu.INPLACE, HALF, 2.0),
]


def reached(ratio: Callable[[int], float], bound: float) -> float:
    """The ratio; one that misses the bound is measured again, longer, before it counts."""
    found = ratio(5)
    return found if found >= bound else max(found, ratio(15))


@pytest.mark.parametrize(
    ("measure", "case", "bound"), FASTER, ids=[f"{m}-{c.name}" for m, c, _ in FASTER]
)
def test_faster_than_eager(benchmark: Any, measure: str, case: cpu.Case, bound: float) -> None:
    inputs = case.inputs()
    ours: Callable[..., Any] = cpu.masked_cross_entropy
    kind, own, prepare = cpu.step, inputs, None
    if measure == cpu.FORWARD:
        kind = cpu.forward
    elif measure == cpu.INPLACE:
        ours = cpu.ours_inplace
        own, prepare = cpu.restorable(inputs)
    calls = {"ours": kind(ours, own), "eager": kind(cpu.idiom, inputs)}
    clock = timing.repeated(timing.processor, 20) if case in (SMALL, TINY) else timing.processor
    before = {"ours": prepare} if prepare else None

    def ratio(rounds: int) -> float:
        times = timing.interleave(calls, rounds=rounds, before=before, clock=clock)
        return times["ours"].ratio(times["eager"])

    found = reached(ratio, bound)
    benchmark.extra_info["times faster than eager"] = round(found, 2)
    benchmark.pedantic(calls["ours"], setup=prepare, rounds=5)
    assert found >= bound


@pytest.mark.parametrize("measure", [cpu.FORWARD, cpu.STEP])
def test_masked_rows_save_time(benchmark: Any, measure: str) -> None:
    kind = cpu.forward if measure == cpu.FORWARD else cpu.step
    calls = {
        share: kind(cpu.masked_cross_entropy, LARGE.inputs(masked=masked))
        for share, masked in (("none", 0.0), ("nearly all", 0.9))
    }

    def ratio(rounds: int) -> float:
        times = timing.interleave(calls, rounds=rounds, clock=timing.processor)
        return times["nearly all"].ratio(times["none"])

    found = reached(ratio, 1.3)
    benchmark.extra_info["none masked / nine tenths masked"] = round(found, 2)
    benchmark.pedantic(calls["nearly all"], rounds=5)
    assert found >= 1.3


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("loss", ["ours", "ours, in place"])
def test_peak_memory(loss: str) -> None:
    """A step adds one gradient to the logits, in place nothing; and 1 MiB."""
    gradient = LARGE.size if loss == "ours" else 0
    peak = timing.in_process(cpu.measure_memory, LARGE, loss)
    assert peak <= gradient + (1 << 20)
