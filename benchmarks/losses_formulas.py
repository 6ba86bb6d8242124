# SPDX-License-Identifier: BSD-3-Clause
"""What losses.py measures: our losses, their specification, and what trainers write instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from masked_loss import masked_cross_entropy, masked_divergence, reference, token_log_probs

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


CASES = [Case(256, 32000, "fp32"), Case(256, 32000, "bf16"), Case(1024, 6400, "fp32")]
QUICK = [Case(16, 1000, "fp32"), Case(16, 1000, "bf16")]


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
