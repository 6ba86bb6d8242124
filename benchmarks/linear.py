# SPDX-License-Identifier: BSD-3-Clause
"""linear_cross_entropy on the CPU, against what its products alone take and against PyTorch.

First the results are verified against fp64. Then each candidate does a forward and a backward
pass, next to the others, and peak memory is measured in a process for each.

    python benchmarks/linear.py                 everything, into benchmarks/results/linear_cpu.*
    python benchmarks/linear.py --part curve    one part; the others' results stay
    python benchmarks/linear.py --part calls    what a call costs where there is little to compute
    python benchmarks/linear.py --quick         tiny shapes, nothing is written: does it run?

The floor is three bare matrix products over the active tokens, into memory that is there already:
logits, gradient of hidden, gradient of weight. A ratio to it of 1 leaves no time for the loss.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import timing
import torch
import torch.nn.functional as F
from timing import Times, in_process, interleave, markdown, milliseconds
from torch import Tensor

from masked_loss import linear_cross_entropy

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FLOOR, OURS, EAGER, COMPILED = "products", "masked_loss", "eager", "compiled"
CHUNKED = {"chunked": {}, "chunked, accurate": {"acc_policy": "accurate"}}
NAMES = (FLOOR, OURS, EAGER, COMPILED, *CHUNKED)


class Case(NamedTuple):
    tokens: int
    width: int
    classes: int
    dtype: str
    masked: float

    @property
    def name(self) -> str:
        return f"{self.tokens} x {self.width} x {self.classes} {self.dtype}, {self.masked:.0%}"


class Inputs(NamedTuple):
    hidden: Tensor
    weight: Tensor
    target: Tensor  # with ignore_index where the mask is 0, for those who know no mask
    mask: Tensor


SHAPES = [(2048, 768, 6400, "fp32"), (1024, 512, 32000, "fp32"), (512, 1024, 65536, "bf16")]
CASES = [Case(*shape, masked) for shape in SHAPES for masked in (0.0, 0.5)]
QUICK = [Case(64, 32, 1000, "fp32", 0.5), Case(64, 32, 1000, "bf16", 0.0)]
CALLS = [Case(64, *sizes, "fp32", 0.0) for sizes in ((16, 64), (64, 512), (256, 4096))]
CURVE = [Case(2048, 256, classes, "fp32", 0.5) for classes in (4000, 8000, 16000, 32000, 64000)]


def make(case: Case) -> Inputs:
    random = torch.Generator().manual_seed(0)
    dtype = DTYPES[case.dtype]
    hidden = torch.randn(case.tokens, case.width, generator=random).to(dtype)
    weight = torch.randn(case.classes, case.width, generator=random).mul_(case.width**-0.5)
    target = torch.randint(case.classes, (case.tokens,), generator=random)
    mask = torch.ones(case.tokens)
    mask[torch.randperm(case.tokens, generator=random)[: int(case.tokens * case.masked)]] = 0
    target = target.masked_fill(mask == 0, -100)
    return Inputs(hidden.requires_grad_(), weight.to(dtype).requires_grad_(), target, mask)


# The candidates: a forward and a backward pass, gradients into fresh memory


def candidate(name: str, case: Case) -> Callable[[], tuple[Tensor, ...]]:
    x = make(case)
    if name == FLOOR:
        return products(x)
    loss = loss_of(name, x)

    def step() -> tuple[Tensor, ...]:
        value = loss()
        return value, *torch.autograd.grad(value, (x.hidden, x.weight))

    return step


def loss_of(name: str, x: Inputs) -> Callable[[], Tensor]:
    losses: dict[str, Callable[..., Tensor]] = {
        OURS: lambda: linear_cross_entropy(x.hidden, x.weight, x.target, x.mask),
        EAGER: lambda: eager(x.hidden, x.weight, x.target),
        COMPILED: lambda: compiled(x.hidden, x.weight, x.target),
    }
    for chunked, how in CHUNKED.items():
        options = torch.nn.LinearCrossEntropyOptions(**how)
        losses[chunked] = lambda options=options: F.linear_cross_entropy(
            x.hidden, x.weight, x.target, options=options
        )
    return losses[name]


def products(x: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    hidden, weight = x.hidden.detach()[x.mask != 0], x.weight.detach()
    logits = hidden.new_ones(hidden.shape[0], weight.shape[0])
    dhidden, dweight = torch.ones_like(hidden), torch.ones_like(weight)

    def step() -> tuple[Tensor, ...]:
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(logits, weight, out=dhidden)
        torch.mm(logits.t(), hidden, out=dweight)
        return logits, dhidden, dweight

    return step


def eager(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), target)


compiled = torch.compile(eager)


# What is measured


def verify(case: Case) -> None:
    """Ours no further from fp64 than eager PyTorch is, and one rounding."""
    small = case._replace(tokens=min(case.tokens, 256), classes=min(case.classes, 8192))
    x = make(small)
    wide = [t.detach().double().requires_grad_() for t in (x.hidden, x.weight)]
    loss = eager(*wide, x.target)
    truth = (loss, *torch.autograd.grad(loss, wide))
    for ours, theirs, true in zip(
        candidate(OURS, small)(), candidate(EAGER, small)(), truth, strict=True
    ):
        scale = true.abs().max()
        error, baseline = ((t.double() - true).abs().max() for t in (ours, theirs))
        assert error <= baseline + torch.finfo(ours.dtype).eps * scale, (case, error, baseline)


def times(case: Case, rounds: int, names: tuple[str, ...] = NAMES) -> dict[str, Any]:
    verify(case)
    measured = interleave({name: candidate(name, case) for name in names}, rounds=rounds, warmup=1)
    floor: Times = measured[names[0]]
    return {
        name: {
            "seconds": t.median,
            "spread": t.spread,
            "of floor": 1 / t.ratio(floor),
            "ours faster": measured[OURS].ratio(t),
        }
        for name, t in measured.items()
    }


def memory(name: str, case: list[Any]) -> int:
    """Peak growth above inputs and gradients, in a process of its own."""
    candidate(name, Case(8, 8, 64, case[3], 0.5))()
    step = candidate(name, Case(*case))
    x = make(Case(*case))
    gradients = x.hidden.nbytes + x.weight.nbytes
    del x
    return timing.peak_growth(step) - gradients


def measure_times(cases: list[Case], rounds: int) -> dict[str, Any]:
    return {case.name: times(case, rounds) for case in cases}


def measure_memory(cases: list[Case]) -> dict[str, Any]:
    names = [name for name in NAMES if name != FLOOR]
    return {c.name: {name: in_process(memory, name, list(c)) for name in names} for c in cases}


def measure_curve(cases: list[Case], rounds: int) -> dict[str, Any]:
    names = (FLOOR, OURS, EAGER, *CHUNKED)
    return {
        str(case.classes): {
            "times": times(case, rounds, names),
            "memory": {n: in_process(memory, n, list(case)) for n in names if n != FLOOR},
        }
        for case in cases
    }


def measure_calls(cases: list[Case], rounds: int) -> dict[str, Any]:
    """Microseconds of processor time, one thread, the least of many runs."""
    torch.set_num_threads(1)
    found = {}
    for case in cases:
        verify(case)
        found[case.name] = {
            f"{name}, {part}": least(work, 10 * rounds)
            for name in (OURS, EAGER)
            for part, work in (
                ("forward", torch.no_grad()(loss_of(name, make(case)))),
                ("step", candidate(name, case)),
            )
        }
    return found


def least(call: Callable[[], Any], runs: int, calls: int = 50) -> float:
    times = []
    for _ in range(runs):
        begin = time.process_time()
        for _ in range(calls):
            call()
        times.append((time.process_time() - begin) / calls)
    return 1e6 * min(times)


# The report


def report(results: dict[str, Any]) -> str:
    text = [
        "# linear_cross_entropy on the CPU",
        "Forward and backward, `python benchmarks/linear.py`. "
        + ", ".join(f"{key}: {value}" for key, value in results["environment"].items() if value),
    ]
    peers = [name for name in NAMES if name not in (FLOOR, OURS)]
    if "times" in results:
        text += [
            "## Time",
            "The share of the tokens that is masked stands behind the shape. "
            "Products: three bare ones over the active tokens. Then how often ours is faster.",
            markdown(
                ["case", "products", "ours", "ours / products", *peers],
                [
                    [
                        case,
                        milliseconds(t[FLOOR]["seconds"]),
                        milliseconds(t[OURS]["seconds"]),
                        f"{t[OURS]['of floor']:.2f}",
                        *(f"{t[name]['ours faster']:.2f}" for name in peers),
                    ]
                    for case, t in results["times"].items()
                ],
            ),
        ]
    if "memory" in results:
        text += [
            "## Peak memory",
            "MiB above the arguments and their gradients.",
            markdown(
                ["case", "ours", *peers],
                [
                    [case, *(f"{m[name] / 2**20:.0f}" for name in (OURS, *peers))]
                    for case, m in results["memory"].items()
                ],
            ),
        ]
    if "calls" in results:
        columns = list(next(iter(results["calls"].values())))
        text += [
            "## Calls",
            "Microseconds of processor time, one thread.",
            markdown(
                ["case", *columns],
                [
                    [case, *(f"{c[name]:.0f}" for name in columns)]
                    for case, c in results["calls"].items()
                ],
            ),
        ]
    if "curve" in results:
        text.append("![peak memory and time against the number of classes](linear_cpu.png)")
    return "\n\n".join(text) + "\n"


def plot(curve: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    classes = [int(n) for n in curve]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name in (OURS, EAGER, *CHUNKED):
        memory = [point["memory"][name] / 2**20 for point in curve.values()]
        left.plot(classes, memory, marker="o", label=name)
    for name in (OURS, EAGER, *CHUNKED, FLOOR):
        seconds = [point["times"][name]["seconds"] for point in curve.values()]
        style = {"color": "black", "linestyle": ":"} if name == FLOOR else {"marker": "o"}
        right.plot(classes, seconds, label=name, **style)
    left.set(title="peak memory above arguments and gradients", ylabel="MiB", yscale="log")
    right.set(title="forward and backward", ylabel="s", yscale="log")
    case = CURVE[0]
    for axis in (left, right):
        axis.set(xlabel=f"V  ({case.tokens} tokens, D = {case.width}, half masked)", xscale="log")
        axis.set_xticks(classes, [f"{n // 1000}k" for n in classes], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(timing.RESULTS / "linear_cpu.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", nargs="*", default=["times", "memory", "curve"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    cases = QUICK if args.quick else CASES
    curve = [Case(64, 32, n, "fp32", 0.5) for n in (1000, 2000)] if args.quick else CURVE
    calls = QUICK[:1] if args.quick else CALLS
    rounds = 2 if args.quick else args.rounds
    threads = torch.get_num_threads()
    parts = {
        "times": lambda: measure_times(cases, rounds),
        "memory": lambda: measure_memory(cases),
        "curve": lambda: measure_curve(curve, rounds),
        "calls": lambda: measure_calls(calls, rounds),
    }
    results: dict[str, Any] = {"environment": timing.environment()}
    for part in args.part:
        torch.set_num_threads(threads)
        results[part] = parts[part]()
    if args.quick:
        print(report(results))
        return
    path = timing.save("linear_cpu", results)
    results = timing.json.loads(path.read_text())
    if "curve" in args.part:
        plot(results["curve"])
    path.with_suffix(".md").write_text(report(results))
    print(report(results))


if __name__ == "__main__":
    main()
