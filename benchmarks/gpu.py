# SPDX-License-Identifier: BSD-3-Clause
"""The CUDA kernels on one GPU: checks, times, a table, JSON and a plot, in less than 8 minutes.

    python benchmarks/gpu.py [--quick] [--check-only] [--case REGEX] [--seed 0] [--minutes 8]

First every check runs (gpu_check.py): what fails is printed, makes the exit code 1, and stops
nothing. Times are device times between two CUDA events, medians of many; the device sleeps until
the host has queued what is timed. The calls go through several sets of logits, of four times the
size of the L2 at least. Beside each time stand what this GPU takes to read the same logits
(forward's limit) or to copy them (a step's: it reads them and writes the gradient), both measured
in the same run; the time of each kernel, by the profiler; and what the call costs the host.
linear_cross_entropy stands beside the three bare products that it cannot do without. Masked tokens
have the target -100, for the peers too. A peer whose loss is wrong is reported, and not timed.
Results go to results/gpu.json, after every case, and to results/gpu.png. Two builds are compared by
gpu_ab.py.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gpu_check
import gpu_peers
import timing
import torch
import torch.nn.functional as F
from gpu_peers import OURS, Loss
from torch import Tensor

STATISTICS = {"return_stats": True}
EVERYTHING = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 30.0}
LINEAR = (8192, 4096, 128256)  # tokens, hidden size, classes
ROW_KERNELS = "(rows|forward|divergence)_kernel"


@dataclass(frozen=True)
class Case:
    tokens: int
    classes: int
    dtype: str = "bfloat16"
    masked: float = 0.0
    loss: str = "mean"  # or none, statistics, everything, log-probs, divergence

    def __str__(self) -> str:
        masked = f", {self.masked:.0%} masked" if self.masked else ""
        return f"{self.tokens} x {self.classes} {self.dtype} {self.loss}{masked}"

    def candidates(self, compile_too: bool) -> dict[str, Loss]:
        if self.loss == "log-probs":
            return gpu_peers.log_probabilities(compile_too)
        if self.loss == "divergence":
            return gpu_peers.divergences(compile_too)
        if self.loss in ("statistics", "everything"):
            options = STATISTICS if self.loss == "statistics" else EVERYTHING
            return {OURS: gpu_peers.ours(**options)}
        peers = gpu_peers.cross_entropies(self.loss, compile_too)
        return {OURS: gpu_peers.ours(reduction=self.loss), **peers}


CASES = [
    Case(tokens, classes, dtype, masked)
    for tokens, classes in [
        *((8192, v) for v in (6400, 32000, 50257, 128256, 151936)),
        *((32768, 256), (32768, 4096), (16384, 131072), (16, 151936)),
    ]
    for dtype, masked in (("bfloat16", 0.0), ("bfloat16", 0.5), ("float32", 0.0))
    if not (masked or dtype == "float32") or tokens == 8192
]
CASES += [
    Case(tokens, classes, loss=loss)
    for loss in ("none", "statistics", "everything", "log-probs", "divergence")
    for tokens, classes in ((8192, 32000), (32768, 4096), (8192, 128256))
]


# Times


def median(call: Callable[[], object], seconds: float) -> float:
    """Device seconds of one call; the first ones, which may compile, do not count."""
    call()
    torch.cuda.synchronize()
    queueing = 2 * host_seconds(call, 1)
    once = max(timing.cuda(call, queueing), 1e-5)
    times = [timing.cuda(call, queueing) for _ in range(max(5, min(200, int(seconds / once))))]
    return statistics.median(times)


def host_seconds(call: Callable[[], object], times: int = 20) -> float:
    """What a call costs the host, which does not wait for the device."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        call()
    taken = (time.perf_counter() - start) / times
    torch.cuda.synchronize()
    return taken


def kernel_seconds(call: Callable[[], object]) -> dict[str, float]:
    """Device seconds of each kernel of one call, by the profiler; none where it does not work."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    try:
        with torch.profiler.profile(activities=activities) as profile:
            call()
            torch.cuda.synchronize()
        events = profile.key_averages()
        return {e.key: e.self_device_time_total / 1e6 for e in events if e.self_device_time_total}
    except Exception as error:
        print(f"no times of single kernels ({type(error).__name__}: {error})")
        return {}


class Problem:
    """Logits, as many of them as it takes to leave nothing in the L2, and one target for all."""

    def __init__(self, case: Case) -> None:
        dtype = getattr(torch, case.dtype)
        logits, self.target = gpu_check.problem(case.tokens, case.classes, dtype, case.masked)
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        copies = -(-4 * cache // logits.nbytes) - 1
        self.all = [logits, *(logits.detach().clone().requires_grad_() for _ in range(copies))]
        self.turns: Iterator[Tensor] = itertools.cycle(self.all)

    def logits(self) -> Tensor:
        """The next ones."""
        return next(self.turns)

    def renew(self) -> None:
        """Some peers leave their gradient in the logits."""
        with torch.no_grad():
            for logits in self.all:
                logits.normal_(std=3)

    def truth(self) -> float:
        """The mean cross entropy, in float64, some rows at a time."""
        active = self.target != -100
        total = 0.0
        for rows, targets in zip(
            self.all[0].detach().split(512), self.target.split(512), strict=True
        ):
            total += F.cross_entropy(rows.double(), targets, reduction="sum").item()
        return total / int(active.sum())


def limits(p: Problem, seconds: float) -> dict[str, float]:
    """What the device takes to read the logits, and to copy them."""
    other = torch.empty_like(p.all[0])

    def read() -> Tensor:  # as 4-byte numbers, whatever they are
        return p.logits().detach().flatten().view(torch.float32).sum()

    with torch.no_grad():
        return {
            "read": median(read, seconds),
            "copy": median(lambda: other.copy_(p.logits()), seconds),
        }


def passes(loss: Loss, p: Problem) -> dict[str, Callable[[], object]]:
    def forward() -> Tensor:
        with torch.no_grad():
            return loss(p.logits(), p.target)

    def step() -> object:
        logits = p.logits()
        found = loss(logits, p.target)
        return torch.autograd.grad(found, logits, torch.ones_like(found))

    return {"forward": forward, "step": step}


def complaint(case: Case, loss: Loss, p: Problem) -> str | None:
    """What is wrong with a candidate's loss; half types may have it rounded to them."""
    if case.loss not in ("mean", "none", "statistics", "log-probs"):
        return None
    with torch.no_grad():
        values = loss(p.all[0], p.target).double()
        value = values.sum().item() / (1 if values.dim() == 0 else int((p.target != -100).sum()))
    value = -value if case.loss == "log-probs" else value
    expected, rtol = p.truth(), 1e-5 if case.dtype == "float32" else 1e-2
    if abs(value - expected) <= rtol * abs(expected):
        return None
    return f"its loss is {value:.6g}, expected {expected:.6g}"


Rows = list[dict[str, Any]]


def measure(case: Case, candidates: dict[str, Loss], seconds: float, left_out: list[str]) -> Rows:
    p = Problem(case)
    limit = limits(p, seconds)
    rows: Rows = []

    def note(name: str, what: str, call: Callable[[], object]) -> None:
        taken = median(call, seconds)
        share = limit["read" if what == "forward" else "copy"] / taken
        row = {**asdict(case), "candidate": name, "pass": what, "seconds": taken}
        row |= {"share of limit": share, "host seconds": host_seconds(call)}
        row |= {"read bytes per second": p.all[0].nbytes / limit["read"]}
        row |= {"copy bytes per second": 2 * p.all[0].nbytes / limit["copy"]}
        rows.append(row | ({"kernels": kernel_seconds(call)} if name == OURS else {}))

    for name, loss in candidates.items():
        try:
            problem_found = complaint(case, loss, p)
            if problem_found is None:
                for what, call in passes(loss, p).items():
                    note(name, what, call)
        except Exception as error:  # a peer that cannot do this shape
            problem_found = f"{type(error).__name__}: {error}"
        if problem_found is not None:
            left_out.append(f"{name}, {case}: {problem_found}")
            print(left_out[-1])
        if name != OURS:
            p.renew()
        torch.cuda.empty_cache()
    return rows


def measure_linear(seconds: float, left_out: list[str]) -> Rows:
    """From hidden states, bfloat16: against the three products that no way can do without."""
    tokens, size, classes = LINEAR
    hidden = torch.randn(tokens, size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(classes, size, device="cuda", dtype=torch.bfloat16)
    weight = weight.mul_(size**-0.5).requires_grad_()
    target = torch.randint(classes, (tokens,), device="cuda")
    case = {"tokens": tokens, "classes": classes, "dtype": "bfloat16", "pass": "linear step"}
    rows: Rows = []

    def products() -> None:
        with torch.no_grad():
            logits = hidden @ weight.t()
            logits @ weight, logits.t() @ hidden

    def note(name: str, call: Callable[[], object]) -> None:
        try:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            taken = median(call, seconds)
        except Exception as error:
            left_out.append(f"{name}, linear: {type(error).__name__}: {error}")
            print(left_out[-1])
            return
        peak = torch.cuda.max_memory_allocated() - before
        rows.append({**case, "candidate": name, "seconds": taken, "peak": peak})
        floor = rows[0]["seconds"]
        print(
            f"linear step, {name}: {timing.milliseconds(taken)}, {taken / floor:.2f} of the "
            f"products alone, peak {peak / 2**20:.0f} MiB"
        )

    note("three products", products)
    for name, loss in gpu_peers.linear().items():

        def step(loss: Loss = loss) -> object:
            return torch.autograd.grad(loss(hidden, weight, target), (hidden, weight))

        if rows:  # the floor was measured
            note(name, step)
            if name == OURS:
                rows[-1]["kernels"] = kernel_seconds(step)
    return rows


# Results


def table(rows: Rows) -> str:
    names = list(dict.fromkeys(row["candidate"] for row in rows if row["candidate"] != OURS))
    keys = ("tokens", "classes", "dtype", "masked", "loss", "pass")
    seconds = {(*(row[k] for k in keys), row["candidate"]): row["seconds"] for row in rows}
    lines = []
    for row in rows:
        if row["candidate"] != OURS:
            continue
        key = tuple(row[k] for k in keys)
        unmasked = seconds.get((*key[:3], 0.0, *key[4:], OURS))
        ratios = [seconds.get((*key, name)) for name in names]
        own = {name: t for name, t in row["kernels"].items() if re.search(ROW_KERNELS, name)}
        lines.append(
            [
                f"{row['tokens']} x {row['classes']} {row['dtype']}",
                row["loss"],
                row["pass"],
                f"{row['masked']:.0%}",
                timing.milliseconds(row["seconds"]),
                timing.milliseconds(sum(own.values())) if own else "-",
                timing.milliseconds(row["host seconds"]),
                f"{row['share of limit']:.0%}" if not row["masked"] else "",
                f"{row['seconds'] / unmasked:.2f}" if row["masked"] and unmasked else "",
                *(f"{other / row['seconds']:.2f}" if other else "-" for other in ratios),
            ]
        )
    header = ["logits", "loss", "pass", "masked", "ours", "row kernel", "host", "of limit"]
    header += ["of unmasked", *(f"{name} / ours" for name in names)]
    return timing.markdown(header, lines)


def plot(rows: Rows, title: str) -> None:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for axis, what in zip(axes, ("forward", "step"), strict=True):
        for name in dict.fromkeys(row["candidate"] for row in rows):
            wanted = (name, what, "bfloat16", 0.0, "mean", 8192)
            keys = ("candidate", "pass", "dtype", "masked", "loss", "tokens")
            points = [
                (row["classes"], row["share of limit"])
                for row in rows
                if tuple(row[k] for k in keys) == wanted
            ]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=name)
        axis.axhline(1, color="gray", linewidth=0.8)
        axis.set(xscale="log", xlabel="classes", ylim=(0, 1.1))
        axis.set_ylabel(f"share of the {'reading' if what == 'forward' else 'copying'} speed")
        axis.set_title(f"{what}, bfloat16, 8192 tokens")
    axes[0].legend()
    figure.suptitle(title)
    figure.savefig(timing.RESULTS / "gpu.png", dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few repetitions, nothing written")
    parser.add_argument("--check-only", action="store_true", help="no times")
    parser.add_argument("--case", default="", help="a regular expression: only these cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=8, help="peers are left out beyond this")
    parser.add_argument("--alone", action="store_true", help="without peers")
    parser.add_argument("--json", type=Path, help="write the times there too")
    arguments = parser.parse_args()
    cases = [case for case in CASES if re.search(arguments.case, str(case))]
    if not cases:
        parser.error(f"no case matches {arguments.case!r}; there are: {', '.join(map(str, CASES))}")
    if not torch.cuda.is_available():
        print("gpu.py: no CUDA device here")
        return 1
    start = time.monotonic()
    failures = gpu_check.check(seed=arguments.seed)
    for line in failures:
        print(f"FAILED: {line}")
    print(f"checks: {len(failures)} failed: accuracy, determinism, CUDA graph")
    if arguments.check_only:
        return 1 if failures else 0
    seconds = 0.02 if arguments.quick else 0.25
    facts = {
        **timing.environment(),
        "cuda": torch.version.cuda,
        "l2 bytes": torch.cuda.get_device_properties(0).L2_cache_size,
        "date": datetime.date.today().isoformat(),
        "seed": arguments.seed,
        "failed checks": failures,
    }
    left_out: list[str] = []
    rows: Rows = []

    def save() -> None:  # after every case: what is measured stays, whatever comes
        results = {"environment": facts, "rows": rows, "left out": left_out}
        if not arguments.quick:
            timing.save("gpu", results)
        if arguments.json:
            arguments.json.write_text(json.dumps(results))

    linear: Rows = []
    if re.search(arguments.case, "linear"):
        linear = measure_linear(seconds, left_out)
    for case in cases:
        torch.compiler.reset()  # each shape is compiled for itself; beyond eight it would not be
        # Ours always; the peers while there is time.
        late = time.monotonic() - start > 60 * arguments.minutes * 0.8
        candidates = case.candidates(compile_too=not arguments.quick)
        if late or arguments.alone:
            candidates = {name: loss for name, loss in candidates.items() if name == OURS}
        rows += measure(case, candidates, seconds, left_out)
        save()
    print(table(rows))
    print(
        "With half of the tokens masked a forward reads half of the bytes (aim: 0.55 of the time "
        "unmasked), a step moves 0.75 of them, since the zeros of its gradient are written, too."
    )
    print(f"{(time.monotonic() - start) / 60:.1f} minutes")
    rows += linear
    save()
    if not arguments.quick and not arguments.case:
        measured = [row for row in rows if "loss" in row]
        plot(measured, f"{facts['gpu']}, torch {facts['torch']}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
