# SPDX-License-Identifier: BSD-3-Clause
"""Masked cross entropy on the CPU against PyTorch's, eager and compiled: ``make bench``.

First the results are verified against the fp64 reference, then times, memory and growth are
measured, each setting in a process of its own. README.md says how to read the table.

    python benchmarks/cpu.py                    everything, into benchmarks/results/cpu.*
    python benchmarks/cpu.py --part main avx2   some parts; the others' results stay
    python benchmarks/cpu.py --quick            tiny shapes, nothing is written: does it run?
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import cpu_report
import timing
import torch
import torch.nn.functional as F
from timing import Times, in_process, interleave
from torch import Tensor

from masked_loss import empty_cache, masked_cross_entropy, reference

MASKED = 0.1
PEERS = ("eager", "compiled")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Case(NamedTuple):
    rows: int
    cols: int
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.rows} x {self.cols} {self.dtype}"

    @property
    def size(self) -> int:
        return self.rows * self.cols * DTYPES[self.dtype].itemsize

    def inputs(self, masked: float = MASKED) -> Inputs:
        random = torch.Generator().manual_seed(0)
        logits = torch.randn(self.rows, self.cols, generator=random).mul_(3)
        target = torch.randint(self.cols, (self.rows,), generator=random)
        logits = logits.to(DTYPES[self.dtype]).requires_grad_()
        return Inputs(logits, target, mask_of(self.rows, masked))


class Inputs(NamedTuple):
    logits: Tensor
    target: Tensor
    mask: Tensor


CASES = [Case(1024, 32000, "fp32"), Case(16384, 6400, "fp32"), Case(1024, 32000, "bf16")]
SMALL = [Case(4, 7, "fp32"), Case(32, 10, "fp32"), Case(256, 1000, "fp32")]
QUICK = [Case(64, 1000, "fp32"), Case(32, 1000, "bf16")]

FORWARD, STEP, HUGE, INPLACE = "forward", "step", "step, huge pages", "step, in place"
FIRST = "step, first"


def mask_of(rows: int, masked: float) -> Tensor:
    """Exactly this share of zeros, anywhere."""
    mask = torch.ones(rows)
    mask[torch.randperm(rows, generator=torch.Generator().manual_seed(1))[: int(rows * masked)]] = 0
    return mask


# The candidates


def idiom(logits: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """What people write."""
    return (F.cross_entropy(logits, target, reduction="none") * mask).sum() / mask.sum()


def ours_inplace(logits: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    return masked_cross_entropy(logits, target, mask, inplace_backward=True)


def compiled_idiom() -> Callable[..., Tensor]:
    torch._dynamo.reset()
    return torch.compile(idiom, dynamic=False, fullgraph=True)


def forward(loss: Callable[..., Tensor], inputs: Inputs) -> Callable[[], None]:
    def call() -> None:
        with torch.no_grad():
            loss(*inputs)

    return call


def step(loss: Callable[..., Tensor], inputs: Inputs) -> Callable[[], None]:
    """Forward and backward; the gradient is let go, as the layer before does once it used it."""

    def call() -> None:
        torch.autograd.grad(loss(*inputs), inputs.logits)

    return call


def all_losses(compiled: bool = True) -> dict[str, Callable[..., Tensor]]:
    losses = {"ours": masked_cross_entropy, "eager": idiom}
    return {**losses, "compiled": compiled_idiom()} if compiled else losses


def candidates(
    case: Case, measures: list[str], compiled: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The calls by "measure: candidate", and what has to run before each, untimed."""
    inputs = case.inputs()
    losses = all_losses(compiled)
    calls: dict[str, Any] = {}
    before: dict[str, Any] = {}
    for measure in measures:
        if measure in (FORWARD, STEP, HUGE):
            kind = forward if measure == FORWARD else step
            for name, loss in losses.items():
                calls[f"{measure}: {name}"] = kind(loss, inputs)
                before[f"{measure}: {name}"] = timing.evict
            if measure == FORWARD:
                for name, ahead in (("read", timing.NEAR), ("read far", timing.FAR)):
                    calls[f"{measure}: {name}"] = partial(timing.read_memory, inputs.logits, ahead)
                    before[f"{measure}: {name}"] = timing.evict
        elif measure == FIRST:
            calls[f"{measure}: ours"] = step(masked_cross_entropy, inputs)
            before[f"{measure}: ours"] = forget_memory
        elif measure == INPLACE:
            fresh, restore = restorable(inputs)
            calls[f"{measure}: ours"] = step(ours_inplace, fresh)
            before[f"{measure}: ours"] = restore
        elif measure == "half":
            for share in (0.0, 0.5):
                sparse = inputs._replace(mask=mask_of(case.rows, share))
                fresh, restore = restorable(sparse)
                name = f"masked {share}"
                calls[f"{FORWARD}: {name}"] = forward(masked_cross_entropy, sparse)
                calls[f"{STEP}: {name}"] = step(masked_cross_entropy, sparse)
                calls[f"{INPLACE}: {name}"] = step(ours_inplace, fresh)
                before[f"{FORWARD}: {name}"] = before[f"{STEP}: {name}"] = timing.evict
                before[f"{INPLACE}: {name}"] = restore
    return calls, before


def forget_memory() -> None:
    """As in the first step of a process: no gradient's memory to use again."""
    empty_cache()
    timing.evict()


def restorable(inputs: Inputs) -> tuple[Inputs, Callable[[], None]]:
    """Inputs of their own that backward may overwrite, and what makes them anew."""
    fresh = inputs._replace(logits=inputs.logits.detach().clone().requires_grad_())

    def restore() -> None:
        with torch.no_grad():
            fresh.logits.copy_(inputs.logits)
        timing.evict()

    return fresh, restore


# The parts. Each runs in its own process and returns what json can write.


def measure(case_: list[Any], measures: list[str], rounds: int, compiled: bool) -> dict[str, Any]:
    case = Case(*case_)
    calls, before = candidates(case, measures, compiled)
    for call in calls.values():
        call()  # compiles
    print(f"timing {case.name} ...", file=sys.stderr, flush=True)
    return {
        "environment": timing.environment(),
        "limit": timing.bandwidth(),
        "seconds": interleave(calls, rounds=rounds, warmup=1, before=before),
    }


def measure_small(cases: list[Any], rounds: int, calls_each: int) -> dict[str, Any]:
    """In processor time on one thread: at this size a wait for another process would be all."""
    torch.set_num_threads(1)
    found = {}
    for case in (Case(*c) for c in cases):
        inputs = case.inputs()
        losses = all_losses()
        calls = {f"{FORWARD}: {name}": forward(loss, inputs) for name, loss in losses.items()}
        calls |= {f"{STEP}: {name}": step(loss, inputs) for name, loss in losses.items()}
        found[case.name] = {
            "seconds": interleave(
                calls, rounds=rounds, clock=timing.repeated(timing.processor, calls_each)
            )
        }
    return found


def measure_memory(case: list[Any], loss_name: str) -> int:
    """Bytes that one step adds at its peak to a process that holds the logits."""
    losses = {"ours": masked_cross_entropy, "ours, in place": ours_inplace, "eager": idiom}
    loss = losses.get(loss_name) or compiled_idiom()
    warm = Case(256, 256, case[2]).inputs()
    step(losses.get(loss_name, idiom), warm)()  # what is allocated once: threads, code, graphs
    inputs = Case(*case).inputs()
    if loss_name not in losses:
        step(loss, inputs)()
    return timing.peak_growth(step(loss, inputs))


def measure_growth(quick: bool, rounds: int) -> dict[str, Any]:
    """Ours and eager PyTorch over the number of tokens, the vocabulary, the mask and threads."""
    unit = 10 if quick else 1000
    rows = [64, 256] if quick else [64, 128, 256, 512, 1024, 2048]
    cols = [1, 2] if quick else [1, 2, 4, 8, 16, 32, 64]
    shares = [0.0, 0.5, 1.0] if quick else [0.0, 0.25, 0.5, 0.75, 1.0]

    def times(case: Case, masked: float = MASKED) -> dict[str, Times]:
        inputs = case.inputs(masked)
        calls = {}
        for name, loss in (("ours", masked_cross_entropy), ("eager", idiom)):
            calls |= {f"{FORWARD}: {name}": forward(loss, inputs)}
            calls |= {f"{STEP}: {name}": step(loss, inputs)}
        return interleave(calls, rounds=rounds, warmup=1, before=timing.evict)

    def by_threads() -> Iterator[tuple[int, Any]]:
        most = torch.get_num_threads()
        for threads in sorted({1, most}):
            torch.set_num_threads(threads)
            yield threads, {**times(Case(1024, 32 * unit, "fp32")), "limit": timing.bandwidth()}
        torch.set_num_threads(most)

    return {
        "environment": timing.environment(),
        "limit": timing.bandwidth(),
        "tokens": {n: times(Case(n, 32 * unit, "fp32")) for n in rows},
        "vocabulary": {v * unit: times(Case(1024, v * unit, "fp32")) for v in cols},
        "share masked": {s: times(Case(1024, 32 * unit, "fp32"), s) for s in shares},
        "threads": dict(by_threads()),
    }


def verify(case: list[Any]) -> dict[str, float]:
    """Errors against the fp64 reference, no larger than eager PyTorch's and one rounding more."""
    inputs = Case(*case).inputs()
    logits, target, mask = inputs
    wide = inputs._replace(logits=logits.detach().float().requires_grad_())
    results = {"eager": (eager := idiom(*wide), *torch.autograd.grad(eager, wide.logits))}
    for name, loss in (("ours", masked_cross_entropy), ("ours, in place", ours_inplace)):
        own, _ = restorable(inputs)
        results[name] = (value := loss(*own), *torch.autograd.grad(value, own.logits))
        # max() of Python, below, forgets a NaN.
        assert all(x.isfinite().all() for x in results[name]), f"{Case(*case).name}: {name}"

    errors = {name: [0.0, 0.0] for name in results}
    truth = largest = 0.0
    for i in range(0, len(target), 256):
        part = slice(i, i + 256)
        x = logits.detach()[part].double().requires_grad_()
        loss = reference.masked_cross_entropy(
            x, target[part], mask[part], reduction="sum", normalizer=mask.double().sum()
        )
        (gradient,) = torch.autograd.grad(loss, x)
        truth += loss.item()
        largest = max(largest, gradient.abs().max().item())
        for name, (_, whole) in results.items():
            off = (whole[part].double() - gradient).abs().max().item()
            errors[name][1] = max(errors[name][1], off)
    for name, (value, _) in results.items():
        errors[name][0] = abs(value.item() - truth)

    rounding = (torch.finfo(torch.float32).eps * truth, torch.finfo(logits.dtype).eps * largest)
    for name, both in errors.items():
        for what, ours, eager_error, slack in zip(
            ("loss", "gradient"), both, errors["eager"], rounding, strict=True
        ):
            if not ours <= eager_error + slack:
                raise AssertionError(
                    f"{Case(*case).name}: {what} ({name}) is off by {ours:.2e}, "
                    f"eager PyTorch's by {eager_error:.2e}"
                )
    return {
        f"{name} {what}": e
        for name, es in errors.items()
        for what, e in zip(("loss", "gradient"), es, strict=True)
    }


THP = {"THP_MEM_ALLOC_ENABLE": "1"}
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2"}


def run(part: str, cases: list[Case], quick: bool) -> Any:
    rounds = 2 if quick else 7

    def measured(measures: list[str], env: dict[str, str]) -> Any:
        return {
            # PyTorch 2.13's compiled idiom crashes for bf16 where a processor with AVX-512 is asked
            # for AVX2, see README.md.
            c.name: in_process(
                measure, c, measures, rounds, not (c.dtype == "bf16" and env.keys() & AVX2.keys()),
                env=env,
            )
            for c in cases
        }  # fmt: skip

    if part == "verify":
        return {c.name: in_process(verify, c) for c in cases}
    if part == "main":
        return measured([FORWARD, STEP, FIRST, INPLACE, "half"], {})
    if part == "huge pages":
        return measured([HUGE], THP)
    if part == "avx2":
        return measured([FORWARD, STEP, INPLACE], AVX2)
    if part == "avx2, huge pages":
        return measured([HUGE], AVX2 | THP)
    if part == "small":
        return in_process(measure_small, SMALL, rounds, 2 if quick else 200)
    if part == "memory":
        kinds = ("ours", "ours, in place", *PEERS)
        return {c.name: {k: in_process(measure_memory, c, k) for k in kinds} for c in cases}
    return in_process(measure_growth, quick, 2 if quick else 3)


PARTS = (
    "verify", "main", "huge pages", "avx2", "avx2, huge pages", "small", "memory", "growth",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", nargs="*", choices=PARTS, default=PARTS, metavar="PART")
    parser.add_argument("--case", nargs="*", choices=[c.name for c in CASES], metavar="CASE")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, nothing is written")
    args = parser.parse_args()
    cases = QUICK if args.quick else [c for c in CASES if not args.case or c.name in args.case]
    results = {}
    for part in args.part:
        print(f"{part} ...", file=sys.stderr, flush=True)
        results[part] = run(part, cases, args.quick)
        if not args.quick:
            known = cpu_report.load().get(part, {}) if args.case else {}
            timing.save("cpu", {part: {**known, **results[part]}})
    if args.quick:
        print(cpu_report.tables(results))
    else:
        cpu_report.write()


if __name__ == "__main__":
    main()
