# SPDX-License-Identifier: BSD-3-Clause
"""Log-probabilities and divergences from hidden states, against the products that they are made of.

A part of losses.py, which has the command line.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from losses_formulas import (
    DTYPES,
    SPECIFICATION,
    Inputs,
    assert_no_worse,
    divergence,
    one_id,
)
from timing import interleave
from torch import Tensor

from masked_loss import linear_divergence, linear_token_log_probs


class LinearCase(NamedTuple):
    rows: int
    width: int
    teacher_width: int
    cols: int
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.rows} x {self.width} x {self.cols} {self.dtype}"


LINEAR = [LinearCase(1024, 768, 1024, 6400, "fp32"), LinearCase(512, 512, 1024, 32000, "fp32")]
QUICK_LINEAR = [LinearCase(32, 16, 24, 500, "fp32")]


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
