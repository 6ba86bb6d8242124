# SPDX-License-Identifier: BSD-3-Clause
"""Every small layout, above all the empty ones, gives what its contiguous copy gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations, permutations, product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from samples import REDUCTIONS
from torch import Tensor

import masked_loss
from masked_loss import linear_cross_entropy, masked_cross_entropy, masked_reduce

SIZES, CLASSES = (0, 1, 2), (1, 3)


def layouts(dims: int) -> Iterator[Tensor]:
    """Every order of the dimensions in memory, and every choice of some that have stride 0."""
    for shape in (*product(*[SIZES] * (dims - 1), CLASSES),):
        for order in permutations(range(dims)):
            inverse = [order.index(d) for d in range(dims)]
            yield torch.randn([shape[d] for d in order]).permute(inverse)
        for count in range(1, dims + 1):
            for repeated in combinations(range(dims), count):
                once = [min(1, n) if d in repeated else n for d, n in enumerate(shape)]
                yield torch.randn(once).expand(shape)


def evaluate(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, ...]:
    x = x.detach().requires_grad_()
    loss = function(x)
    upstream = 0.5 + torch.arange(loss.numel(), dtype=loss.dtype).view(loss.shape)
    return loss.detach(), *torch.autograd.grad(loss, x, upstream)


def assert_as_contiguous(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    loss, gradient = evaluate(function, x)
    expected_loss, expected_gradient = evaluate(
        function, x.clone(memory_format=torch.contiguous_format)
    )
    assert torch.equal(loss, expected_loss), (x.shape, x.stride())
    assert torch.equal(gradient, expected_gradient), (x.shape, x.stride())
    if x.numel() == 0:
        with torch.no_grad():
            assert torch.equal(function(x), loss)
        assert loss.sum() == 0


def half_masked(shape: torch.Size) -> Tensor:
    return (torch.arange(shape.numel()) % 2 == 0).view(shape)


@pytest.mark.parametrize("dims", [2, 3, 4])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_masked_cross_entropy(reduction: str, dims: int) -> None:
    for i, x in enumerate(layouts(dims)):
        target = torch.arange(x[..., 0].numel()).view(x.shape[:-1]) % x.shape[-1]
        assert_as_contiguous(
            lambda x, t=target, shift=i % 2 == 1: masked_cross_entropy(  # type: ignore[misc]
                x, t, half_masked(t.shape), reduction=reduction, shift=shift, softcap=5.0
            ),
            x,
        )


@pytest.mark.parametrize("dims", [2, 3, 4])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_dropin(reduction: str, dims: int) -> None:
    """Classes in dimension 1, and targets that are indices or probabilities."""
    for i, x in enumerate(layouts(dims)):
        x = x.movedim(-1, 1)
        target = torch.arange(x[:, 0].numel()).view(x[:, 0].shape) % x.shape[1]
        if i % 2:
            target = torch.rand(x.shape)
        assert_as_contiguous(
            lambda x, t=target: masked_loss.cross_entropy(x, t, reduction=reduction),  # type: ignore[misc]
            x,
        )


@pytest.mark.parametrize("dims", [1, 2, 3, 4])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_masked_reduce(reduction: str, dims: int) -> None:
    for x in layouts(dims):
        assert_as_contiguous(
            lambda x: masked_reduce(x, half_masked(x.shape), reduction=reduction), x
        )


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_linear_cross_entropy(reduction: str, dims: int) -> None:
    """Products may round a layout's numbers in another order."""
    for x in layouts(dims):
        head = torch.randn(4, x.shape[-1])
        target = torch.arange(x[..., 0].numel()).view(x.shape[:-1]) % 4
        for mask in (None, half_masked(target.shape)):
            function = lambda x, m=mask, h=head, t=target: linear_cross_entropy(  # type: ignore[misc] # noqa: E731
                x, h, t, m, reduction=reduction
            )
            ours, theirs = evaluate(function, x), evaluate(function, x.contiguous())
            torch.testing.assert_close(ours, theirs)


EMPTY = [(0, 5), (2, 0, 5), (0, 3, 5), (2, 0, 4, 5), (2, 3, 0, 5)]


@pytest.mark.parametrize("shape", EMPTY)
def test_empty_of_every_other_function(shape: tuple[int, ...]) -> None:
    """Log-probabilities, divergences, moments: nothing, or 0, and gradients of 0."""
    tokens = shape[:-1]
    target, mask = torch.zeros(tokens, dtype=torch.long), torch.ones(tokens)
    for order in permutations(range(len(shape))):
        lies = [shape[d] for d in order]
        x = torch.randn(lies).permute(*(order.index(d) for d in range(len(shape)))).requires_grad_()
        head = torch.randn(3, 5, requires_grad=True)
        results = [
            *masked_loss.token_log_probs(x, target, mask, return_entropy=True),
            masked_loss.token_log_probs(x, target[..., None].expand(*tokens, 2)),
            *masked_loss.linear_token_log_probs(x, head, target, mask, return_entropy=True),
            *masked_loss.masked_moments(x),
            masked_loss.masked_whiten(x),
            masked_reduce(x[..., 0], mask, reduction="sum", dim=-1),
            masked_loss.global_normalizer(target, mask),
        ]
        for reduction in REDUCTIONS:
            y = x.detach()
            results += [
                masked_loss.masked_divergence(x, y, mask, reduction=reduction),
                masked_loss.linear_divergence(x, head, y, head.detach(), mask, reduction=reduction),
                masked_loss.topk_divergence(x, y, mask, reduction=reduction),
            ]
        assert not any(result.any() for result in results)
        total = torch.stack([result.sum() for result in results]).sum()
        of_x, of_head = torch.autograd.grad(total, (x, head))
        assert of_x.shape == shape
        assert not of_head.any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_heads_without_width(reduction: str) -> None:
    """Their logits are the bias: a product over nothing is 0."""
    hidden, weight = torch.randn(2, 3, 0, requires_grad=True), torch.randn(5, 0, requires_grad=True)
    bias, teacher = (torch.randn(5, requires_grad=True) for _ in range(2))
    target, mask = torch.arange(6).view(2, 3) % 5, half_masked(torch.Size((2, 3)))
    of_teacher = {"teacher_hidden": hidden.detach(), "teacher_weight": weight.detach()}
    logits = F.linear(hidden, weight, bias)
    dense = F.linear(hidden, weight, teacher).detach()
    for ours, theirs in (
        (
            linear_cross_entropy(hidden, weight, target, mask, bias=bias, reduction=reduction),
            masked_cross_entropy(logits, target, mask, reduction=reduction),
        ),
        (
            masked_loss.linear_divergence(
                hidden, weight, **of_teacher, mask=mask, bias=bias, teacher_bias=teacher.detach(),
                reduction=reduction,
            ),
            masked_loss.masked_divergence(logits, dense, mask, reduction=reduction),
        ),
        (
            masked_loss.linear_token_log_probs(hidden, weight, target, mask, bias=bias),
            masked_loss.token_log_probs(logits, target, mask),
        ),
    ):  # fmt: skip
        torch.testing.assert_close(ours, theirs)
        inputs = (hidden, weight, bias)
        of_ours, of_theirs = (
            torch.autograd.grad(x.sum(), inputs, retain_graph=True) for x in (ours, theirs)
        )
        torch.testing.assert_close(of_ours, of_theirs)


@pytest.mark.parametrize("shape", EMPTY)
def test_empty_in_every_other_form(shape: tuple[int, ...]) -> None:
    """Modules, statistics, in-place gradients, means, compiled graphs, operators."""
    tokens = shape[:-1]
    target, mask = torch.zeros(tokens, dtype=torch.long), torch.zeros(tokens, requires_grad=True)
    hidden, head = torch.randn(*tokens, 2, requires_grad=True), torch.randn(5, 2)

    def logits() -> Tensor:
        return torch.randn(shape).transpose(0, -1).contiguous().transpose(0, -1).requires_grad_()

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        torch._dynamo.reset()
        return torch.compile(function, backend="aot_eager", fullgraph=True)

    for reduction in REDUCTIONS:
        options: dict[str, Any] = {"reduction": reduction}
        losses = {
            "stats": masked_cross_entropy(logits(), target, mask, return_stats=True, **options)[0],
            "in place": masked_cross_entropy(logits(), target, inplace_backward=True, **options),
            "module": masked_loss.MaskedCrossEntropyLoss(**options)(logits(), target, mask),
            "linear": masked_loss.LinearCrossEntropyLoss(**options)(hidden, head, target, mask),
            "stats of linear": linear_cross_entropy(
                hidden, head, target, mask, return_stats=True, **options
            )[0],
            "operator": torch.ops.masked_loss.cross_entropy(logits(), target, mask, **options),
        }
        # Every reduction of one shape, and of the others one.
        compiles = reduction == "mean" or shape == (2, 0, 5)
        if compiles:
            losses |= {
                "compiled": compiled(masked_cross_entropy)(logits(), target, mask, **options),
                "compiled linear": compiled(linear_cross_entropy)(hidden, head, target, **options),
            }
        if reduction != "sequence_mean":
            input = logits().movedim(-1, 1)
            losses["drop-in"] = masked_loss.CrossEntropyLoss(**options)(input, target, mask=mask)
            if compiles:
                dropin = compiled(masked_loss.cross_entropy)
                losses["compiled drop-in"] = dropin(input, target, **options)
        for name, loss in losses.items():
            assert loss.shape == (tokens if reduction == "none" else ()), name
            assert loss.sum() == 0, name
            loss.sum().backward()
    assert masked_loss.masked_mean(torch.zeros(tokens), mask) == 0
    assert torch.equal(mask.grad, torch.zeros(tokens))
    assert torch.equal(hidden.grad, torch.zeros(*tokens, 2))
