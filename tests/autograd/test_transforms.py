# SPDX-License-Identifier: BSD-3-Clause
"""Second derivatives, forward mode and torch.func of every loss, against the specification."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from derivative_samples import (
    CLASSES,
    EVERYTHING,
    HEAD,
    LOSSES,
    TRANSFORMS,
    Loss,
    all_losses,
    all_operators,
    normal,
    penalty,
    problem,
    push,
)
from torch import Tensor
from torch.autograd import forward_ad

from masked_loss import (
    linear_cross_entropy,
    masked_cross_entropy,
    reference,
    token_log_probs,
)


@all_operators
def test_transforms(loss: str) -> None:
    logits, target, mask = problem(1, 3)
    names = ["grad", "jvp", "hessian", "penalty"]  # an operator has all else in common
    if loss in LOSSES:
        names = [name for name in TRANSFORMS if loss == "mean" or "third" not in name]
    for name in names:
        ours, truth = (
            TRANSFORMS[name](lambda x, f=f: f(x, target, mask))(logits) for f in EVERYTHING[loss]
        )
        torch.testing.assert_close(ours, truth, msg=lambda text, name=name: f"{name}: {text}")


@all_losses
def test_autograd_functional(loss: str) -> None:
    logits, target, mask = problem(1, 2)
    vector = torch.randn_like(logits)
    functional = torch.autograd.functional
    for call in (
        lambda f: functional.hessian(f, logits),
        lambda f: functional.hvp(f, logits, vector)[1],
        lambda f: functional.vhp(f, logits, vector)[1],
        lambda f: functional.jvp(f, logits, vector)[1],
        lambda f: functional.vjp(f, logits)[1],
        lambda f: functional.jacobian(f, logits, strategy="forward-mode", vectorize=True),
        lambda f: functional.hessian(
            f, logits, vectorize=True, outer_jacobian_strategy="forward-mode"
        ),
    ):
        ours, truth = (call(lambda x, f=f: f(x, target, mask)) for f in LOSSES[loss])
        torch.testing.assert_close(ours, truth)


@all_operators
def test_create_graph(loss: str) -> None:
    """A gradient penalty on logits and mask, and an upstream gradient that requires grad."""
    logits, target, mask = problem(2, 3)
    results = []
    for function in EVERYTHING[loss]:
        leaves = [logits.clone().requires_grad_(), mask.clone().requires_grad_()]
        scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        total = function(leaves[0], target, leaves[1]) * scale
        first = torch.autograd.grad(total, leaves, create_graph=True)
        (sum((g**2).sum() for g in first) + total).backward()
        results.append([*first, *(leaf.grad for leaf in leaves), scale.grad])
    torch.testing.assert_close(*results)


@all_losses
def test_autograd_grad_within_a_transform(loss: str) -> None:
    """A second derivative of the same level, which nothing outside of the transform tells."""
    logits, target, mask = problem(2, 3)

    def inner(f: Loss) -> Tensor:
        def penalty(x: Tensor) -> Tensor:
            value = f(x, target, mask)
            (gradient,) = torch.autograd.grad(value, x, create_graph=True)
            return (gradient**2).sum() + value

        return torch.func.grad(penalty)(logits)

    torch.testing.assert_close(*map(inner, LOSSES[loss]))


@all_operators
def test_dual_numbers(loss: str) -> None:
    """Of the inputs, and of an upstream gradient that comes later."""
    logits, target, mask = problem(2, 3)
    results = []
    for function in EVERYTHING[loss]:
        x = logits.clone().requires_grad_()
        value = function(x, target, mask)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(logits, torch.ones_like(logits))
            pushed = forward_ad.unpack_dual(function(dual, target, mask)).tangent
            upstream = forward_ad.make_dual(torch.ones_like(value), 2 * torch.ones_like(value))
            (gradient,) = torch.autograd.grad(value, x, upstream)
            results.append([pushed, *forward_ad.unpack_dual(gradient)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_types(dtype: torch.dtype) -> None:
    """The derivatives of half types are computed in float32, and rounded once."""
    logits, target, _ = problem(2, 3, dtype=dtype)
    wide, eps = logits.double(), torch.finfo(dtype).eps

    def both(x: Tensor, f: Loss) -> tuple[Tensor, Tensor]:
        loss = f(x.requires_grad_(), target)
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        return gradient, torch.autograd.grad((gradient.double() ** 2).sum(), x)[0]

    ours, truth = both(logits, masked_cross_entropy), both(wide, reference.masked_cross_entropy)
    for a, b in zip(ours, truth, strict=True):
        assert a.dtype == dtype
        # The gradient is rounded before anyone differentiates a function of it.
        torch.testing.assert_close(a.double(), b, rtol=eps, atol=2 * eps * b.abs().max().item())
    tangent = torch.randn_like(logits)
    _, pushed = torch.func.jvp(lambda x: masked_cross_entropy(x, target), (logits,), (tangent,))
    _, truth = torch.func.jvp(
        lambda x: reference.masked_cross_entropy(x, target), (wide,), (tangent.double(),)
    )
    assert pushed.dtype == torch.float32
    torch.testing.assert_close(pushed.double(), truth, rtol=2.4e-7, atol=2.4e-7)


@pytest.mark.parametrize("loss", sorted(LOSSES.keys() - {"none", "masked_reduce", "probabilities"}))
def test_masked_rows_are_never_read(loss: str) -> None:
    """Neither they nor their tangents."""
    logits, target, mask = problem(2, 3)
    mask[1, 2] = 0
    mask[0, 0] = 0 if "divergence" in loss else 1
    tangent = torch.randn_like(logits)
    function, results = LOSSES[loss][0], []
    for value in (0.0, float("nan")):
        x, v = logits.clone(), tangent.clone()
        x[1, 2] = x[0, 0] = v[1, 2] = v[0, 0] = value

        def f(x: Tensor) -> Tensor:
            return function(x, target, mask)

        results.append((penalty(f)(x), torch.func.jvp(f, (x,), (v,))[1]))
    assert all(torch.isfinite(x).all() for x in results[1])
    torch.testing.assert_close(results[0], results[1])


def test_mistakes_are_told_where_no_kernel_looks() -> None:
    logits, target, _ = problem(2, 3)
    for call in (
        lambda x: masked_cross_entropy(x, target[:1]),
        lambda x: linear_cross_entropy(x, HEAD, target[:1]),
        lambda x: token_log_probs(x, target[:1]),
    ):
        with pytest.raises(ValueError, match=r"target must have shape \[2, 3\]"):
            push(call)(logits)
        with pytest.raises(ValueError, match=r"target must have shape \[2, 3\]"):
            torch.func.grad(call)(logits)


def test_linear_does_not_keep_hidden_for_a_second_derivative() -> None:
    """A scalar loss has its gradients; it finds what it needs for more, or says what that is."""
    hidden, target, mask = problem(2, 3)
    weight, x = normal(CLASSES, CLASSES), hidden.requires_grad_()

    def second(hidden: Tensor, loss: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad((g**2).sum(), x)[0]

    middle = x * 2
    loss = linear_cross_entropy(middle, weight, target, mask)
    logits = torch.nn.functional.linear(2 * x, weight)
    truth = second(x, reference.masked_cross_entropy(logits, target, mask))
    torch.testing.assert_close(second(middle, loss), truth)
    loss = linear_cross_entropy(x * 2, weight, target, mask)
    with pytest.raises(RuntimeError, match=r"a second derivative needs hidden, which is gone"):
        second(x, loss)
    torch.autograd.grad(linear_cross_entropy(x * 2, weight, target, mask), x)
    losses = linear_cross_entropy(x * 2, weight, target, mask, reduction="none")
    torch.testing.assert_close(second(x, losses.sum() / mask.where(target >= 0, 0).sum()), truth)
    loss = linear_cross_entropy(middle, weight, target, mask)
    middle.detach().add_(1)
    with pytest.raises(RuntimeError, match=r"hidden, which has been modified"):
        second(middle, loss)


@all_losses
def test_functional_call_with_gradients_of_each_sample(loss: str) -> None:
    layer = torch.nn.Linear(4, CLASSES, dtype=torch.float64)
    inputs = normal(3, 2, 4)
    _, target, mask = problem(3, 2)
    parameters = {k: v.detach() for k, v in layer.named_parameters()}
    results = []
    for function in LOSSES[loss]:

        def of_sample(p: Any, x: Tensor, t: Tensor, m: Tensor, f: Loss = function) -> Tensor:
            return f(torch.func.functional_call(layer, p, (x,))[None], t[None], m[None])

        each = torch.func.vmap(torch.func.grad(of_sample), in_dims=(None, 0, 0, 0))
        results.append(each(parameters, inputs, target, mask))
    torch.testing.assert_close(*results)
