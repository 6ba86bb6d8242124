# SPDX-License-Identifier: BSD-3-Clause
"""The specification of log-probabilities and divergences agrees with what PyTorch has of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from masked_loss import reference

INF = float("inf")
KINDS = list(reference.DIVERGENCES)
BETA = 0.3


def rows(*shape: int) -> Tensor:
    return (3 * torch.randn(*shape, dtype=torch.float64)).requires_grad_()


def close(ours: Tensor, truth: Tensor) -> None:
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-13)


def mixture(p: Tensor, q: Tensor, kind: str) -> Tensor:
    """Each kind as written in the papers, from probabilities."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return F.kl_div(b.log(), a, reduction="none").sum(-1)

    if kind == "forward_kl":
        return kl(p, q)
    if kind == "reverse_kl":
        return kl(q, p)
    if kind == "jsd":
        m = BETA * p + (1 - BETA) * q
        return BETA * kl(p, m) + (1 - BETA) * kl(q, m)
    if kind == "skew_forward_kl":
        return kl(p, BETA * p + (1 - BETA) * q)
    return kl(q, (1 - BETA) * p + BETA * q)


def slope(p: Tensor, q: Tensor, kind: str) -> Tensor:
    """The gradient with respect to the student's logits, as docs/semantics.md has it."""

    def mean(x: Tensor) -> Tensor:
        return (q * x).sum(-1, keepdim=True)

    if kind == "forward_kl":
        return q - p
    if kind == "reverse_kl":
        return q * ((q / p).log() - mean((q / p).log()))
    if kind == "skew_forward_kl":
        ratio = p / (BETA * p + (1 - BETA) * q)
        return (1 - BETA) * q * (mean(ratio) - ratio)
    c = BETA if kind == "jsd" else 1 - BETA
    u = (q / (c * p + (1 - c) * q)).log()
    if kind == "jsd":
        return (1 - BETA) * q * (u - mean(u))
    w = u - BETA * u.exp()
    return q * (w - mean(w))


@pytest.mark.parametrize("kind", KINDS)
def test_divergences(kind: str) -> None:
    student, teacher = rows(4, 7), rows(4, 7).detach()
    p, q = teacher.softmax(-1), student.softmax(-1)
    ours = reference.masked_divergence(student, teacher, kind=kind, beta=BETA, reduction="none")
    close(ours, mixture(p, q, kind))
    (gradient,) = torch.autograd.grad(ours.sum(), student)
    close(gradient, slope(p, q, kind).detach())
    assert torch.autograd.gradcheck(
        lambda y: reference.masked_divergence(y, teacher, kind=kind, beta=BETA), student
    )


def test_divergences_are_those_of_torch_distributions() -> None:
    student, teacher = rows(4, 7), rows(4, 7).detach()
    p, q = Categorical(logits=teacher / 2), Categorical(logits=student / 3)
    options = {"temperature": 3.0, "teacher_temperature": torch.tensor(2.0), "reduction": "none"}
    close(reference.masked_divergence(student, teacher, **options), kl_divergence(p, q))
    reverse = reference.masked_divergence(student, teacher, kind="reverse_kl", **options)
    close(reverse, kl_divergence(q, p))


@pytest.mark.parametrize("kind", KINDS)
def test_classes_without_probability(kind: str) -> None:
    """A class impossible for both adds nothing, neither to the value nor to a gradient."""
    student, teacher = rows(3, 5), rows(3, 5).detach()
    nowhere = torch.tensor([False, False, True, False, False])
    ours = reference.masked_divergence(
        student.masked_fill(nowhere, -INF), teacher.masked_fill(nowhere, -INF), kind=kind, beta=BETA
    )
    without = reference.masked_divergence(
        student[:, ~nowhere], teacher[:, ~nowhere], kind=kind, beta=BETA
    )
    close(ours, without)
    close(torch.autograd.grad(ours, student)[0], torch.autograd.grad(without, student)[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_class_without_probability_for_one(kind: str, who: str) -> None:
    """Infinite where the mathematics is: what the student excludes; reversed, the teacher."""
    student, teacher = rows(3, 5), rows(3, 5).detach()
    nowhere = torch.tensor([False, False, True, False, False])
    y = student.masked_fill(nowhere, -INF) if who == "student" else student
    t = teacher.masked_fill(nowhere, -INF) if who == "teacher" else teacher
    ours = reference.masked_divergence(y, t, kind=kind, beta=BETA, reduction="none")
    (gradient,) = torch.autograd.grad(ours.sum(), student)
    if (kind, who) == ("forward_kl", "student"):
        assert (ours == INF).all()
        close(gradient, (y.softmax(-1) - t.softmax(-1)).masked_fill(nowhere, 0).detach())
    elif (kind, who) == ("reverse_kl", "teacher"):
        assert (ours == INF).all()
    else:
        p, q = t.softmax(-1), y.softmax(-1)
        close(ours, mixture(p, q, kind).detach())
        assert gradient.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_never_negative_and_zero_for_equals(kind: str) -> None:
    logits = rows(4, 7).detach()
    assert (reference.masked_divergence(logits, logits.clone(), kind=kind) == 0).all()
    close_by = logits + 1e-9 * torch.randn_like(logits)
    divergence = reference.masked_divergence(close_by, logits, kind=kind, reduction="none")
    assert (divergence >= 0).all()


@pytest.mark.parametrize("several", [False, True])
def test_token_log_probs(several: bool) -> None:
    logits = rows(3, 5, 7)
    target = torch.randint(7, (3, 5, 4) if several else (3, 5))
    temperature = 0.5 + torch.rand(3, 5, dtype=torch.float64)
    logp, entropy = reference.token_log_probs(
        logits, target, temperature=temperature, softcap=4.0, return_entropy=True
    )
    truth = Categorical(logits=4 * (logits / 4).tanh() / temperature[..., None])
    expected = (
        torch.stack([truth.log_prob(ids) for ids in target.unbind(-1)], -1)
        if several
        else truth.log_prob(target)
    )
    close(logp, expected)
    close(entropy, truth.entropy())
    upstream = torch.randn_like(logp), torch.randn_like(entropy)
    ours = torch.autograd.grad((logp, entropy), logits, upstream)
    close(ours[0], torch.autograd.grad((expected, truth.entropy()), logits, upstream)[0])


def test_token_log_probs_of_a_sampling_mask() -> None:
    """Excluded classes: the entropy of the others, finite gradients, targets of -inf."""
    logits = rows(2, 6)
    nowhere = torch.tensor([False, True, False, False, True, False])
    y = logits.masked_fill(nowhere, -INF)
    logp, entropy = reference.token_log_probs(y, torch.tensor([1, 2]), return_entropy=True)
    close(entropy, Categorical(logits=logits[:, ~nowhere]).entropy())
    assert logp[0] == -INF
    (gradient,) = torch.autograd.grad(logp.sum() + entropy.sum(), logits)
    assert gradient.isfinite().all()


def test_what_masks_a_token() -> None:
    logits = rows(4, 6)
    mask, target = torch.tensor([1, 0, 1, 1]), torch.tensor([1, 2, -100, 3])
    with torch.no_grad():
        logits[1] = float("nan")
    logp, entropy = reference.token_log_probs(logits, target, mask, return_entropy=True)
    assert (logp != 0).tolist() == (entropy != 0).tolist() == [True, False, False, True]
    ids = torch.stack([target, torch.tensor([0, 0, -100, -100])], -1)
    logp, entropy = reference.token_log_probs(logits, ids, mask, return_entropy=True)
    assert (logp != 0).tolist() == [[True, True], [False, False], [False, False], [True, False]]
    assert (entropy != 0).tolist() == [True, False, True, True]
    (gradient,) = torch.autograd.grad(logp.sum() + entropy.sum(), logits)
    assert gradient.isfinite().all()
    assert (gradient[1] == 0).all()


@pytest.mark.parametrize("function", ["token_log_probs", "masked_divergence"])
def test_shift(function: str) -> None:
    logits, mask = rows(2, 5, 7), torch.rand(2, 5) < 0.7
    temperature = 0.5 + torch.rand(2, 5, dtype=torch.float64)
    if function == "token_log_probs":
        second, options = torch.randint(7, (2, 5)), {}
        moved = second[:, 1:]
    else:
        second, options = rows(2, 5, 7).detach(), {"reduction": "none"}
        moved = second[:, :-1]
    call = getattr(reference, function)
    ours = call(logits, second, mask, temperature=temperature, shift=True, **options)
    truth = call(logits[:, :-1], moved, mask[:, 1:], temperature=temperature[:, 1:], **options)
    assert (ours[:, 0] == 0).all()
    close(ours[:, 1:], truth)


def test_statistics_of_a_divergence() -> None:
    student, teacher, mask = rows(3, 5), rows(3, 5).detach(), torch.tensor([2.0, 0.0, 1.0])
    loss, stats = reference.masked_divergence(student, teacher, mask, return_stats=True)
    p, q = Categorical(logits=teacher), Categorical(logits=student)
    w = mask.double()
    expected = [
        w.sum(),
        (w * kl_divergence(p, q)).sum(),
        (w * q.entropy()).sum(),
        (w * p.entropy()).sum(),
        (w * (student.argmax(-1) == teacher.argmax(-1))).sum(),
    ]
    for ours, truth in zip(stats, expected, strict=True):
        close(ours, truth.detach())
    close(loss, expected[1] / expected[0])


def test_sequence_mean_with_a_normalizer() -> None:
    values, mask = rows(3, 4), torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    ours = reference.masked_reduce(values, mask, reduction="sequence_mean", normalizer=3)
    close(ours, (values[0, :2].mean() + values[2].mean()) / 3)
