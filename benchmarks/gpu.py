# SPDX-License-Identifier: BSD-3-Clause
"""The CUDA kernels on one GPU: checks, times, a table, JSON and a plot, in less than 8 minutes.

    python benchmarks/gpu.py [--quick] [--minutes 8]

Times are device times between two CUDA events, medians of many; the device sleeps until the host
has queued what is timed. The calls go through several sets of logits, of four times the size of the
L2 at least. Beside each time stands what this GPU's own copy takes for the same bytes, measured in
the same run: forward reads the logits once, which is half of a copy of them; a step (loss and
gradient) reads them once and writes the gradient once, which is one copy. Masked tokens have the
target -100, for the peers too. A peer whose loss is wrong is reported, and not timed.
Results go to results/gpu.json, after every case, and to results/gpu.png.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import timing
import torch
import torch.nn.functional as F
from torch import Tensor

from masked_loss import linear_cross_entropy, masked_cross_entropy, reference

TOKENS = 8192
CLASSES = [6400, 32000, 50257, 128256, 151936]
DTYPES = [torch.bfloat16, torch.float32]
MASKED = [0.0, 0.5]
HIDDEN = 4096

Loss = Callable[[Tensor, Tensor], Tensor]


# Candidates: logits and target in, the mean loss of the tokens that take part out.


def peers(compile_too: bool) -> dict[str, Loss]:
    found: dict[str, Loss] = {"PyTorch eager": F.cross_entropy}
    if compile_too:
        found["PyTorch compiled"] = torch.compile(F.cross_entropy, dynamic=False)
    adapters: dict[str, tuple[str, Callable[[Any], Loss]]] = {
        "Liger": (
            "liger_kernel.transformers.functional",
            lambda m: lambda x, t: m.liger_cross_entropy(x, t, ignore_index=-100),
        ),
        "quack": (
            "quack.cross_entropy",
            lambda m: lambda x, t: m.cross_entropy(x, t, reduction="mean", ignore_index=-100),
        ),
        "flash-attn": (
            "flash_attn.ops.triton.cross_entropy",
            lambda m: lambda x, t: m.cross_entropy_loss(x, t)[0].sum() / (t != -100).sum(),
        ),
    }
    for name, (module, adapt) in adapters.items():
        try:
            found[name] = adapt(importlib.import_module(module))
        except Exception as error:  # a package may be there and not work here
            print(f"{name}: left out ({type(error).__name__}: {error})")
    return found


def ours(logits: Tensor, target: Tensor) -> Tensor:
    return masked_cross_entropy(logits, target)


# Checks


def problem(classes: int, dtype: torch.dtype, masked: float, tokens: int = TOKENS) -> list[Tensor]:
    logits = torch.empty(tokens, classes, dtype=dtype, device="cuda").normal_(std=3)
    target = torch.randint(classes, (tokens,), device="cuda")
    if masked:
        target[torch.rand(tokens, device="cuda") < masked] = -100
    return [logits.requires_grad_(), target]


def check() -> None:
    """Loss and gradient against float64, twice the same bits, and a step in a CUDA graph."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for classes in (5, 1000, 6400, 50257):
            logits, target = problem(classes, dtype, 0.5, tokens=64)
            target[0] = 1  # at least one takes part
            results = []
            for _ in range(2):
                loss = ours(logits, target)
                results.append((loss.detach(), *torch.autograd.grad(loss, logits)))
            for first, second in zip(*results, strict=True):
                assert torch.equal(first, second), f"{dtype}, V = {classes}: two runs differ"
            wide = logits.detach().double().requires_grad_()
            truth = reference.masked_cross_entropy(wide, target)
            (gradient,) = torch.autograd.grad(truth, wide)
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(results[0][0].double(), truth, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(
                results[0][1].double(), gradient, rtol=4 * eps, atol=eps * gradient.abs().max()
            )
    logits, target = problem(1000, torch.float32, 0.5, tokens=64)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = torch.autograd.grad(ours(logits, target), logits)[0]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.autograd.grad(ours(logits, target), logits)[0]
    captured.zero_()
    graph.replay()
    torch.testing.assert_close(captured, expected, rtol=0, atol=0)
    print("checks passed: accuracy, determinism, CUDA graph")


# Times


def median(call: Callable[[], object], seconds: float) -> float:
    """Device seconds of one call; the first ones, which may compile, do not count."""
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    queueing = 2 * (time.perf_counter() - start)
    torch.cuda.synchronize()
    once = max(timing.cuda(call, queueing), 1e-5)
    times = [timing.cuda(call, queueing) for _ in range(max(5, min(200, int(seconds / once))))]
    return statistics.median(times)


class Problem:
    """Logits, as many of them as it takes to leave nothing in the L2, and one target for all."""

    def __init__(self, classes: int, dtype: torch.dtype, masked: float) -> None:
        logits, self.target = problem(classes, dtype, masked)
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
        """The mean loss, in float64, some rows at a time."""
        active = self.target != -100
        total = 0.0
        for rows, targets in zip(
            self.all[0].detach().split(512), self.target.split(512), strict=True
        ):
            total += F.cross_entropy(rows.double(), targets, reduction="sum").item()
        return total / int(active.sum())


def copy_seconds(p: Problem, seconds: float) -> float:
    """What the device takes to copy the logits."""
    other = torch.empty_like(p.all[0])
    with torch.no_grad():
        return median(lambda: other.copy_(p.logits()), seconds)


def passes(loss: Loss, p: Problem) -> dict[str, Callable[[], object]]:
    def forward() -> Tensor:
        with torch.no_grad():
            return loss(p.logits(), p.target)

    def step() -> object:
        logits = p.logits()
        return torch.autograd.grad(loss(logits, p.target), logits)

    return {"forward": forward, "step": step}


def backward(p: Problem) -> Callable[[], object]:
    """The gradient alone, as after a loss for each token."""
    losses = [masked_cross_entropy(logits, p.target, reduction="none") for logits in p.all]
    upstream = torch.ones_like(losses[0])
    turns = itertools.cycle(zip(losses, p.all, strict=True))
    return lambda: torch.autograd.grad(*next(turns), upstream, retain_graph=True)


def complaint(loss: Loss, p: Problem) -> str | None:
    """What is wrong with a candidate's loss; half types may have it rounded to them."""
    with torch.no_grad():
        value = loss(p.all[0], p.target).item()
    expected, rtol = p.truth(), 1e-5 if p.all[0].dtype == torch.float32 else 1e-2
    if abs(value - expected) <= rtol * abs(expected):
        return None
    return f"its loss is {value:.6g}, expected {expected:.6g}"


def measure(
    classes: int,
    dtype: torch.dtype,
    masked: float,
    candidates: dict[str, Loss],
    seconds: float,
    left_out: list[str],
) -> list[dict[str, Any]]:
    p = Problem(classes, dtype, masked)
    copy = copy_seconds(p, seconds)
    case = {"classes": classes, "dtype": str(dtype).removeprefix("torch."), "masked": masked}
    rows = []

    def note(name: str, what: str, taken: float) -> None:
        rate = 2 * p.all[0].nbytes / copy
        share = (copy / 2 if what == "forward" else copy) / taken
        rows.append(
            {**case, "candidate": name, "pass": what, "seconds": taken}
            | {"share of copy": share, "copy bytes per second": rate}
        )

    for name, loss in candidates.items():
        try:
            problem_found = complaint(loss, p)
            if problem_found is None:
                for what, call in passes(loss, p).items():
                    note(name, what, median(call, seconds))
                if loss is ours:
                    note(name, "backward", median(backward(p), seconds))
        except Exception as error:  # a peer that cannot do this shape
            problem_found = f"{type(error).__name__}: {error}"
        if problem_found is not None:
            left_out.append(f"{name}, {case}: {problem_found}")
            print(left_out[-1])
        if loss is not ours:
            p.renew()
        torch.cuda.empty_cache()
    return rows


def measure_linear(seconds: float, left_out: list[str]) -> list[dict[str, Any]]:
    """From hidden states: against cut-cross-entropy, which never sees logits either."""
    hidden = torch.randn(TOKENS, HIDDEN, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(CLASSES[3], HIDDEN, device="cuda", dtype=torch.bfloat16)
    weight = weight.mul_(HIDDEN**-0.5).requires_grad_()
    target = torch.randint(CLASSES[3], (TOKENS,), device="cuda")
    rows = []

    def cut(*args: Tensor) -> Tensor:
        return importlib.import_module("cut_cross_entropy").linear_cross_entropy(*args)  # type: ignore[no-any-return]

    for name, loss in {"ours": linear_cross_entropy, "cut-cross-entropy": cut}.items():

        def step(loss: Callable[..., Tensor] = loss) -> object:
            return torch.autograd.grad(loss(hidden, weight, target), (hidden, weight))

        try:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            taken = median(step, seconds)
        except Exception as error:
            left_out.append(f"{name}: {type(error).__name__}: {error}")
            print(left_out[-1])
            continue
        peak = torch.cuda.max_memory_allocated() - before
        rows.append({"candidate": name, "pass": "linear step", "seconds": taken, "peak": peak})
        print(f"linear step, {name}: {timing.milliseconds(taken)}, peak {peak / 2**20:.0f} MiB")
    return rows


# Results


def find(rows: list[dict[str, Any]], **wanted: Any) -> float | None:
    for row in rows:
        if all(row.get(name) == value for name, value in wanted.items()):
            return row["seconds"]  # type: ignore[no-any-return]
    return None


def table(rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(row["candidate"] for row in rows if row["candidate"] != "ours"))
    lines = []
    for row in rows:
        if row["candidate"] != "ours" or "classes" not in row:
            continue
        key = {name: row[name] for name in ("classes", "dtype", "masked", "pass")}
        unmasked = find(rows, **{**key, "masked": 0.0}, candidate="ours")
        ratios = [find(rows, **key, candidate=name) for name in names]
        lines.append(
            [
                f"{TOKENS} x {row['classes']} {row['dtype']}",
                row["pass"],
                f"{row['masked']:.0%}",
                timing.milliseconds(row["seconds"]),
                f"{row['share of copy']:.0%}" if not row["masked"] else "",
                f"{row['seconds'] / unmasked:.2f}" if row["masked"] and unmasked else "",
                *(f"{other / row['seconds']:.2f}" if other else "-" for other in ratios),
            ]
        )
    header = ["logits", "pass", "masked", "ours", "of copy", "of unmasked"]
    return timing.markdown([*header, *(f"{name} / ours" for name in names)], lines)


def plot(rows: list[dict[str, Any]], title: str) -> None:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for axis, what in zip(axes, ("forward", "step"), strict=True):
        for name in dict.fromkeys(row["candidate"] for row in rows):
            points = [
                (row["classes"], row["share of copy"])
                for row in rows
                if (row["candidate"], row["pass"], row.get("dtype"), row.get("masked"))
                == (name, what, "bfloat16", 0.0)
            ]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=name)
        axis.axhline(1, color="gray", linewidth=0.8)
        axis.set(xscale="log", xlabel="classes", ylabel="share of the copy's speed", ylim=(0, 1.1))
        axis.set_title(f"{what}, bfloat16, {TOKENS} tokens")
    axes[0].legend()
    figure.suptitle(title)
    figure.savefig(timing.RESULTS / "gpu.png", dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few repetitions, nothing written")
    parser.add_argument("--minutes", type=float, default=8, help="peers are left out beyond this")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu.py: no CUDA device here")
        return 1
    start = time.monotonic()
    check()
    seconds = 0.02 if arguments.quick else 0.25
    facts = {
        **timing.environment(),
        "cuda": torch.version.cuda,
        "l2 bytes": torch.cuda.get_device_properties(0).L2_cache_size,
        "date": datetime.date.today().isoformat(),
    }
    left_out: list[str] = []

    def save() -> None:  # after every case: what is measured stays, whatever comes
        if not arguments.quick:
            timing.save("gpu", {"environment": facts, "rows": rows, "left out": left_out})

    others = peers(compile_too=not arguments.quick)
    rows = measure_linear(seconds, left_out)
    for dtype, classes in itertools.product(DTYPES, CLASSES):
        torch.compiler.reset()  # each shape is compiled for itself; beyond eight it would not be
        for masked in MASKED:
            # Ours always; the peers while there is time.
            late = time.monotonic() - start > 60 * arguments.minutes * 0.8
            candidates = {"ours": ours, **({} if late else others)}
            rows += measure(classes, dtype, masked, candidates, seconds, left_out)
            save()
    print(table(rows))
    print(
        "With half of the tokens masked a forward reads half of the bytes (aim: 0.55 of the time "
        "unmasked), a step moves 0.75 of them, since the zeros of its gradient are written, too."
    )
    print(f"{(time.monotonic() - start) / 60:.1f} minutes")
    if not arguments.quick:
        plot([row for row in rows if "classes" in row], f"{facts['gpu']}, torch {facts['torch']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
