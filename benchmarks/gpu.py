# SPDX-License-Identifier: BSD-3-Clause
"""The CUDA kernels on one GPU: checks, times, tables, JSON and a plot, in a few minutes.

    python benchmarks/gpu.py [--quick] [--check-only] [--case REGEX] [--seed 0] [--minutes 5]

First every check runs (gpu_check.py): what fails is printed, makes the exit code 1, and stops
nothing. Times are device times between two CUDA events, medians of many; the device sleeps until
the host has queued what is timed. The calls go through several sets of logits, of four times the
size of the L2 at least. Beside each time stand the bytes that cannot but be moved, which the tables
compare with what this GPU reads or copies of large tensors; the time of each kernel, by the
profiler; and what the call costs the host.
linear_cross_entropy stands beside the three bare products that it cannot do without. Masked tokens
have the target -100, for the peers too.

Ours is measured in every case, then the peers, as far as --minutes go. What is timed is compared
with float64 before, the loss and some rows of the gradient: a candidate that is wrong, or takes
more than PATIENCE seconds, is reported, and not timed. A whole run is written to results/gpu.json,
after every case, and drawn by gpu_report.py. gpu_ab.py compares two builds.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import gpu_check
import gpu_peers
import gpu_report
import timing
import torch
from gpu_peers import Loss
from gpu_report import OURS, PRODUCTS
from gpu_times import host_seconds, kernel_seconds, l2_bytes, median, patience, peak_bytes
from torch import Tensor

from masked_loss import reference
from masked_loss.info import info

EVERYTHING = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 30.0}
LINEAR = (8192, 4096, 128256)  # tokens, hidden size, classes
DEVICE = "cuda"
COMPILED_TOKENS = 8192  # only these cases are compiled, which takes some seconds each
PATIENCE = 45.0
CHECKED_ROWS = 16


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
        compile_too &= self.tokens == COMPILED_TOKENS
        if self.loss == "log-probs":
            return gpu_peers.log_probabilities(compile_too)
        if self.loss == "divergence":
            return gpu_peers.divergences(compile_too)
        if self.loss == "statistics":  # nobody else has them
            return {OURS: gpu_peers.ours(return_stats=True)}
        if self.loss == "everything":
            peers = gpu_peers.with_options(compile_too, **EVERYTHING)
            return {OURS: gpu_peers.ours(**EVERYTHING), **peers}
        peers = gpu_peers.cross_entropies(self.loss, compile_too)
        return {OURS: gpu_peers.ours(reduction=self.loss), **peers}

    def reference(self, x: Tensor, t: Tensor) -> Tensor:
        """Of each token."""
        if self.loss == "log-probs":
            return reference.token_log_probs(x, t)  # type: ignore[return-value]
        if self.loss == "divergence":
            return reference.masked_divergence(x, t, reduction="none")  # type: ignore[return-value]
        options: dict[str, Any] = EVERYTHING if self.loss == "everything" else {}
        return reference.masked_cross_entropy(x, t, reduction="none", **options)  # type: ignore[return-value]


def all_cases() -> Iterator[Case]:
    for classes in (32000, 128256, 50257, 151936, 6400):
        yield Case(8192, classes)
        yield Case(8192, classes, masked=0.5)
        yield Case(8192, classes, "float32")
    for tokens, classes in ((32768, 256), (32768, 4096), (16384, 131072), (16, 151936)):
        yield Case(tokens, classes)
    for loss in ("none", "log-probs", "divergence", "statistics", "everything"):
        for tokens, classes in ((8192, 32000), (8192, 128256), (32768, 4096)):
            yield Case(tokens, classes, loss=loss)


CASES = list(all_cases())


# What is measured of it


class Problem:
    """Logits, as many of them as it takes to leave nothing in the L2, and one target for all."""

    def __init__(self, case: Case) -> None:
        self.case = case
        dtype = getattr(torch, case.dtype)
        logits, self.target = gpu_check.problem(
            case.tokens, case.classes, dtype, case.masked, DEVICE
        )
        self.active = int((self.target != -100).sum())
        if case.loss == "divergence":
            self.target = torch.empty_like(logits, requires_grad=False).normal_(std=3)  # a teacher
        copies = -(-4 * l2_bytes() // logits.nbytes)
        self.all = [torch.empty_like(logits).requires_grad_() for _ in range(copies)]
        self.turns: Iterator[Tensor] = itertools.cycle(self.all)
        self.renew()

    def logits(self) -> Tensor:
        """The next ones."""
        return next(self.turns)

    def renew(self) -> None:
        """Fill the logits, always with the same: some peers leave their gradient in them."""
        generator = torch.Generator(DEVICE).manual_seed(0)
        with torch.no_grad():
            self.all[0].normal_(std=3, generator=generator)
            for logits in self.all[1:]:
                logits.copy_(self.all[0])

    @cached_property
    def truth(self) -> float:
        """The mean over the tokens, in float64, some rows at a time."""
        with torch.no_grad():
            pieces = zip(self.all[0].split(512), self.target.split(512), strict=True)
            wide = ((x.double(), t.double() if t.is_floating_point() else t) for x, t in pieces)
            return sum(self.case.reference(*pair).sum().item() for pair in wide) / self.active

    @cached_property
    def rows(self) -> slice:
        """The rows whose gradient is looked at, here and there."""
        return slice(None, None, -(-self.case.tokens // CHECKED_ROWS))

    @cached_property
    def gradient(self) -> Tensor:
        """Of the losses' sum, in float64, with respect to these rows."""
        x = self.all[0].detach()[self.rows].double().requires_grad_()
        t = self.target[self.rows]
        loss = self.case.reference(x, t.double() if t.is_floating_point() else t).sum()
        return torch.autograd.grad(loss, x)[0]

    def bytes(self, what: str) -> dict[str, float]:
        """That a forward reads, or a step copies: masked rows are not read, but zeros written."""
        size, active = float(self.all[0].nbytes), 1 - self.case.masked
        teacher = size if self.case.loss == "divergence" else 0.0
        if what == "forward":
            return {"bytes read": teacher + active * size, "bytes copied": 0.0}
        return {"bytes read": teacher, "bytes copied": (1 + active) * size}


def limits(size: int = 2 << 30) -> dict[str, float]:
    """Bytes a second of PyTorch's sum and copy of a large tensor; a copy's count twice."""
    x = torch.ones(size // 4, device=DEVICE)
    y = torch.empty_like(x)
    return {"read": size / median(x.sum, 0.25), "copy": 2 * size / median(lambda: y.copy_(x), 0.25)}


def forward(loss: Loss, p: Problem) -> Tensor:
    with torch.no_grad():
        return loss(p.logits(), p.target)


def step(loss: Loss, p: Problem) -> tuple[Tensor, ...]:
    logits = p.logits()
    found = loss(logits, p.target)
    return torch.autograd.grad(found, logits, torch.ones_like(found))


PASSES = {"forward": forward, "step": step}


def complaint(name: str, loss: Loss, p: Problem) -> str | None:
    """What is wrong with a candidate's loss, or with its gradient: what is timed, run once.

    A peer may round its loss to a half type, and log-probabilities before it takes the exponential.
    """
    truth, expected = p.truth, p.gradient
    values = forward(loss, p).double()
    p.renew()
    averaged = values.dim() == 0
    value = values.sum().item() / (1 if averaged else p.active)
    exact = name == OURS or p.case.dtype == "float32"
    if not abs(value - truth) <= (1e-5 if exact else 1e-2) * abs(truth):
        return f"its loss is {value:.6g}, expected {truth:.6g}"
    (gradient,) = step(loss, p)
    found = gradient[p.rows].double() * (p.active if averaged else 1)
    peers = (1e-3, 1e-5) if p.case.dtype == "float32" else (0.1, 1e-4)
    dtype = getattr(torch, p.case.dtype)
    worst = gpu_check.excess(
        found, expected, *(gpu_check.allowed(dtype) if name == OURS else peers)
    )
    return f"its gradient is {worst:.3g} times as far off as allowed" if worst > 1 else None


Rows = list[dict[str, Any]]


class Benchmark:
    """What was measured so far."""

    def __init__(self, seconds: float, minutes: float) -> None:
        self.seconds = seconds
        self.end = time.monotonic() + 60 * minutes
        self.rows: Rows = []
        self.linear: Rows = []
        self.left_out: list[str] = []

    @property
    def late(self) -> bool:
        return time.monotonic() > self.end

    def leave_out(self, name: str, why: str) -> None:
        self.left_out.append(f"{name}: {why}")
        print(self.left_out[-1], flush=True)

    @contextlib.contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """To measure a candidate, which may fail: a peer may not be able to do this shape."""
        try:
            with patience(PATIENCE):
                yield
        except Exception as error:
            self.leave_out(name, f"{type(error).__name__}: {error}")
        torch.cuda.empty_cache()

    def case(self, case: Case, candidates: dict[str, Loss]) -> None:
        if not candidates:
            return
        p = Problem(case)
        for name, loss in candidates.items():
            with self.attempt(f"{name}, {case}"):
                if (wrong := complaint(name, loss, p)) is not None:
                    raise ValueError(wrong)
                for what, call in PASSES.items():
                    self.rows.append(self.row(p, name, what, partial(call, loss, p)))
            if name != OURS:
                p.renew()

    def row(self, p: Problem, name: str, what: str, call: Callable[[], object]) -> dict[str, Any]:
        row = {**asdict(p.case), "candidate": name, "pass": what}
        row |= {"seconds": median(call, self.seconds), "host seconds": host_seconds(call)}
        row |= p.bytes(what)
        return row | ({"kernels": kernel_seconds(call)} if name == OURS else {})

    def linear_case(self, peers: bool) -> None:
        """From hidden states, bfloat16: against the three products that no way can do without."""
        tokens, size, classes = LINEAR
        hidden = torch.randn(tokens, size, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.randn(classes, size, device=DEVICE, dtype=torch.bfloat16)
        weight = weight.mul_(size**-0.5).requires_grad_()
        target = torch.randint(classes, (tokens,), device=DEVICE)

        def products() -> None:
            with torch.no_grad():
                logits = hidden @ weight.t()
                logits @ weight, logits.t() @ hidden

        def step(loss: Loss) -> list[Tensor]:
            value = loss(hidden, weight, target)
            return [value.detach(), *torch.autograd.grad(value, (hidden, weight))]

        calls: dict[str, Callable[[], Any]]
        calls = {name: partial(step, loss) for name, loss in gpu_peers.linear().items()}
        ours = {PRODUCTS: products, OURS: calls.pop(OURS)}
        truth = cache(partial(gpu_check.linear_truth, hidden, weight, target))
        for name, call in (calls if peers else ours).items():
            with self.attempt(f"{name}, linear"):
                if name != PRODUCTS:
                    # A peer may leave small probabilities out.
                    most = 5e-3 if name == OURS else 5e-2
                    if (wrong := gpu_check.linear_complaint(call(), truth(), most)) is not None:
                        raise ValueError(wrong)
                row = {"tokens": tokens, "size": size, "classes": classes, "dtype": "bfloat16"}
                row |= {"candidate": name, "peak": peak_bytes(call)}
                row |= {"seconds": median(call, self.seconds)}
                self.linear.append(
                    row | ({"kernels": kernel_seconds(call)} if name == OURS else {})
                )


def linear_name() -> str:
    return "linear " + " x ".join(map(str, LINEAR))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few repetitions, nothing written")
    parser.add_argument("--check-only", action="store_true", help="no times")
    parser.add_argument("--case", default="", help="a regular expression: only these; not written")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=5, help="peers are left out beyond this")
    parser.add_argument("--alone", action="store_true", help="without peers; not written")
    parser.add_argument("--json", type=Path, help="write the times there too")
    arguments = parser.parse_args()
    cases = [case for case in CASES if re.search(arguments.case, str(case))]
    linear = re.search(arguments.case, linear_name())
    if not cases and not linear:
        names = ", ".join([*map(str, CASES), linear_name()])
        parser.error(f"no case matches {arguments.case!r}; there are: {names}")
    if not torch.cuda.is_available():
        print("gpu.py: no CUDA device here")
        return 1
    start = time.monotonic()
    benchmark = Benchmark(0.02 if arguments.quick else 0.25, arguments.minutes)
    failures = gpu_check.check(seed=arguments.seed)
    for line in failures:
        print(f"FAILED: {line}")
    print(f"checks: {len(failures)} failed: accuracy, determinism, CUDA graph")
    if arguments.check_only:
        return 1 if failures else 0
    environment = {
        **timing.environment(),
        "cuda": torch.version.cuda,
        "driver": info()["driver"],
        "l2 bytes": l2_bytes(),
        "limits": limits(),
        "date": datetime.date.today().isoformat(),
        "command": f"python benchmarks/gpu.py {' '.join(sys.argv[1:])}".strip(),
        "seed": arguments.seed,
        "failed checks": failures,
    }
    whole = not (arguments.quick or arguments.case or arguments.alone)

    def results() -> dict[str, Any]:
        measured = {"rows": benchmark.rows, "linear": benchmark.linear}
        return {"environment": environment, **measured, "left out": benchmark.left_out}

    def save() -> None:  # after every case: what is measured stays, whatever comes
        if whole:
            timing.save("gpu", results())
        if arguments.json:
            arguments.json.write_text(json.dumps(results(), indent=1) + "\n")

    compiled_for: tuple[Any, ...] = ()
    for peers in (False,) if arguments.alone else (False, True):
        if linear:
            benchmark.linear_case(peers)
            save()
        for case in cases:
            shape = case.tokens, case.classes, case.dtype, case.loss
            if shape != compiled_for:  # each is compiled for itself; beyond eight it would not be
                torch.compiler.reset()
                compiled_for = shape
            candidates = case.candidates(compile_too=peers and not arguments.quick)
            wanted = {name: loss for name, loss in candidates.items() if (name != OURS) == peers}
            if wanted and peers and benchmark.late:
                benchmark.leave_out(f"peers, {case}", "no time was left")
                continue
            benchmark.case(case, wanted)
            save()
        print(f"{(time.monotonic() - start) / 60:.1f} minutes", flush=True)
    print(gpu_report.tables(results()))
    if whole:
        gpu_report.write()
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
