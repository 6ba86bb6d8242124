# SPDX-License-Identifier: BSD-3-Clause
"""Every small layout, above all the empty ones, gives what its contiguous copy gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations, permutations, product
from typing import Any

import pytest
import torch
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


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (0, 3, 5), (2, 0, 4, 5), (2, 3, 0, 5)])
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
