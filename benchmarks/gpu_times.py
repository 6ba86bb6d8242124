# SPDX-License-Identifier: BSD-3-Clause
"""How benchmarks/gpu.py takes times and memory on the device."""

from __future__ import annotations

import contextlib
import re
import signal
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

import timing
import torch


def median(call: Callable[[], object], seconds: float) -> float:
    """Device seconds of one call; the first ones, which may compile, do not count."""
    call()
    torch.cuda.synchronize()
    queueing = 2 * host_seconds(call, 1)
    once = max(timing.cuda(call, queueing), 1e-5)
    times = [timing.cuda(call, queueing) for _ in range(max(5, min(200, int(seconds / once))))]
    return statistics.median(times)


def host_seconds(call: Callable[[], object], times: int = 9) -> float:
    """What a call costs the host, which does not wait for the device."""
    taken = []
    for _ in range(times):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(taken)


def kernel_seconds(call: Callable[[], object], times: int = 3) -> dict[str, float]:
    """Device seconds of each kernel of one call, by the profiler; none where it does not work."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    found: dict[str, float] = defaultdict(float)
    try:
        with torch.profiler.profile(activities=activities, acc_events=True) as profile:
            for _ in range(times):
                call()
            torch.cuda.synchronize()
        for event in profile.key_averages():
            if event.self_device_time_total:
                found[plain(event.key)] += event.self_device_time_total / 1e6 / times
    except Exception as error:
        print(f"no times of single kernels ({type(error).__name__}: {error})")
    return dict(found)


def plain(kernel: str) -> str:
    """Its name without namespaces and arguments, as far as it has these."""
    name = re.search(r"(\w+)[<(]", kernel)
    return name[1] if name else kernel


@contextlib.contextmanager
def patience(seconds: float) -> Iterator[None]:
    """A TimeoutError in what takes longer, once it is back in Python."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def peak_bytes(call: Callable[[], object]) -> int:
    """By which the memory of the device grows in a call, at its peak."""
    call()  # may compile and try things out
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def l2_bytes() -> int:
    return torch.cuda.get_device_properties(0).L2_cache_size
