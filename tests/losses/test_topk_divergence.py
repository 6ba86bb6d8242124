# SPDX-License-Identifier: BSD-3-Clause
"""topk_divergence against torch.distributions of K + 1 classes, and what makes it a divergence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from masked_loss import reference, topk_divergence

INF = float("inf")
KINDS = list(reference.DIVERGENCES)
V, K = 40, 5


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """The student's logits, the teacher's log-probabilities, and the teacher's K likeliest ids."""
    student = (2 * torch.randn(3, 4, V, dtype=dtype)).requires_grad_()
    teacher = (2 * torch.randn(3, 4, V, dtype=dtype)).log_softmax(-1)
    return student, teacher, teacher.topk(K).indices


def with_tail(p: Tensor) -> Tensor:
    return torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1)


@pytest.mark.parametrize("kind", KINDS)
def test_is_the_divergence_of_k_and_one_classes(kind: str) -> None:
    student, teacher, ids = problem()
    log_q = student.log_softmax(-1)
    ours = topk_divergence(
        log_q.gather(-1, ids), teacher.gather(-1, ids), kind=kind, beta=0.3, reduction="none"
    )
    p, q = (with_tail(x.exp().gather(-1, ids)) for x in (teacher, log_q))
    truth = reference.divergence(p.log(), q.log(), kind, 0.3)
    torch.testing.assert_close(ours, truth)
    gradients = (torch.autograd.grad(x.sum(), student, retain_graph=True)[0] for x in (ours, truth))
    torch.testing.assert_close(*gradients)
    full = reference.masked_divergence(student, teacher, kind=kind, beta=0.3, reduction="none")
    assert (ours <= full).all()
    assert (ours > 0).all()


def test_forward_kl_is_that_of_torch_distributions() -> None:
    student, teacher, ids = problem()
    p, q = (with_tail(x.softmax(-1).gather(-1, ids)) for x in (teacher, student))
    ours = topk_divergence(q[..., :-1].log(), p[..., :-1].log(), reduction="none")
    torch.testing.assert_close(ours, kl_divergence(Categorical(p), Categorical(q)))


def test_without_a_tail_both_are_renormalized() -> None:
    student, teacher, ids = problem()
    log_q, log_p = (x.log_softmax(-1).gather(-1, ids) for x in (student, teacher))
    ours = topk_divergence(log_q, log_p, tail=False, reduction="none")
    p, q = Categorical(logits=log_p), Categorical(logits=log_q)
    torch.testing.assert_close(ours, kl_divergence(p, q))
    first = topk_divergence(log_q[..., :1], log_p[..., :1], tail=False, reduction="none")
    torch.testing.assert_close(first, torch.zeros_like(first))


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_shorter_lists_end_in_infinities(kind: str, tail: bool) -> None:
    """Whatever the student's log-probability of no class is: 0, as of an ignored id, or NaN."""
    student, teacher, ids = problem()
    log_q, log_p = (x.log_softmax(-1).gather(-1, ids) for x in (student, teacher))
    options = {"kind": kind, "tail": tail}
    for filler in (0.0, -INF, float("nan")):
        longer = torch.cat([log_q, torch.full_like(log_q, filler)], -1)
        nothing = torch.cat([log_p, torch.full_like(log_p, -INF)], -1)
        ours, truth = (
            topk_divergence(longer, nothing, **options),
            topk_divergence(log_q, log_p, **options),
        )
        torch.testing.assert_close(ours, truth)
        gradient = torch.autograd.grad(ours, student, retain_graph=True)[0]
        torch.testing.assert_close(
            gradient, torch.autograd.grad(truth, student, retain_graph=True)[0]
        )


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_no_class_at_all_is_zero_and_attached(kind: str, tail: bool) -> None:
    log_q = torch.randn(2, K, requires_grad=True)
    loss = topk_divergence(log_q, torch.full((2, K), -INF), kind=kind, tail=tail)
    assert loss == 0
    loss.backward()
    assert (log_q.grad == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_sums_above_one(kind: str) -> None:
    """What half precision and servers make of probabilities that sum to 1: finite, not negative."""
    log_p = torch.tensor([[0.7, 0.3001, 0.0001]]).log()
    log_q = torch.tensor([[0.6, 0.3, 0.1001]]).log().requires_grad_()
    loss = topk_divergence(log_q, log_p, kind=kind)
    assert 0 <= loss.item() < 1
    loss.backward()
    assert log_q.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_student_rest_has_a_floor(kind: str) -> None:
    """A student that gives everything to the K classes: a finite loss and gradient."""
    student = torch.tensor([[200.0, 0.0, -300.0]], requires_grad=True)
    log_q = student.log_softmax(-1)[..., :1]
    loss = topk_divergence(log_q, torch.tensor([[0.5]]).log(), kind=kind)
    assert loss.isfinite()
    loss.backward()
    assert student.grad.isfinite().all()


def test_close_by(dtype: torch.dtype) -> None:
    """Right to 1e-5 although log q - log p has lost digits; exactly 0 where both are the same."""
    _, teacher, ids = problem()
    log_p = teacher.gather(-1, ids).to(dtype)
    assert (topk_divergence(log_p, log_p, reduction="none") == 0).all()
    wide = dtype if dtype == torch.float64 else torch.float32
    log_q = log_p.to(wide) - 1e-3 * torch.rand_like(log_p.to(wide))
    ours = topk_divergence(log_q, log_p, reduction="none")
    p, q = (with_tail(x.double().exp()) for x in (log_p, log_q))
    truth = reference.divergence(p.log(), q.log(), "forward_kl", 0.5)
    assert ours.dtype == wide
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=0)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "sequence_mean"])
def test_masked_tokens_are_never_read(reduction: str) -> None:
    student, teacher, ids = problem()
    mask = torch.rand(3, 4) * (torch.rand(3, 4) < 0.5)
    mask[0, 0], mask[1] = 0.5, 0
    log_q, log_p = (x.log_softmax(-1).gather(-1, ids).detach() for x in (student, teacher))
    dirty = [x.masked_fill((mask == 0)[..., None], float("nan")) for x in (log_q, log_p)]
    losses = []
    for q, p in ((log_q, log_p), dirty):
        q.requires_grad_()
        loss = topk_divergence(q, p, mask, reduction=reduction)
        (gradient,) = torch.autograd.grad(loss.sum(), q)
        losses.append((loss.detach(), gradient))
        assert (gradient[mask == 0] == 0).all()
    for clean, other in zip(*losses, strict=True):
        assert torch.equal(clean, other)
    each = topk_divergence(log_q, log_p, reduction="none")
    torch.testing.assert_close(
        losses[0][0], reference.masked_reduce(each, mask, reduction=reduction).detach()
    )


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str, tail: bool) -> None:
    _, teacher, ids = problem()
    log_q = torch.randn(3, 4, K, dtype=torch.float64).sub(3).requires_grad_()

    def loss(log_q: Tensor) -> Tensor:
        return topk_divergence(log_q, teacher.gather(-1, ids), kind=kind, tail=tail)

    assert torch.autograd.gradcheck(loss, log_q)


def test_compiled() -> None:
    student, teacher, ids = problem(torch.float32)

    def loss(student: Tensor) -> Tensor:
        return topk_divergence(student.log_softmax(-1).gather(-1, ids), teacher.gather(-1, ids))

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(student), loss(student))


def test_errors() -> None:
    who, x = "topk_divergence", torch.zeros(2, 3, K)
    with pytest.raises(TypeError, match=f"{who}: log_probs must be float64, .*, got int64"):
        topk_divergence(x.long(), x)
    with pytest.raises(ValueError, match=rf"{who}: .* \[2, 3, 5\] and \[2, 3, 4\]"):
        topk_divergence(x, x[..., 1:])
    with pytest.raises(ValueError, match=rf"{who}: mask must have shape \[2, 3\], got \[3\]"):
        topk_divergence(x, x, torch.ones(3))
    with pytest.raises(ValueError, match=f"{who}: kind must be one of forward_kl, .*, got .kl."):
        topk_divergence(x, x, kind="kl")
    for beta in (0, 1):
        with pytest.raises(ValueError, match=r"beta must be above 0 .*forward_kl.*reverse_kl"):
            topk_divergence(x, x, kind="jsd", beta=beta)
    with pytest.raises(ValueError, match='beta must be at least 0 and below 1 for "skew_forward'):
        topk_divergence(x, x, kind="skew_forward_kl", beta=1)
    with pytest.raises(TypeError, match=f"{who}: beta must be a number, got str"):
        topk_divergence(x, x, kind="jsd", beta="half")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="teacher_log_probs is not differentiable"):
        topk_divergence(x, x.clone().requires_grad_())
    with pytest.raises(ValueError, match=f"{who}: reduction must be .*, got .?avg"):
        topk_divergence(x, x, reduction="avg")
