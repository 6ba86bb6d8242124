# SPDX-License-Identifier: BSD-3-Clause
"""Log-probabilities, entropy and divergences on the CPU, against what trainers write in PyTorch.

First the results are verified against fp64. Then all candidates take turns on one thread, in
processor time, nothing masked and the caches cold. The unit is C, our own cross entropy forward
("none") on the same logits; peak memory is measured in a process for each candidate.

    python benchmarks/losses.py                 everything, into benchmarks/results/losses_cpu.*
    python benchmarks/losses.py --part memory   one part; the others' results stay
    python benchmarks/losses.py --quick         tiny shapes, nothing is written: does it run?
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

import timing
import torch
import torch.nn.functional as F
from timing import Times, in_process, interleave, markdown, milliseconds
from torch import Tensor

from masked_loss import (
    linear_divergence,
    linear_token_log_probs,
    masked_cross_entropy,
    masked_divergence,
    reference,
    token_log_probs,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MANY = 64  # ids of one token


class Case(NamedTuple):
    rows: int
    cols: int
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.rows} x {self.cols} {self.dtype}"


class Inputs(NamedTuple):
    logits: Tensor
    teacher: Tensor
    target: Tensor
    ids: Tensor


class LinearCase(NamedTuple):
    rows: int
    width: int
    teacher_width: int
    cols: int
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.rows} x {self.width} x {self.cols} {self.dtype}"


CASES = [Case(256, 32000, "fp32"), Case(256, 32000, "bf16"), Case(1024, 6400, "fp32")]
QUICK = [Case(16, 1000, "fp32"), Case(16, 1000, "bf16")]
LINEAR = [LinearCase(1024, 768, 1024, 6400, "fp32"), LinearCase(512, 512, 1024, 32000, "fp32")]
QUICK_LINEAR = [LinearCase(32, 16, 24, 500, "fp32")]


def make(case: Case) -> Inputs:
    random = torch.Generator().manual_seed(0)
    logits, teacher = (
        torch.randn(case.rows, case.cols, generator=random).mul_(3).to(DTYPES[case.dtype])
        for _ in range(2)
    )
    ids = torch.randint(case.cols, (case.rows, MANY), generator=random)
    return Inputs(logits.requires_grad_(), teacher, ids[:, 0].contiguous(), ids)


# What trainers write


def log_softmax_gather(x: Inputs) -> Tensor:
    """MiniMind."""
    return x.logits.log_softmax(-1).gather(-1, x.target[:, None])[:, 0]


def selected(x: Inputs) -> Tensor:
    """TRL: in float32 the logsumexp, sequence by sequence; half types as they are."""
    if x.logits.dtype != torch.float32:
        return log_softmax_gather(x)
    sequences = zip(x.logits.chunk(8), x.target.chunk(8), strict=True)
    return torch.cat([y.gather(-1, t[:, None])[:, 0] - y.logsumexp(-1) for y, t in sequences])


def entropy_of_logs(x: Inputs) -> Tensor:
    """TRL."""
    logs = x.logits.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1)


def entropy_by_difference(x: Inputs) -> Tensor:
    """verl: lse - sum of p y."""
    return x.logits.logsumexp(-1) - (x.logits.softmax(-1) * x.logits).sum(-1)


def kl_div(x: Inputs) -> Tensor:
    logs = x.logits.log_softmax(-1), x.teacher.log_softmax(-1)
    return F.kl_div(*logs, reduction="batchmean", log_target=True)


def minimind_distillation(x: Inputs, temperature: float = 1.0) -> Tensor:
    with torch.no_grad():
        p = F.softmax(x.teacher / temperature, dim=-1).detach()
    log_q = F.log_softmax(x.logits / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_q, p, reduction="batchmean")


def gkd(x: Inputs, beta: float = 0.5) -> Tensor:
    """TRL's generalized Jensen-Shannon divergence, from logarithms."""
    log_q, log_p = x.logits.log_softmax(-1), x.teacher.log_softmax(-1)
    weights = torch.tensor([1 - beta, beta], dtype=log_q.dtype).log()
    log_m = torch.logsumexp(torch.stack([log_q + weights[0], log_p + weights[1]]), dim=0)
    of_p = F.kl_div(log_m, log_p, reduction="none", log_target=True)
    of_q = F.kl_div(log_m, log_q, reduction="none", log_target=True)
    return (beta * of_p + (1 - beta) * of_q).sum() / len(x.target)


# Ours. A result of several tensors is differentiated through all of them.


def cross_entropy(x: Inputs) -> Tensor:
    return masked_cross_entropy(x.logits, x.target, reduction="none")


def one_id(x: Inputs) -> Tensor:
    return token_log_probs(x.logits, x.target)


def many_ids(x: Inputs) -> Tensor:
    return token_log_probs(x.logits, x.ids)


def with_temperatures(x: Inputs) -> Tensor:
    return token_log_probs(x.logits, x.target, temperature=temperatures(x))


def temperatures(x: Inputs) -> Tensor:
    """Of which the kernels multiply by the reciprocal: these have exact ones."""
    return torch.tensor([0.5, 1, 2, 4]).repeat(len(x.target) // 4)


def with_entropy(x: Inputs) -> tuple[Tensor, Tensor]:
    return token_log_probs(x.logits, x.target, return_entropy=True)


@cache
def divergence(kind: str) -> Callable[[Inputs], Tensor]:
    return lambda x: masked_divergence(x.logits, x.teacher, kind=kind)


SPECIFICATION: dict[Callable[[Inputs], Any], Callable[[Inputs], Any]] = {
    cross_entropy: lambda x: reference.masked_cross_entropy(x.logits, x.target, reduction="none"),
    one_id: lambda x: reference.token_log_probs(x.logits, x.target),
    many_ids: lambda x: reference.token_log_probs(x.logits, x.ids),
    with_temperatures: lambda x: reference.token_log_probs(
        x.logits, x.target, temperature=temperatures(x)
    ),
    with_entropy: lambda x: reference.token_log_probs(x.logits, x.target, return_entropy=True),
    **{
        divergence(kind): lambda x, kind=kind: reference.masked_divergence(
            x.logits, x.teacher, kind=kind
        )
        for kind in reference.DIVERGENCES
    },
}


class Measure(NamedTuple):
    """A line of the table: at most ``forwards`` C and ``steps`` steps of our cross entropy; each
    peer takes at least so many times as long."""

    loss: Callable[[Inputs], Any]
    backward: bool
    forwards: float
    steps: float = 0.0
    peers: Mapping[str, tuple[Callable[[Inputs], Any], dict[str, float]]] = MappingProxyType({})


BOTH = {"fp32": 9.0, "bf16": 8.0}
ENTROPIES = {
    "TRL": (lambda x: (selected(x), entropy_of_logs(x)), BOTH),
    "verl": (lambda x: (selected(x), entropy_by_difference(x)), BOTH),
}
GKD = {"GKD": (gkd, {"fp32": 12.0, "bf16": 6.9})}
GATHER = {"log_softmax, gather": (log_softmax_gather, {}), "TRL": (selected, {})}
MEASURES: dict[str, Measure] = {
    "log-probability": Measure(one_id, False, 1.05, peers=GATHER),
    "log-probability, step": Measure(one_id, True, 0, 1.05, GATHER),
    "64 log-probabilities": Measure(many_ids, False, 1.05),
    "64 log-probabilities, step": Measure(many_ids, True, 0, 1.05),
    "a temperature each": Measure(with_temperatures, False, 1.05),
    "with entropy": Measure(with_entropy, False, 1.3),
    "with entropy, step": Measure(with_entropy, True, 0.4, 1, ENTROPIES),
    "forward KL, step": Measure(divergence("forward_kl"), True, 4, peers={
        "kl_div": (kl_div, {"fp32": 5.0}), "MiniMind": (minimind_distillation, {"fp32": 8.0}),
    }),
    "reverse KL, step": Measure(divergence("reverse_kl"), True, 10),
    "JSD, step": Measure(divergence("jsd"), True, 10, peers=GKD),
    "skew KL, step": Measure(divergence("skew_forward_kl"), True, 10),
    "skew reverse KL, step": Measure(divergence("skew_reverse_kl"), True, 10),
}  # fmt: skip
FORWARD, STEP = "C", "cross entropy, step"


def call_of(loss: Callable[[Inputs], Any], x: Inputs, backward: bool) -> Callable[[], Any]:
    def forward() -> Any:
        with torch.no_grad():
            return loss(x)

    def step() -> Any:
        results = loss(x)
        results = results if isinstance(results, tuple) else (results,)
        return torch.autograd.grad(results, x.logits, [torch.ones_like(r) for r in results])

    return step if backward else forward


# What is measured


def verify(case: Case) -> None:
    """Ours no further from fp64 than the specification in fp32, and one rounding; the gradient of
    an entropy, a difference of larger numbers, two. Peers are near."""
    x = make(case._replace(rows=min(case.rows, 32)))

    def results(loss: Callable[[Inputs], Any], dtype: torch.dtype) -> list[Tensor]:
        own = x._replace(
            logits=x.logits.detach().to(dtype).requires_grad_(), teacher=x.teacher.to(dtype)
        )
        found = call_of(loss, own, backward=False)()
        found = found if isinstance(found, tuple) else (found,)
        return [*found, *call_of(loss, own, backward=True)()]

    measured = {FORWARD: cross_entropy, **{name: m.loss for name, m in MEASURES.items()}}
    for name, loss in measured.items():
        who = f"{case.name}: {name}"
        ours, eager, truth = (
            results(f, dtype)
            for f, dtype in (
                (loss, x.logits.dtype),
                (SPECIFICATION[loss], torch.float32),
                (SPECIFICATION[loss], torch.float64),
            )
        )
        assert_no_worse(ours, eager, truth, who, 2 if loss is with_entropy else 1)
    for name, measure in MEASURES.items():
        truth = results(SPECIFICATION[measure.loss], torch.float64)
        for peer, (loss, _) in measure.peers.items():
            near = {"fp32": [1e-4] * len(truth), "bf16": [0.02] * len(truth)}[case.dtype]
            if (peer, case.dtype) == ("GKD", "bf16"):
                near[-1] = 0.3  # its gradient is off by a fifth
            theirs = results(loss, x.logits.dtype)
            for i, (result, true, share) in enumerate(zip(theirs, truth, near, strict=True)):
                error = (result.double() - true).abs().max()
                assert error <= share * true.abs().max(), (case.name, name, peer, i, error.item())


def assert_no_worse(
    ours: list[Tensor], eager: list[Tensor], truth: list[Tensor], who: str, of_gradients: int = 1
) -> None:
    """Of results, the last of which is a gradient."""
    for i, (mine, theirs, true) in enumerate(zip(ours, eager, truth, strict=True)):
        error, baseline = ((t.double() - true).abs().max() for t in (mine, theirs))
        roundings = of_gradients if i == len(truth) - 1 else 1
        slack = roundings * torch.finfo(mine.dtype).eps * true.abs().max()
        assert error <= baseline + slack, (who, i, error.item(), baseline.item())


def measure_times(cases: list[Case], rounds: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    found = {}
    for case in cases:
        verify(case)
        x = make(case)
        calls = {
            FORWARD: call_of(cross_entropy, x, False),
            STEP: call_of(cross_entropy, x, True),
        }
        for name, measure in MEASURES.items():
            calls[name] = call_of(measure.loss, x, measure.backward)
            for peer, (loss, _) in measure.peers.items():
                calls[f"{name}: {peer}"] = call_of(loss, x, measure.backward)
        found[case.name] = interleave(
            calls, rounds=rounds, warmup=1, before=timing.evict, clock=timing.processor
        )
    return found


def peak(name: str, peer: str, case: list[Any]) -> int:
    """Bytes that a step adds at its peak, gradient included, in a process of its own."""
    measure = MEASURES[name]
    loss = measure.peers[peer][0] if peer else measure.loss
    call_of(loss, make(Case(64, 64, case[2])), measure.backward)()
    return timing.peak_growth(call_of(loss, make(Case(*case)), measure.backward))


def measure_memory(cases: list[Case]) -> dict[str, Any]:
    names = ("log-probability, step", "with entropy, step", "forward KL, step", "JSD, step")
    return {
        case.name: {
            f"{name}: {peer or 'ours'}": in_process(peak, name, peer, list(case))
            for name in names
            for peer in ("", *MEASURES[name].peers)
        }
        for case in cases
    }


class LinearInputs(NamedTuple):
    student: list[Tensor]  # hidden states and weight
    teacher: list[Tensor]
    target: Tensor


def make_linear(case: LinearCase) -> LinearInputs:
    random, dtype = torch.Generator().manual_seed(0), DTYPES[case.dtype]

    def normal(rows: int, width: int, scale: float = 1.0) -> Tensor:
        return torch.randn(rows, width, generator=random).mul_(scale).to(dtype)

    def head(width: int) -> list[Tensor]:
        return [normal(case.rows, width), normal(case.cols, width, width**-0.5)]

    student, teacher = head(case.width), head(case.teacher_width)
    target = torch.randint(case.cols, (case.rows,), generator=random)
    return LinearInputs([x.requires_grad_() for x in student], teacher, target)


def dense(loss: Callable[[Inputs], Tensor]) -> Callable[[LinearInputs], Tensor]:
    """The specification of logits that are computed first, in the heads' type."""

    def of_heads(x: LinearInputs) -> Tensor:
        logits, teacher = F.linear(*x.student), F.linear(*x.teacher)
        return SPECIFICATION[loss](Inputs(logits, teacher, x.target, x.target))

    return of_heads


# Ours, what its products are called, and what it has to be.
LINEAR_MEASURES: dict[str, tuple[Callable[[LinearInputs], Tensor], str, Any]] = {
    "log-probability": (
        lambda x: linear_token_log_probs(*x.student, x.target), "products", dense(one_id),
    ),
    "forward KL": (
        lambda x: linear_divergence(*x.student, *x.teacher),
        "products of two", dense(divergence("forward_kl")),
    ),
    "JSD": (
        lambda x: linear_divergence(*x.student, *x.teacher, kind="jsd"),
        "products of two", dense(divergence("jsd")),
    ),
}  # fmt: skip


def linear_step(loss: Callable[[LinearInputs], Tensor], x: LinearInputs) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(loss(x).sum(), x.student)


def verify_linear(case: LinearCase) -> None:
    """As verify(), of steps from hidden states."""
    x = make_linear(case._replace(rows=min(case.rows, 32)))
    wide = LinearInputs(
        [t.detach().double().requires_grad_() for t in x.student],
        [t.double() for t in x.teacher], x.target,
    )  # fmt: skip
    for name, (loss, _, specification) in LINEAR_MEASURES.items():
        ours, eager, truth = (
            [f(own).detach(), *linear_step(f, own)()]
            for f, own in ((loss, x), (specification, x), (specification, wide))
        )
        assert_no_worse(ours, eager, truth, f"{case.name}: {name}")


def linear_calls(case: LinearCase) -> dict[str, Callable[[], Any]]:
    """Steps from hidden states, and the products that they are made of, into memory at hand."""
    x = make_linear(case)
    logits = torch.ones(case.rows, case.cols, dtype=DTYPES[case.dtype])
    gradients = [*map(torch.ones_like, x.student)]

    def products(*heads: list[Tensor]) -> None:
        with torch.no_grad():
            for hidden, weight in heads:
                torch.mm(hidden, weight.t(), out=logits)
            torch.mm(logits, x.student[1], out=gradients[0])
            torch.mm(logits.t(), x.student[0], out=gradients[1])

    return {
        "products": lambda: products(x.student, x.student),
        "products of two": lambda: products(x.student, x.teacher),
        **{name: linear_step(loss, x) for name, (loss, *_) in LINEAR_MEASURES.items()},
    }


def measure_linear(cases: list[LinearCase], rounds: int) -> dict[str, Any]:
    for case in cases:
        verify_linear(case)
    return {c.name: interleave(linear_calls(c), rounds=rounds, warmup=1) for c in cases}


# The report


def judged(text: str, reached: bool) -> str:
    """Bold where it falls short."""
    return text if reached else f"**{text}**"


def rows_of(case: str, seconds: dict[str, list[float]]) -> list[list[str]]:
    times = {name: Times(values) for name, values in seconds.items()}
    unit, step = times[FORWARD], times[STEP]
    rows = [[case, "cross entropy forward: C", milliseconds(unit.median), "1", "", ""]]
    rows.append([case, STEP, milliseconds(step.median), f"{1 / step.ratio(unit):.2f}", "", ""])
    for name, measure in MEASURES.items():
        limit = Times(
            measure.forwards * c + measure.steps * s for c, s in zip(unit, step, strict=True)
        )
        in_units = 1 / times[name].ratio(unit)
        allowed = in_units * times[name].ratio(limit)
        row = [case, name, milliseconds(times[name].median)]
        row += [judged(f"{in_units:.2f}", in_units <= allowed), f"{allowed:.2f}"]
        peers = []
        for peer, (_, aims) in measure.peers.items():
            ratio = times[name].ratio(times[f"{name}: {peer}"])
            aim = aims.get(case.split()[-1])
            text = judged(f"{ratio:.1f}", aim is None or ratio >= aim)
            peers.append(f"{peer} {text}" + (f" ({aim:g})" if aim else ""))
        rows.append([*row, ", ".join(peers)])
    return rows


def linear_rows(case: str, seconds: dict[str, list[float]]) -> list[list[str]]:
    times = {name: Times(values) for name, values in seconds.items()}
    rows = []
    for name, (_, floor, _) in LINEAR_MEASURES.items():
        ratio = 1 / times[name].ratio(times[floor])
        row = [case, name, milliseconds(times[floor].median), milliseconds(times[name].median)]
        rows.append([*row, judged(f"{ratio:.2f}", ratio <= 1.2)])
    return rows


def report(results: dict[str, Any]) -> str:
    text = [
        "# Log-probabilities, entropy and divergences on the CPU",
        "`python benchmarks/losses.py`. "
        + ", ".join(f"{key}: {value}" for key, value in results["environment"].items() if value),
    ]
    if "times" in results:
        header = ("case", "what", "ours", "in C", "at most", "times as fast as (at least)")
        rows = [row for case in results["times"].items() for row in rows_of(*case)]
        text += [
            "## Time",
            "Processor time on one thread, nothing masked, caches cold. C is our cross entropy "
            'forward, `reduction="none"`; a step is forward and backward. Bold falls short.',
            markdown(header, rows),
        ]
    if "memory" in results:
        text += ["## Peak memory of a step", "MiB beyond the inputs, the gradient included."]
        for case, peaks in results["memory"].items():
            rows, cols, dtype = case.replace(" x", "").split()
            size = int(rows) * int(cols) * DTYPES[dtype].itemsize
            text.append(f"{case}: the logits have {size / 2**20:.1f}.")
            lines = [[name, f"{peak / 2**20:.1f}"] for name, peak in peaks.items()]
            text.append(markdown(("what", "MiB"), lines))
    if "linear" in results:
        rows = [row for case in results["linear"].items() for row in linear_rows(*case)]
        text += [
            "## From hidden states",
            "A step, all threads, against its four products (of the divergence: student's and "
            "teacher's logits, and two gradients); at most 1.2.",
            markdown(("case", "what", "products", "ours", "ours / products"), rows),
        ]
    return "\n\n".join(text) + "\n"


def plot(times: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9})
    figure, axes = plt.subplots(1, len(times), figsize=(12, 4.2), layout="constrained", sharey=True)
    figure.suptitle("Steps: how many times as long as our cross entropy forward")
    shown = [name for name, measure in MEASURES.items() if measure.backward and measure.peers]
    colours = ["#8a8f98", "#3b6ea5"]
    for axis, (case, seconds) in zip(axes, times.items(), strict=True):
        unit = Times(seconds[FORWARD])
        for i, name in enumerate(shown):
            candidates = {"ours": name, **{p: f"{name}: {p}" for p in MEASURES[name].peers}}
            for j, (who, key) in enumerate(candidates.items()):
                height = 1 / Times(seconds[key]).ratio(unit)
                place = i + 0.28 * (j - (len(candidates) - 1) / 2)
                colour = "#b3412a" if who == "ours" else colours[j - 1]
                bar = axis.bar([place], [height], 0.26, color=colour)
                axis.bar_label(bar, [f"{height:.1f}\n{who}"], fontsize=6)
        axis.set_title(case, fontsize=9)
        axis.set_yscale("log")
        labels = [name.removesuffix(", step") for name in shown]
        axis.set_xticks(range(len(shown)), labels, fontsize=8)
    figure.savefig(timing.RESULTS / "losses_cpu.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", nargs="*", default=["times", "memory", "linear"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    cases, linear = (QUICK, QUICK_LINEAR) if args.quick else (CASES, LINEAR)
    rounds = 2 if args.quick else args.rounds
    threads = torch.get_num_threads()
    results: dict[str, Any] = {"environment": timing.environment()}
    for part in args.part:
        torch.set_num_threads(threads)
        results[part] = {
            "times": lambda: measure_times(cases, rounds),
            "memory": lambda: measure_memory(cases),
            "linear": lambda: measure_linear(linear, rounds),
        }[part]()
    if args.quick:
        print(report(results))
        return
    path = timing.save("losses_cpu", results)
    results = json.loads(path.read_text())
    if "times" in args.part:
        plot(results["times"])
    path.with_suffix(".md").write_text(report(results))
    print(report(results))


if __name__ == "__main__":
    main()
