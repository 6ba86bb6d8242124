# SPDX-License-Identifier: BSD-3-Clause
"""masked_divergence: as exact as PyTorch, never negative, and what it is where it is infinite."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import DRAWS
from divergence_samples import KINDS, OPTIONS, problem
from torch import Tensor

from masked_loss import masked_divergence, reference

INF, NAN = float("inf"), float("nan")
FLOATING = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def as_written(log_p: Tensor, log_q: Tensor, kind: str, beta: float) -> Tensor:
    """From log-softmaxes by F.kl_div, as trainers do."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return F.kl_div(b, a, reduction="none", log_target=True).sum(-1)

    def mix(c: float) -> Tensor:
        return torch.logaddexp(log_p + torch.tensor(c).log(), log_q + torch.tensor(1 - c).log())

    if kind == "forward_kl":
        return kl(log_p, log_q)
    if kind == "reverse_kl":
        return kl(log_q, log_p)
    if kind == "jsd":
        return beta * kl(log_p, mix(beta)) + (1 - beta) * kl(log_q, mix(beta))
    if kind == "skew_forward_kl":
        return kl(log_p, mix(beta))
    return kl(log_q, mix(1 - beta))


def off(ours: Tensor, truth: Tensor) -> float:
    """The worst element, beyond a rounding of the type to its own size, or to none at all."""
    assert not ours.isnan().any()  # max() of Python forgets a NaN
    info = torch.finfo(ours.dtype)
    own = info.eps / 2 * truth.abs() + info.eps * info.tiny
    return ((ours.double() - truth).abs() - own).max().item()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_option(kind: str, options: str, dtype: torch.dtype, device: str) -> None:
    """No further from fp64 than PyTorch's in fp32, and a rounding of the value, six of gradients.

    dD/dy is q (score - its mean), and a mask's gradient D - its mean: differences of numbers that
    are several times larger, 1.2 against 0.02 where the student is sure of one class. One rounding
    of these is several of the difference; in PyTorch up to 150, of JSD's gradient.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def results(function: Any, dtype: torch.dtype, inputs: Any) -> list[Tensor]:
        student, teacher, mask, more = inputs
        leaves = [student.detach().to(device, dtype), mask.detach().to(device)]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        more = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in more.items()}
        teacher = teacher.to(device, dtype)
        loss = function(leaves[0], teacher, leaves[1], kind=kind, beta=0.3, **more)
        upstream = torch.linspace(-1, 1, max(1, loss.numel())).to(loss).view(loss.shape)
        return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream)]

    worst = [[0.0, 0.0] for _ in range(3)]  # ours, PyTorch's: luck is no measure
    for _ in range(DRAWS):
        inputs = problem(dtype, options=options)
        ours = results(masked_divergence, dtype, inputs)
        eager = results(reference.masked_divergence, wide, inputs)
        truth = results(reference.masked_divergence, torch.float64, inputs)
        assert [x.dtype for x in ours[:2]] == [wide, dtype]
        for errors, mine, theirs, true, roundings in zip(
            worst, ours, eager, truth, (1, 6, 6), strict=True
        ):
            slack = roundings * torch.finfo(wide).eps * true.double().abs().max().item() + 1e-14
            errors[0] = max(errors[0], off(mine, true.double()) - slack)
            errors[1] = max(errors[1], (theirs.double() - true).abs().max().item())
        if all(mine <= theirs for mine, theirs in worst):
            return
    raise AssertionError(f"value, gradient, gradient of the mask (ours, PyTorch's): {worst}")


def gradient_roundings(kind: str) -> int:
    """Beside those relative to an element: reverse KL's is p times a difference of log-ratios,
    which are 20 and more, half an eps of each of which is 8."""
    return 24 if kind == "reverse_kl" else 2


@pytest.mark.parametrize("cols", [1, 2, 15, 16, 17, 33, 1000, 4099, 20011])
@pytest.mark.parametrize("kind", KINDS)
def test_every_length(kind: str, cols: int, device: str) -> None:
    student, teacher, _, _ = problem(torch.float32, cols)
    ours = masked_divergence(student.to(device), teacher.to(device), kind=kind, reduction="none")
    wide = student.detach().double().requires_grad_()
    truth = reference.masked_divergence(wide, teacher.double(), kind=kind, reduction="none")
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(ours.cpu().double(), truth, rtol=4 * eps, atol=4 * eps)
    upstream = torch.randn(3, 4)
    ours = torch.autograd.grad(ours, student, upstream.to(device))[0]
    truth = torch.autograd.grad(truth, wide, upstream.double())[0]
    slack = gradient_roundings(kind) * eps
    torch.testing.assert_close(ours.double(), truth, rtol=16 * eps, atol=slack)


@pytest.mark.parametrize("kind", KINDS)
def test_softcap_of_several_blocks(kind: str, device: str) -> None:
    """The slope of a softcap is that of the logit itself, wherever in its row that is."""
    student, teacher, _, _ = problem(torch.float32, 2501)
    loss = partial(masked_divergence, kind=kind, softcap=2.0, teacher_softcap=3.0)
    (ours,) = torch.autograd.grad(loss(student.to(device), teacher.to(device)), student)
    wide = student.detach().double().requires_grad_()
    truth = reference.masked_divergence(
        wide, teacher.double(), kind=kind, softcap=2.0, teacher_softcap=3.0
    )
    (expected,) = torch.autograd.grad(truth, wide)
    eps = torch.finfo(torch.float32).eps
    slack = gradient_roundings(kind) * eps * expected.abs().max().item()
    torch.testing.assert_close(ours.double(), expected, rtol=16 * eps, atol=slack)


@pytest.mark.parametrize("side", ["softcap", "teacher_softcap"])
def test_a_softcap_of_one_is_not_none(side: str, device: str) -> None:
    student, teacher, _, _ = problem(torch.float64)
    found = []
    for function in (masked_divergence, reference.masked_divergence):
        loss = function(student.to(device), teacher.to(device), **{side: 1.0})
        found.append((loss, *torch.autograd.grad(loss, student)))
    torch.testing.assert_close(*found)


def test_the_largest_logit_may_stand_anywhere(dtype: torch.dtype, device: str) -> None:
    """No vector of a row is left out where the largest is looked for: exp(2000) is infinite."""
    at = torch.cat([torch.arange(80), torch.arange(960, 1100)])  # of a block of 1024, and the next
    student = torch.randn(220, 1100, dtype=torch.float64).to(device, dtype)
    student[torch.arange(220), at] = 2000
    student.requires_grad_()
    teacher = student.detach().roll(1, 0)
    loss = masked_divergence(student, teacher, kind="reverse_kl", reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    wide = student.detach().double()
    truth = reference.masked_divergence(wide, teacher.double(), kind="reverse_kl", reduction="none")
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("cols", [2003, 2048])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_a_gradient_larger_than_the_caches(
    kind: str, cols: int, dtype: torch.dtype, device: str
) -> None:
    """More than 4 MiB are written around them, by lines of 64 bytes: the same bits."""
    rows = (5 << 20) // (cols * dtype.itemsize)
    student, teacher = (3 * torch.randn(rows, cols).to(device, dtype) for _ in range(2))
    mask = torch.rand(rows, device=device) < 0.8

    def gradient(part: slice) -> Tensor:
        leaf = student[part].requires_grad_()
        loss = masked_divergence(leaf, teacher[part], mask[part], kind=kind, reduction="sum")
        return torch.autograd.grad(loss, leaf)[0]

    few = torch.cat([gradient(slice(i, i + 100)) for i in range(0, rows, 100)])
    assert torch.equal(gradient(slice(None)), few)


def test_agreement_of_ties_and_of_rows_that_grow(dtype: torch.dtype, device: str) -> None:
    """Both rows' first largest logits, or first NaN, whatever is behind the row."""
    student = torch.randn(6, 5, dtype=torch.float64) + 100 * torch.arange(6)[:, None]
    teacher = torch.randn(6, 5, dtype=torch.float64)
    student[1], student[1, [2, 4]], teacher[1, 2] = 0, 1, 9
    student[2], teacher[2, 0] = -INF, 9
    student[3, 4], teacher[3, 4] = NAN, 9
    pair = student.to(device, dtype), teacher.to(device, dtype)
    _, stats = masked_divergence(*pair, reduction="none", return_stats=True)
    agree = pair[0].argmax(-1) == pair[1].argmax(-1)
    assert agree[1:4].all()
    assert stats.agreement == agree.sum()


@pytest.mark.parametrize("below", [20.0, 60.0, 1000.0, INF])
@pytest.mark.parametrize("cols", [301, 1301], ids=["", "after a block"])
@pytest.mark.parametrize("kind", KINDS)
def test_largest_logits_last(
    kind: str, cols: int, below: float, dtype: torch.dtype, device: str
) -> None:
    """What a row begins with is no guess at the size of the rest."""
    student, teacher, _, _ = problem(dtype, cols)
    with torch.no_grad():
        student[..., : cols - 101] -= below
        teacher[..., : cols - 101] -= below
    inputs = student.detach().to(device).requires_grad_(), teacher.to(device)
    ours = masked_divergence(*inputs, kind=kind, reduction="none")
    wide = student.detach().double().requires_grad_(), teacher.double()
    truth = reference.masked_divergence(*wide, kind=kind, reduction="none")
    eps = torch.finfo(ours.dtype).eps
    sides = 2 if dtype == torch.float64 else 1  # of float64 the truth, too, is rounded
    tolerance = 4 * sides * eps
    torch.testing.assert_close(ours.cpu().double(), truth, rtol=tolerance, atol=tolerance)
    (gradient,) = torch.autograd.grad(ours.sum(), inputs[0])
    (expected,) = torch.autograd.grad(truth.sum(), wide[0])
    tolerance = max(16 * eps, torch.finfo(dtype).eps)
    slack = gradient_roundings(kind) * sides * eps
    torch.testing.assert_close(gradient.cpu().double(), expected, rtol=tolerance, atol=slack)


@pytest.mark.parametrize("above", [10.0, 15.0, 27.0])
@pytest.mark.parametrize("at", [0, 700, 1999])
def test_a_class_far_above_the_others(above: float, at: int, device: str) -> None:
    """It may stand anywhere: no exponential is relative to less than the largest logit."""
    student = torch.randn(4, 2000) / 2
    student[:, at] = above
    teacher = student + torch.randn(4, 2000) / 100

    def gradient(function: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> Tensor:
        y = student.to(dtype).requires_grad_()
        (result,) = torch.autograd.grad(function(y, teacher.to(dtype)), y)
        return result.double().cpu()

    def ours(y: Tensor, z: Tensor) -> Tensor:
        return masked_divergence(y.to(device), z.to(device), reduction="sum")

    def peer(y: Tensor, z: Tensor) -> Tensor:
        return as_written(z.log_softmax(-1), y.log_softmax(-1), "forward_kl", 0.5).sum()

    truth = gradient(peer, torch.float64)
    error, baseline = (
        (gradient(f, torch.float32) - truth).abs().max().item() for f in (ours, peer)
    )
    # q and p are rounded, of which one is near 1.
    assert error <= baseline + 2 * torch.finfo(torch.float32).eps
    _, stats = masked_divergence(student.to(device), teacher.to(device), return_stats=True)
    assert (stats.entropy >= 0).all()


@pytest.mark.parametrize("apart", [-1e4, 100.0])
@pytest.mark.parametrize("cols", [301, 1301])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_far_apart(kind: str, cols: int, apart: float, device: str) -> None:
    """A constant changes no softmax, but the difference of two logits is rounded as it is."""
    student, teacher, _, _ = problem(torch.float32, cols)
    student = student.detach() - apart / 2 - 9  # their largest, of about 9, add up to nothing
    teacher += apart / 2 - 9

    def results(function: Any, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
        y = student.to(device, dtype).requires_grad_()
        loss = function(y, teacher.to(device, dtype), kind=kind, reduction="none")
        return loss.detach().cpu(), torch.autograd.grad(loss.sum(), y)[0].cpu()

    found = (
        results(masked_divergence, torch.float32, device),
        results(reference.masked_divergence, torch.float32, "cpu"),
        results(reference.masked_divergence, torch.float64, "cpu"),
    )
    for ours, theirs, exact in zip(*found, strict=True):
        slack = 4 * torch.finfo(torch.float32).eps * exact.abs().max()
        assert off(ours, exact) <= (theirs - exact).abs().max() + slack


@pytest.mark.parametrize("near", [1e-1, 1e-2, 1e-3, 1e-5])
@pytest.mark.parametrize("kind", KINDS)
def test_close_by(kind: str, near: float, device: str) -> None:
    """Right to 1e-5 where the sum of p (log p - log q) is nothing but rounding; never negative."""
    student, teacher, _, _ = problem(torch.float32, 4000, near=near)
    teacher.requires_grad_(False)
    ours = masked_divergence(student.to(device), teacher.to(device), kind=kind, reduction="none")
    truth = reference.masked_divergence(
        student.double(), teacher.double(), kind=kind, reduction="none"
    )
    assert (ours >= 0).all()
    limit = 1e-5 if near >= 1e-2 else 1e-3
    torch.testing.assert_close(ours.cpu().double(), truth, rtol=limit, atol=0)
    loss, peer = (
        ours.sum(),
        as_written(teacher.log_softmax(-1), student.log_softmax(-1), kind, 0.5).sum(),
    )
    gradient, peers, true = (
        torch.autograd.grad(x, student)[0].double() for x in (loss, peer, truth.sum())
    )
    slack = torch.finfo(torch.float32).eps * true.abs().max()
    assert (gradient - true).abs().max() <= (peers - true).abs().max() + slack


@pytest.mark.parametrize("kind", KINDS)
def test_of_equals_is_zero(kind: str, dtype: torch.dtype, device: str) -> None:
    logits = problem(dtype)[0].detach().to(device)
    loss = masked_divergence(logits, logits.clone(), kind=kind, reduction="none")
    assert (loss == 0).all()


@pytest.mark.parametrize("teacher_dtype", FLOATING)
def test_types_may_differ(teacher_dtype: torch.dtype, dtype: torch.dtype, device: str) -> None:
    student, teacher, _, _ = problem(dtype)
    teacher = teacher.to(teacher_dtype)
    ours = masked_divergence(student.to(device), teacher.to(device), kind="jsd")
    wide = student.detach().double().requires_grad_()
    truth = reference.masked_divergence(wide, teacher.double(), kind="jsd")
    eps = torch.finfo(ours.dtype).eps
    torch.testing.assert_close(ours.cpu().double(), truth, rtol=16 * eps, atol=0)
    (gradient,), (expected,) = (
        torch.autograd.grad(loss, leaf) for loss, leaf in ((ours, student), (truth, wide))
    )
    rounding = max(torch.finfo(dtype).eps, 16 * eps)
    torch.testing.assert_close(gradient.double(), expected, rtol=rounding, atol=2 * eps)


@pytest.mark.parametrize("kind", KINDS)
def test_strided_rows(kind: str, device: str) -> None:
    """A teacher with a larger vocabulary, sequences that are dimension 1: read where they are."""
    student = torch.randn(5, 3, 40).transpose(0, 1)[..., :33]
    teacher = torch.randn(3, 5, 50)[..., 3:36]
    ours = masked_divergence(student.to(device), teacher.to(device), kind=kind)
    same = masked_divergence(
        student.contiguous().to(device), teacher.contiguous().to(device), kind=kind
    )
    assert torch.equal(ours, same)


@pytest.mark.parametrize("excluded", ["both", "student", "teacher"])
@pytest.mark.parametrize("kind", KINDS)
def test_excluded_classes(kind: str, excluded: str, dtype: torch.dtype, device: str) -> None:
    student, teacher, _, _ = problem(dtype)
    nowhere = torch.zeros(301, dtype=torch.bool)
    nowhere[[3, 17, 300]] = True
    y = student.detach().masked_fill(nowhere, -INF) if excluded != "teacher" else student.detach()
    t = teacher.masked_fill(nowhere, -INF) if excluded != "student" else teacher
    y, t = y.to(device).requires_grad_(), t.to(device)
    loss = masked_divergence(y, t, kind=kind, beta=0.3, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), y)
    x = y.detach().double().requires_grad_()
    truth = reference.masked_divergence(x, t.double(), kind=kind, beta=0.3, reduction="none")
    eps = torch.finfo(loss.dtype).eps
    torch.testing.assert_close(loss.double(), truth, rtol=8 * eps, atol=8 * eps)
    infinite = (kind, excluded) in (("forward_kl", "student"), ("reverse_kl", "teacher"))
    assert infinite == loss.isinf().all()
    if (kind, excluded) == ("reverse_kl", "teacher"):
        assert gradient.isnan().any()
        return
    (true,) = torch.autograd.grad(truth.sum(), x)
    rounding = max(torch.finfo(dtype).eps, 16 * eps)
    torch.testing.assert_close(gradient.double(), true, rtol=rounding, atol=80 * eps)


@pytest.mark.parametrize("who", ["both", "student", "teacher"])
@pytest.mark.parametrize("kind", KINDS)
def test_classes_excluded_by_a_number(kind: str, who: str, device: str) -> None:
    """-10000 leaves a probability of 0, but not -inf, and what the other side has overflows."""
    pair = [x.detach() for x in problem(torch.float32)[:2]]
    for x, name in zip(pair, ("student", "teacher"), strict=True):
        x[..., ::7] = -1e4 if who in (name, "both") else 1.0
    y = pair[0].to(device).requires_grad_()
    loss = masked_divergence(y, pair[1].to(device), kind=kind, beta=0.3, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), y)
    x = pair[0].double().requires_grad_()
    truth = reference.masked_divergence(x, pair[1].double(), kind=kind, beta=0.3, reduction="none")
    (true,) = torch.autograd.grad(truth.sum(), x)
    torch.testing.assert_close(loss.cpu().double(), truth, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.cpu().double(), true, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "sequence_mean"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_masked_rows_are_never_read(bad: float, reduction: str, device: str) -> None:
    student, teacher, mask, _ = problem(torch.float32)
    rows = (mask == 0)[..., None]
    found = []
    for fill in (0.0, bad):
        y = student.detach().masked_fill(rows, fill).to(device).requires_grad_()
        t = teacher.masked_fill(rows, fill).to(device)
        loss = masked_divergence(y, t, mask.detach().to(device), kind="jsd", reduction=reduction)
        (gradient,) = torch.autograd.grad(loss.sum(), y)
        assert (gradient[mask == 0] == 0).all()
        found.append((loss.detach(), gradient))
    for clean, dirty in zip(*found, strict=True):
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize("kind", KINDS)
def test_active_nan_comes_out(kind: str, who: str, device: str) -> None:
    student, teacher, _, _ = problem(torch.float32)
    with torch.no_grad():
        (student if who == "student" else teacher)[0, 0, 7] = NAN
    y = student.detach().to(device).requires_grad_()
    loss = masked_divergence(y, teacher.to(device), kind=kind, reduction="none")
    specified = reference.masked_divergence(y.detach().cpu(), teacher, kind=kind, reduction="none")
    assert loss.isnan().sum() == specified.isnan().sum() == 1
    (gradient,) = torch.autograd.grad(loss.sum(), y)
    assert gradient[0, 0].isnan().any()
    assert gradient.view(-1, 301)[1:].isfinite().all()


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "sequence_mean"])
def test_every_token_masked(reduction: str, device: str) -> None:
    y = torch.full((2, 3, 7), NAN, device=device, requires_grad=True)
    loss = masked_divergence(y, y.detach(), torch.zeros(2, 3, device=device), reduction=reduction)
    assert (loss == 0).all()
    loss.sum().backward()
    assert (y.grad == 0).all()
