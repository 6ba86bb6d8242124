# SPDX-License-Identifier: BSD-3-Clause
"""Derivatives of every loss that are traced, compiled, or see what is saved for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from derivative_samples import LOSSES, TRANSFORMS, Loss, all_losses, penalty, problem, total
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx


@pytest.mark.parametrize("transform", ["grad", "jvp", "penalty"])
def test_compiled_transforms(transform: str) -> None:
    torch._dynamo.reset()
    logits, target, mask = problem(2, 3)

    def transformed(x: Tensor, which: int = 0) -> Tensor:
        return TRANSFORMS[transform](lambda x: total(which)(x, target, mask))(x)

    compiled = torch.compile(transformed, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(logits), transformed(logits, 1))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(mode: str) -> None:
    function = total(0)

    def gradient(x: Tensor, t: Tensor, m: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(2 * function(x, t, m), x)[0]

    def transformed(x: Tensor, t: Tensor, m: Tensor) -> Tensor:
        return penalty(lambda x: function(x, t, m))(x)

    for f in (gradient,) if mode == "symbolic" else (gradient, transformed):
        graph = make_fx(f, tracing_mode=mode, _allow_non_fake_inputs=True)(*problem(2, 3))
        others = problem(2, 3)  # the graph holds no number of those that it was traced with
        torch.testing.assert_close(graph(*others), f(*others))


def test_compiled_autograd() -> None:
    torch._dynamo.reset()
    logits, target, mask = problem(2, 3)
    function = total(0)
    leaves = [logits.requires_grad_(), mask.requires_grad_()]
    expected = torch.autograd.grad(2 * function(logits, target, mask), leaves)
    loss = 2 * function(logits, target, mask)

    graphs: list[torch.fx.GraphModule] = []

    def compiler(graph: torch.fx.GraphModule) -> Any:
        graphs.append(graph)
        return torch.compile(graph, backend="aot_eager", fullgraph=True)

    with torch._dynamo.compiled_autograd._enable(compiler):
        loss.backward()
    assert graphs
    torch.testing.assert_close([leaf.grad for leaf in leaves], list(expected))


@all_losses
def test_saved_tensor_hooks(loss: str) -> None:
    logits, target, mask = problem(2, 3)
    function, truth = LOSSES[loss]
    logits.requires_grad_()

    def second(f: Loss) -> Tensor:
        (g,) = torch.autograd.grad(f(logits, target, mask), logits, create_graph=True)
        return torch.autograd.grad((g**2).sum(), logits)[0]

    packed: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        packed.append(x)
        return x.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        ours = second(function)  # also what the second derivative saves itself
    assert packed
    torch.testing.assert_close(ours, second(truth))
