# SPDX-License-Identifier: BSD-3-Clause
"""First and second derivatives of every option, forwards and backwards, against differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from derivative_samples import CLASSES, Loss, normal, ops, problem
from samples import OPTIONS, REDUCTIONS, concrete
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db

from masked_loss import (
    cross_entropy,
    linear_cross_entropy,
    linear_divergence,
    linear_token_log_probs,
    masked_cross_entropy,
    masked_divergence,
    masked_moments,
    masked_reduce,
    masked_whiten,
    reference,
    token_log_probs,
    topk_divergence,
)


def check(function: Loss, *leaves: Tensor) -> None:
    """First and second derivatives, forwards and backwards, against differences."""
    leaves = tuple(x.detach().clone().requires_grad_() for x in leaves)
    torch.autograd.gradcheck(function, leaves, check_forward_ad=True, fast_mode=True)
    torch.autograd.gradgradcheck(function, leaves, check_fwd_over_rev=True, fast_mode=True)


# Every option with the mean, and the largest ones with every reduction.
CASES = [(name, "mean") for name in OPTIONS if name != "inplace"]
CASES += [(name, r) for name in ("plain", "everything") for r in REDUCTIONS if r != "mean"]


@pytest.mark.parametrize(("name", "reduction"), CASES)
def test_masked_cross_entropy(name: str, reduction: str) -> None:
    options = {"reduction": reduction, **concrete(OPTIONS[name], (2, 3), CLASSES, torch.float64)}
    logits, target, mask = problem(2, 3)
    target = target.where(target >= 0, options.get("ignore_index", -100))
    check(lambda x, m: masked_cross_entropy(x, target, m, **options), logits, mask)
    if name in ("plain", "everything") and reduction != "none":
        options["cu_seqlens"] = torch.tensor([0, 2, 2, 5])
        check(lambda x, m: masked_cross_entropy(x, target, m, **options), logits, mask)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_class_probabilities(reduction: str) -> None:
    """They may require grad too, whatever the operator is told besides."""
    logits, _, mask = problem(2, 3)
    weight = torch.rand(CLASSES, dtype=torch.float64)
    options = {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0, "class_weight": weight}

    def loss(x: Tensor, p: Tensor, m: Tensor) -> Tensor:
        return ops.cross_entropy(x, p.softmax(-1), m, reduction=reduction, **options)

    check(loss, logits, normal(2, 3, CLASSES), mask)


@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss"])
def test_samples_of_pytorch(name: str) -> None:
    """All of OpInfo's samples, those of nll_loss as logits, through the drop-in."""
    (info,) = (op for op in op_db if op.name == f"nn.functional.{name}")
    samples = list(info.sample_inputs("cpu", torch.float64, requires_grad=True))
    assert len(samples) >= 20
    for sample in samples:
        target, *more = sample.args
        targets = (target,) if target.requires_grad else ()

        def loss(input: Tensor, *given: Tensor, sample: Any = sample, more: Any = more) -> Tensor:
            probabilities = given[0] if given else sample.args[0]
            return cross_entropy(input, probabilities, *more, **sample.kwargs)

        check(loss, sample.input, *targets)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", [{}, {"cu_seqlens": torch.tensor([0, 2, 2, 5])}], ids=str)
def test_masked_reduce(options: dict[str, Any], reduction: str) -> None:
    def loss(values: Tensor, mask: Tensor, **more: Any) -> Tensor:
        return masked_reduce(values, mask, reduction=reduction, **options, **more)

    values, mask = normal(2, 3), torch.rand(2, 3, dtype=torch.float64) + 0.1
    check(loss, values, mask)
    if reduction in ("sum", "mean"):
        check(lambda x, m: loss(x, m, dim=-1), values, mask)
        check(lambda x, m: loss(x, m, dim=-1, normalizer=3), values, mask)


LINEAR: dict[str, dict[str, Any]] = {
    "plain": {},
    "shift": {"shift": True, "chunk_tokens": 2},
    "z_loss": {"z_loss": 0.1, "softcap": 3.0},
    "smoothing": {"label_smoothing": 0.1, "class_weight": torch.linspace(0.2, 1, CLASSES).double()},
}


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("name", LINEAR)
def test_linear_cross_entropy(name: str, reduction: str) -> None:
    _, target, mask = problem(2, 3)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
        options = {"bias": bias, "reduction": reduction, **LINEAR[name]}
        return linear_cross_entropy(hidden, weight, target, mask, **options)

    check(loss, normal(2, 3, 4), normal(CLASSES, 4), normal(CLASSES), mask)


@pytest.mark.parametrize("linear", [False, True], ids=["dense", "linear"])
@pytest.mark.parametrize("several", [False, True], ids=["one id", "ids"])
def test_token_log_probs(several: bool, linear: bool) -> None:
    target = torch.randint(CLASSES, (2, 3, 2) if several else (2, 3))
    target.view(-1)[:2] = -100
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    for options in (
        {"return_entropy": True, "shift": True},
        {"return_entropy": True, "softcap": 3.0, "temperature": torch.rand(2, 3) + 0.5},
        {"temperature": 0.7},
    ):
        if linear:
            check(
                lambda h, w, b, o=options: linear_token_log_probs(h, w, target, mask, bias=b, **o),
                normal(2, 3, 4), normal(CLASSES, 4), normal(CLASSES),
            )  # fmt: skip
        else:
            check(lambda x, o=options: token_log_probs(x, target, mask, **o), normal(2, 3, CLASSES))


DIVERGENCE: list[dict[str, Any]] = [
    {"reduction": "none", "shift": True},
    {"reduction": "sequence_mean", "temperature": 2.0, "softcap": 3.0, "teacher_softcap": 4.0},
    {"reduction": "sum", "temperature": torch.linspace(0.5, 1.5, 6).view(2, 3), "normalizer": 5},
]


@pytest.mark.parametrize("kind", reference.DIVERGENCES)
def test_divergences(kind: str) -> None:
    """Dense, linear, and of the likeliest classes only."""
    _, _, mask = problem(2, 3)
    teacher, hidden, head = normal(2, 3, CLASSES), normal(2, 3, 2), normal(CLASSES, 2)
    for options in DIVERGENCE:
        check(
            lambda x, m, o=options: masked_divergence(x, teacher, m, kind=kind, beta=0.3, **o),
            normal(2, 3, CLASSES), mask,
        )  # fmt: skip
    check(lambda x: masked_divergence(x, teacher, mask.detach(), kind=kind), normal(2, 3, CLASSES))
    check(
        lambda h, w, b, m: linear_divergence(
            h, w, hidden, head, m, bias=b, kind=kind, **DIVERGENCE[0]
        ),
        normal(2, 3, 4), normal(CLASSES, 4), normal(CLASSES), mask,
    )  # fmt: skip
    p, q = (x.log_softmax(-1)[..., :3] for x in (teacher, normal(2, 3, CLASSES)))
    check(lambda q, m: topk_divergence(q, p, m, kind=kind), q, mask)


def test_moments_and_whitening() -> None:
    values, mask = normal(2, 3), torch.rand(2, 3, dtype=torch.float64) + 0.1
    check(lambda x, m: masked_moments(x, m, dim=-1)[:2], values, mask)
    x = values.requires_grad_()  # the moments are constants there
    (first,) = torch.autograd.grad((masked_whiten(x, mask) ** 3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    _, var, _ = masked_moments(values, mask)
    std, white = (var + 1e-8).sqrt(), masked_whiten(values, mask)
    torch.testing.assert_close(first, 3 * white**2 / std)
    torch.testing.assert_close(second, 6 * white / std**2)
    _, pushed = torch.func.jvp(lambda x: masked_whiten(x, mask), (values,), (values,))
    torch.testing.assert_close(pushed, values / std)
