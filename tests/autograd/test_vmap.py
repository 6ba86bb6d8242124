# SPDX-License-Identifier: BSD-3-Clause
"""torch.func.vmap: one call of the kernel for all elements, whatever of them is batched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from masked_loss import (
    linear_cross_entropy,
    masked_cross_entropy,
    masked_divergence,
    masked_reduce,
    token_log_probs,
)

Loss = Callable[..., Any]
REDUCTIONS = ["none", "sum", "mean", "sequence_mean"]
ELEMENTS, CLASSES = 3, 6
WEIGHT = torch.linspace(0.5, 1.5, CLASSES, dtype=torch.float64)


def problem(*shape: int) -> list[Tensor]:
    """logits, target, mask; a token is ignored, one is masked, and one element has none."""
    shape = (ELEMENTS, *shape)
    logits = torch.randn(*shape, CLASSES, dtype=torch.float64)
    target, mask = torch.randint(CLASSES, shape), torch.rand(shape, dtype=torch.float64) + 0.1
    target.view(-1)[0], mask.view(-1)[1], mask[1] = -100, 0, 0
    return [logits, target, mask]


LOSSES: dict[str, Callable[[str], Loss]] = {
    "cross entropy": lambda r: lambda x, t, m: masked_cross_entropy(x, t, m, reduction=r),
    "options": lambda r: (
        lambda x, t, m: masked_cross_entropy(
            x, t, m, reduction=r, z_loss=0.1, softcap=3.0, label_smoothing=0.1, class_weight=WEIGHT
        )
    ),
    "shift": lambda r: (
        lambda x, t, m: masked_cross_entropy(x, t, m, reduction=r, shift=True, temperature=0.7)
    ),
    "normalizer": lambda r: (
        lambda x, t, m: masked_cross_entropy(
            x, t, m, reduction=r, normalizer=None if r == "none" else m.detach().sum() + 1
        )
    ),
    "probabilities": lambda r: (
        lambda x, t, m: torch.ops.masked_loss.cross_entropy(
            x, (x * 0.5).softmax(-1), m, reduction=r, z_loss=0.1
        )
    ),
    "divergence": lambda r: (
        lambda x, t, m: masked_divergence(x, x.flip(-1).detach(), m, reduction=r, kind="jsd")
    ),
    "reduce": lambda r: lambda x, t, m: masked_reduce(x[..., 0] ** 2, m, reduction=r),
    "each sequence": lambda r: (
        lambda x, t, m: masked_reduce(
            x[..., 0] ** 2, m, reduction="sum" if r == "sum" else "mean", dim=-1
        )
    ),
    "log-probabilities": lambda r: (
        lambda x, t, m: [m * y for y in flat(token_log_probs(x, t, m, return_entropy=r != "none"))]
    ),
    "statistics": lambda r: (
        lambda x, t, m: masked_cross_entropy(x, t, m, reduction=r, return_stats=True, z_loss=0.1)
    ),
    "linear": lambda r: lambda x, t, m: linear_cross_entropy(x, WEIGHT.diag(), t, m, reduction=r),
}


def flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [x for part in result for x in flat(part)]


def stacked(function: Loss, arguments: list[Tensor], batched: tuple[bool, ...]) -> list[Tensor]:
    """Element by element."""
    results = []
    for i in range(ELEMENTS):
        row = (x[i] if b else x[0] for x, b in zip(arguments, batched, strict=True))
        results.append(flat(function(*row)))
    return [torch.stack(parts) for parts in zip(*results, strict=True)]


COMBINATIONS = [
    (True, True, True),
    (True, False, False),
    (False, True, False),
    (False, False, True),
]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_values_and_gradients(loss: str, reduction: str) -> None:
    """Whatever is batched; and the gradients of each element, vmap outside and inside."""
    function = LOSSES[loss](reduction)

    def scalar(*args: Tensor) -> Tensor:
        first, *more = flat(function(*args))
        return (first.sin() + (0 if loss == "statistics" or not more else more[0])).sum()

    for shape in ((4,), (2, 3)) if loss != "shift" else ((4,),):
        arguments = problem(*shape)
        for batched in COMBINATIONS:
            given = [x if b else x[0] for x, b in zip(arguments, batched, strict=True)]
            in_dims = tuple(0 if b else None for b in batched)
            ours = flat(torch.func.vmap(function, in_dims)(*given))
            torch.testing.assert_close(ours, stacked(function, arguments, batched))
            gradient = torch.func.grad(scalar, (0, 2))
            ours = flat(torch.func.vmap(gradient, in_dims)(*given))
            torch.testing.assert_close(ours, stacked(gradient, arguments, batched))
        leaves = [x.clone().requires_grad_() for x in (arguments[0], arguments[2])]

        def all_elements(x: Tensor, m: Tensor, target: Tensor = arguments[1]) -> Tensor:
            return (torch.func.vmap(scalar)(x, target, m) ** 2).sum()

        expected = sum(
            scalar(*row) ** 2 for row in zip(leaves[0], arguments[1], leaves[1], strict=True)
        )
        expected = torch.autograd.grad(expected, leaves)
        torch.testing.assert_close(torch.autograd.grad(all_elements(*leaves), leaves), expected)
        plain = tuple(x.detach() for x in leaves)
        torch.testing.assert_close(torch.func.grad(all_elements, (0, 1))(*plain), expected)


@pytest.mark.parametrize("loss", sorted(LOSSES.keys() - {"linear", "each sequence"}))
def test_one_call(loss: str) -> None:
    class Calls(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            if func.namespace == "masked_loss":
                self.names.append(func._opname)
            return func(*args, **(kwargs or {}))

    function = LOSSES[loss]("mean")
    arguments = problem(4)

    def scalar(*args: Tensor) -> Tensor:
        return flat(function(*args))[0].sum()

    with Calls() as calls:
        torch.func.vmap(torch.func.grad(scalar, (0, 2)))(*arguments)
    assert calls.names
    assert len(calls.names) == len(set(calls.names)), calls.names


def test_dimensions_nesting_and_chunks() -> None:
    logits, target, mask = problem(2, 4)

    def loss(x: Tensor, t: Tensor, m: Tensor) -> Tensor:
        return masked_cross_entropy(x, t, m, z_loss=0.1)

    vmap, expected = torch.func.vmap, stacked(loss, [logits, target, mask], (True,) * 3)[0]
    moved = logits.movedim(0, -1), target.movedim(0, 1), mask.movedim(0, 2)
    torch.testing.assert_close(vmap(loss, in_dims=(-1, 1, 2))(*moved), expected)
    torch.testing.assert_close(
        vmap(loss, out_dims=-1, chunk_size=2)(logits, target, mask), expected
    )
    elements = list(zip(logits, target, mask, strict=True))
    nested = vmap(vmap(loss))(logits, target, mask)
    rows = [[loss(*row) for row in zip(*element, strict=True)] for element in elements]
    torch.testing.assert_close(nested, torch.tensor(rows, dtype=torch.float64))
    for transform in (torch.func.grad, torch.func.hessian):
        inside = vmap(vmap(transform(loss)))(logits, target, mask)
        rows = [
            torch.stack([transform(loss)(*row) for row in zip(*element, strict=True)])
            for element in elements
        ]
        torch.testing.assert_close(inside, torch.stack(rows))


def test_batched_upstream_gradients_of_each_sequence() -> None:
    values, mask = torch.randn(2, 3, dtype=torch.float64), torch.rand(2, 3, dtype=torch.float64)
    values.requires_grad_()
    mask.requires_grad_()
    upstream = torch.randn(5, 2, dtype=torch.float64)
    losses = masked_reduce(values, mask, dim=-1)
    ours = torch.autograd.grad(
        losses, (values, mask), upstream, is_grads_batched=True, retain_graph=True
    )
    rows = [torch.autograd.grad(losses, (values, mask), g, retain_graph=True) for g in upstream]
    torch.testing.assert_close(ours, tuple(map(torch.stack, zip(*rows, strict=True))))


def test_what_has_no_rows_of_its_own() -> None:
    """A batched class weight, and bounds of packed sequences: a call for each element."""
    logits, target, mask = problem(4)
    weight = torch.rand(ELEMENTS, CLASSES, dtype=torch.float64)

    def weighted(x: Tensor, t: Tensor, w: Tensor) -> Tensor:
        return masked_cross_entropy(x, t, class_weight=w)

    def packed(x: Tensor, t: Tensor, m: Tensor) -> Tensor:
        bounds = torch.tensor([0, 1, 3])
        return masked_cross_entropy(x, t, m, reduction="sequence_mean", cu_seqlens=bounds)

    for function, arguments in (
        (weighted, [logits, target, weight]),
        (packed, [logits, target, mask]),
    ):
        for f in (function, torch.func.grad(function)):
            (expected,) = stacked(f, arguments, (True,) * 3)
            torch.testing.assert_close(torch.func.vmap(f)(*arguments), expected)


def test_elements_without_tokens() -> None:
    logits, target, mask = (x[:, :0] for x in problem(4))
    for loss in ("cross entropy", "divergence", "reduce", "log-probabilities", "statistics"):
        for reduction in ("none", "mean"):
            f = LOSSES[loss](reduction)
            ours = flat(torch.func.vmap(f)(logits, target, mask))
            torch.testing.assert_close(ours, stacked(f, [logits, target, mask], (True,) * 3))


@pytest.mark.parametrize(
    "options",
    [{}, {"label_smoothing": 0.1}, {"class_weight": WEIGHT}],
    ids=lambda options: ", ".join(options) or "plain",
)
def test_second_derivatives_of_elements_of_one_token(options: dict[str, Any]) -> None:
    """Their targets have no dimensions, and are nevertheless different."""
    logits, target, directions = torch.randn(4, CLASSES).double(), [1, 2, -100, 0], torch.eye(4, 6)
    stock = {("weight" if k == "class_weight" else k): v for k, v in options.items()}

    def ours(x: Tensor, t: Tensor) -> Any:
        return masked_cross_entropy(x, t, reduction="sum", **options)

    def theirs(x: Tensor, t: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(x, t, reduction="sum", **stock)

    def penalty(loss: Loss) -> Loss:
        return torch.func.grad(lambda x, t, v: torch.func.grad(loss)(x, t).pow(2).sum())

    def tangent(loss: Loss) -> Loss:
        return lambda x, t, v: torch.func.jvp(lambda x: loss(x, t), (x,), (v,))

    def second(loss: Loss) -> Loss:
        return lambda x, t, v: torch.func.hessian(loss)(x, t)

    given = (logits, torch.tensor(target), directions.double())
    for derivative in (second, tangent, penalty):
        results = [torch.func.vmap(derivative(loss))(*given) for loss in (ours, theirs)]
        torch.testing.assert_close(*results)
