# SPDX-License-Identifier: BSD-3-Clause
"""What every benchmark here shares: how to time, what to divide by, where results go.

A time means nothing on a machine that others use too; a ratio of two times taken side by side
does. So the candidates take turns, every round is a comparison of its own, rounds that others
disturbed are repeated, and what is reported is the median over the rounds.
"""

from __future__ import annotations

import ctypes
import inspect
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"

Call = Callable[[], object]


class Times(list[float]):
    """The seconds of one candidate, one for each round."""

    @property
    def median(self) -> float:
        return statistics.median(self)

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles, as a share of the median."""
        if len(self) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self, n=4)
        return (high - low) / 2 / self.median

    def ratio(self, other: Times) -> float:
        """How often ``self`` fits into ``other``: above 1, self is the faster one."""
        return statistics.median(b / a for a, b in zip(self, other, strict=True))


def _clock(now: Callable[[], float]) -> Callable[[Call], float]:
    def clock(call: Call) -> float:
        start = now()
        result = call()
        elapsed = now() - start
        del result  # freeing it is not part of the time
        return elapsed

    return clock


wall = _clock(time.perf_counter)
processor = _clock(time.process_time)  # does not count while others run; in all threads together


def cuda(call: Call, queueing: float = 0.0) -> float:
    """Device time of everything that ``call`` launches.

    The host takes ``queueing`` seconds to launch it. Meanwhile the device sleeps: else it would be
    the host that is timed where the problem is small.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if queueing:
        torch.cuda._sleep(int(queueing * _cuda_cycles()))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@cache
def _cuda_cycles() -> float:
    """Cycles that the device sleeps in a second."""
    cycles = 20_000_000
    return cycles / cuda(lambda: torch.cuda._sleep(cycles))


def repeated(clock: Callable[[Call], float], times: int) -> Callable[[Call], float]:
    """A clock for calls too short to be timed one by one: seconds of each of ``times``."""

    def many(call: Call) -> None:
        for _ in range(times):
            call()

    return lambda call: clock(lambda: many(call)) / times


def interleave(
    calls: Mapping[str, Call],
    *,
    rounds: int = 11,
    warmup: int = 2,
    before: Mapping[str, Call] | Call | None = None,
    clock: Callable[[Call], float] = wall,
) -> dict[str, Times]:
    """Time each call once a round, in an order that moves on from round to round.

    ``before`` runs untimed before each call (or before those it names): cold caches, fresh inputs.
    Rounds in which other processes took the processor are run again, up to half of ``rounds``
    more; the ``rounds`` with the least of that count. How long they took plays no part in this.
    """
    names = list(calls)
    found: list[tuple[float, dict[str, float]]] = []
    for i in range(-warmup, rounds + rounds // 2):
        shift = i % len(names)
        seconds = {}
        with _Others() as others:
            for name in names[shift:] + names[:shift]:
                prepare = before.get(name) if isinstance(before, Mapping) else before
                if prepare is not None:
                    prepare()
                seconds[name] = clock(calls[name])
        if i >= 0:
            found.append((others.share, seconds))
        if sum(share < _QUIET for share, _ in found) == rounds:
            break
    found.sort(key=lambda pair: pair[0])
    return {name: Times(seconds[name] for _, seconds in found[:rounds]) for name in names}


_QUIET = 0.05
_TICK = 1 / os.sysconf("SC_CLK_TCK")


class _Others:
    """Processor time that others took, in cores; 0 where the system does not say."""

    share: float

    def __enter__(self) -> _Others:
        self.begin = time.perf_counter(), self._busy() - time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        start, others = self.begin
        taken = self._busy() - time.process_time() - others
        unsure = 2 * _TICK  # the system counts in whole ticks
        self.share = max(0.0, taken - unsure) / (time.perf_counter() - start)

    @staticmethod
    def _busy() -> float:
        path = Path("/proc/stat")
        if not path.exists():
            return time.process_time()
        user, nice, system, _, _, irq, softirq, steal, *_ = path.read_text().split()[1:11]
        ticks = sum(map(int, (user, nice, system, irq, softirq, steal)))
        return ticks * _TICK


# The machine


@cache
def last_level_cache() -> int:
    """Bytes of the largest cache, 32 MiB where the system does not say."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 1 << 10, "M": 1 << 20}
    found = [s for s in (path.read_text().strip() for path in sizes) if s[-1:] in units]
    return max((int(s[:-1]) * units[s[-1]] for s in found), default=32 << 20)


@cache
def _eviction_buffer() -> torch.Tensor:
    return aligned(min(last_level_cache() * 5 // 4, 1 << 30))


def evict() -> None:
    """Leave nothing of the inputs in the caches."""
    read_memory(_eviction_buffer())


def aligned(size: int) -> torch.Tensor:
    """``size`` bytes of touched memory that begin at a cache line, in huge pages where possible."""
    huge = 2 << 20
    memory = torch.empty(size + huge, dtype=torch.uint8)
    memory = memory[-memory.data_ptr() % huge :][:size]
    ctypes.CDLL(None).madvise(ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(size), 14)
    return memory.fill_(1)


@cache
def _probe() -> ctypes.CDLL:
    """bandwidth.cpp, compiled for this machine."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "bandwidth.so"
        compiler = os.environ.get("CXX", "c++")
        flags = ["-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp"]
        subprocess.run([compiler, *flags, HERE / "bandwidth.cpp", "-o", library], check=True)
        return ctypes.CDLL(str(library))


NEAR, FAR = 2 << 10, 16 << 10  # bytes fetched ahead: one of them is as fast as memory gives


def read_memory(x: torch.Tensor, ahead: int = NEAR) -> None:
    """Load every byte of ``x`` once, with all threads, and do nothing else."""
    start, size = ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(x.nbytes)
    _probe().read_memory(start, size, torch.get_num_threads(), ctypes.c_int64(ahead))


def bandwidth(size: int = 128 << 20, rounds: int = 11) -> dict[str, float]:
    """Bytes per second that memory gives to all threads; a copy counts what it reads and writes."""
    x, y = aligned(size), aligned(size)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (y, x)]
    threads = torch.get_num_threads()
    times = interleave(
        {
            "near": lambda: read_memory(x),
            "far": lambda: read_memory(x, FAR),
            "copy": lambda: _probe().copy_memory(*pointers, ctypes.c_int64(size), threads),
        },
        rounds=rounds,
        before=evict,
    )
    read = min(times["near"].median, times["far"].median)
    return {"read": size / read, "copy": 2 * size / times["copy"].median}


def environment() -> dict[str, Any]:
    """What a result depends on and a reader should know."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return {
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "last level cache": last_level_cache(),
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


# Processes of their own, for what is chosen at start and for memory


def in_process(
    function: Callable[..., Any], *args: Any, env: Mapping[str, str] | None = None
) -> Any:
    """``function(*args)`` in a fresh interpreter; arguments and result travel as JSON."""
    file = Path(inspect.getfile(function)).resolve()
    code = (
        f"import json, sys; sys.path[:0] = {[str(file.parent), str(HERE.parent)]!r}\n"
        f"import {file.stem}\n"
        f"result = {file.stem}.{function.__name__}(*json.loads(sys.argv[1]))\n"
        "open(sys.argv[2], 'w').write(json.dumps(result))"
    )
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "result.json"
        command = [sys.executable, "-c", code, json.dumps(args), str(answer)]
        subprocess.run(command, env={**os.environ, **(env or {})}, check=True)
        return json.loads(answer.read_text())


def peak_growth(call: Call) -> int:
    """Bytes by which ``call`` makes this process grow at its peak, results included. Linux only.

    What is freed goes back to the system first: to use it again would count as nothing.
    """
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    result = call()
    grown = _status("VmHWM") - before
    del result
    return grown


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


# Results


def save(name: str, results: Mapping[str, Any]) -> Path:
    """Write results/name.json; keys that are there already and not in ``results`` stay."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**known, **results}, indent=1) + "\n")
    return path


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; the first column to the left, the others to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"
