# SPDX-License-Identifier: BSD-3-Clause
"""linear_cross_entropy under autograd, torch.func, autocast and torch.compile; its operators."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from linear_samples import (
    CLASSES,
    LEAVES,
    SHAPE,
    WIDTH,
    assert_close,
    concrete,
    double,
    evaluate,
    problem,
    specification,
)
from opchecks import opchecks
from samples import REDUCTIONS
from torch import Tensor

import masked_loss
from masked_loss import linear_cross_entropy


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(reduction: str) -> None:
    tensors = problem(*SHAPE, dtype=torch.float64)
    mask = tensors["mask"].detach()
    mask = mask.where(mask != 0, 0.5).requires_grad_()
    options = concrete("everything", reduction, torch.float64)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
        return linear_cross_entropy(
            hidden, weight, tensors["target"], mask, bias=bias, chunk_tokens=4, **options
        )

    inputs = tensors["hidden"], tensors["weight"], tensors["bias"], mask
    torch.autograd.gradcheck(loss, inputs, check_batched_grad=False)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("frozen", range(15))
def test_frozen_and_trainable(frozen: int, reduction: str, dtype: torch.dtype) -> None:
    requires = tuple(name for i, name in enumerate(LEAVES) if not frozen >> i & 1)
    torch.manual_seed(7)
    everything = problem(*SHAPE, dtype=dtype)
    expected = evaluate(linear_cross_entropy, everything, reduction=reduction, chunk_tokens=4)
    torch.manual_seed(7)
    tensors = problem(*SHAPE, dtype=dtype, requires=requires)
    result = evaluate(linear_cross_entropy, tensors, reduction=reduction, chunk_tokens=4)
    assert set(result) == {"loss", *requires}
    for name in result:
        assert torch.equal(result[name], expected[name]), name


def test_no_grad() -> None:
    tensors = problem(*SHAPE)
    args = tensors["hidden"], tensors["weight"], tensors["target"], tensors["mask"]
    expected = linear_cross_entropy(*args)
    assert expected.requires_grad
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            loss = linear_cross_entropy(*args)
        assert not loss.requires_grad
        assert torch.equal(loss, expected.detach())


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_retain_graph(reduction: str, dtype: torch.dtype, device: str) -> None:
    """A second backward gives the same gradient, whatever the first one's upstream was."""
    tensors = problem(*SHAPE, dtype=dtype, device=device)
    leaves = [tensors[name] for name in LEAVES]
    loss = linear_cross_entropy(
        tensors["hidden"], tensors["weight"], tensors["target"], tensors["mask"],
        bias=tensors["bias"], reduction=reduction, chunk_tokens=4,
    ).sum()  # fmt: skip
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    torch.autograd.grad(3 * loss, leaves, retain_graph=True)
    first[0].zero_()
    second = torch.autograd.grad(loss, leaves)
    for a, b, c in zip(first[1:], second[1:], kept[1:], strict=True):
        assert torch.equal(a, c), "a later backward changed a gradient that was given out"
        assert torch.equal(b, c)
    assert torch.equal(second[0], kept[0])
    with pytest.raises(RuntimeError, match=r"second time|retain_graph"):
        torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("factor", [1.0, 2.0, 0.3])
def test_upstream_gradient(factor: float, dtype: torch.dtype) -> None:
    """Backward scales what forward computed; 2 is no 1."""
    tensors = problem(*SHAPE, dtype=dtype)
    leaves = [tensors[name] for name in LEAVES]
    args = tensors["hidden"], tensors["weight"], tensors["target"], tensors["mask"]
    loss, scaled = (linear_cross_entropy(*args, bias=tensors["bias"]) for _ in range(2))
    expected = torch.autograd.grad(loss, leaves, torch.tensor(factor).to(loss))
    gradients = torch.autograd.grad(scaled, leaves)
    eps = torch.finfo(dtype).eps
    for ours, one in zip(expected, gradients, strict=True):
        torch.testing.assert_close(ours, factor * one, rtol=2 * eps, atol=1e-7)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_func_grad_and_vmap(reduction: str) -> None:
    tensors = problem(4, *SHAPE)
    options = {"reduction": reduction, "chunk_tokens": 4, "z_loss": 0.1}

    def loss(hidden: Tensor, weight: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, target, mask, **options).sum()

    args = [tensors[name].detach() for name in ("hidden", "weight", "target", "mask")]
    per_sample = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, None, 0, 0))
    hidden, weight = per_sample(*args)
    losses = torch.func.vmap(loss, in_dims=(0, None, 0, 0))(*args)
    for i in range(4):
        one = {
            "hidden": args[0][i].clone().requires_grad_(),
            "weight": args[1].clone().requires_grad_(),
            "target": args[2][i],
            "mask": args[3][i],
        }
        value = loss(*one.values())
        gradients = torch.autograd.grad(value, (one["hidden"], one["weight"]))
        torch.testing.assert_close(losses[i], value.detach())
        torch.testing.assert_close((hidden[i], weight[i]), gradients)


def test_weight_shared_with_the_embedding() -> None:
    """One parameter, two uses: its gradient is the sum of both."""
    ids = torch.randint(CLASSES, (4, 7))
    table = torch.randn(CLASSES, WIDTH, requires_grad=True)
    mix = torch.randn(WIDTH, WIDTH)

    def step(function: Callable[..., Tensor]) -> Tensor:
        table.grad = None
        hidden = torch.tanh(F.embedding(ids, table) @ mix)
        function(hidden, table, ids, ids > 2, shift=True).backward()
        assert table.grad is not None
        return table.grad

    torch.testing.assert_close(step(linear_cross_entropy), step(specification))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_hidden_is_not_kept(reduction: str) -> None:
    """By a loss whose gradients are there, not at all; by "none", until backward."""
    tensors = problem(*SHAPE)
    hidden = 2 * tensors["hidden"]  # keeps nothing of its result
    loss = linear_cross_entropy(hidden, tensors["weight"], tensors["target"], reduction=reduction)
    kept = weakref.ref(hidden)
    del hidden
    assert (kept() is not None) == (reduction == "none")
    loss.sum().backward()
    assert kept() is None


def test_weight_may_change_before_backward() -> None:
    """The gradient of a scalar loss exists already. "none" needs the weight again, and says so."""
    tensors = problem(*SHAPE)
    args = tensors["hidden"], tensors["weight"], tensors["target"]
    (expected,) = torch.autograd.grad(linear_cross_entropy(*args), tensors["hidden"])
    loss, losses = linear_cross_entropy(*args), linear_cross_entropy(*args, reduction="none")
    with torch.no_grad():
        tensors["weight"].mul_(2)
    assert torch.equal(torch.autograd.grad(loss, tensors["hidden"])[0], expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("through", ["function", "operator"])
def test_autocast(dtype: torch.dtype, reduction: str, through: str) -> None:
    """hidden, weight and bias as F.linear casts them; nothing else is cast."""
    tensors = problem(*SHAPE)
    low = {
        name: x.detach().to(dtype).requires_grad_() if name in LEAVES[:3] else x
        for name, x in tensors.items()
    }
    expected = evaluate(linear_cross_entropy, low, reduction=reduction, chunk_tokens=4)
    operator = torch.ops.masked_loss.linear_cross_entropy
    function = linear_cross_entropy if through == "function" else operator

    def under_autocast(*args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return function(*args, **kwargs)

    result = evaluate(under_autocast, tensors, reduction=reduction, chunk_tokens=4)
    for name in LEAVES[:3]:
        assert result[name].dtype == torch.float32
        expected[name] = expected[name].float()
    assert_close(result, expected, rtol=0, atol=0)
    double_tensors = double(tensors)
    with torch.autocast("cpu", dtype=dtype):
        assert evaluate(linear_cross_entropy, double_tensors)["loss"].dtype == torch.float64


@pytest.mark.parametrize("name", ["cross_entropy", "token_log_probs", "divergence"])
def test_autocast_without_gradients(name: str) -> None:
    """Whatever calls: the function, its operator, and a compiled graph, which has this operator."""
    name = f"linear_{name}"
    hidden, weight, bias = torch.randn(9, 4), torch.randn(7, 4), torch.randn(7)
    teacher = name == "linear_divergence"
    target = torch.randint(7, (9,))
    function, operator = getattr(masked_loss, name), getattr(torch.ops.masked_loss, name)

    def call(f: Callable[..., Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        h, w, b = (x.to(dtype) for x in (hidden, weight, bias))
        more = {"teacher_hidden": h.flip(0), "teacher_weight": w} if teacher else {"target": target}
        return f(hidden=h, weight=w, bias=b, **more)

    torch._dynamo.reset()
    with torch.no_grad():
        expected = call(function, torch.bfloat16)
        assert not torch.equal(call(function), expected)
        with torch.autocast("cpu", torch.bfloat16):
            for f in (function, operator, torch.compile(function, backend="aot_eager")):
                assert torch.equal(call(f), expected)
            wide = call(operator, torch.float64)
    assert torch.equal(wide, call(function, torch.float64))


def assert_compiles(
    function: Callable[..., Any], samples: list[dict[str, Tensor]], backend: str, **options: Any
) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    torch._dynamo.utils.counters.clear()
    for tensors in samples:
        ours = evaluate(compiled, tensors, **options)
        assert_close(ours, evaluate(function, tensors, **options))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    ("name", "reduction", "dtype"),
    [
        *(("everything", reduction, torch.float32) for reduction in REDUCTIONS),
        ("normalizer_tensor", "mean", torch.float64),
        ("everything", "mean", torch.bfloat16),
        ("everything", "none", torch.float16),
    ],
    ids=str,
)
def test_compile(name: str, reduction: str, dtype: torch.dtype) -> None:
    options = concrete(name, reduction, dtype)
    samples = [problem(3, 5, dtype=dtype), problem(4, 6, dtype=dtype)]
    assert_compiles(linear_cross_entropy, samples, "aot_eager", **options)


def test_compile_with_statistics_and_frozen_weight() -> None:
    def both(*args: Any, **kwargs: Any) -> Tensor:
        loss, stats = linear_cross_entropy(*args, return_stats=True, **kwargs)
        return loss + 0 * stats.entropy

    samples = [
        problem(3, 5, requires=("hidden", "mask")),
        problem(4, 6, requires=("hidden", "mask")),
    ]
    assert_compiles(both, samples, "aot_eager", chunk_tokens=4)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_inductor(reduction: str) -> None:
    """In the middle of a model, under autocast inside the graph."""

    def model(hidden: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = torch.tanh(F.linear(hidden, torch.eye(WIDTH)))
            return 2 * linear_cross_entropy(x, weight, *args, **kwargs)

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="inductor")
    tensors = problem(*SHAPE)
    ours = evaluate(compiled, tensors, reduction=reduction)
    assert_close(ours, evaluate(model, tensors, reduction=reduction), rtol=2e-2, atol=2e-2)


def test_one_node_in_the_graph() -> None:
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Any]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    tensors = problem(*SHAPE)
    args = tensors["hidden"], tensors["weight"], tensors["target"]
    torch.compile(linear_cross_entropy, fullgraph=True, backend=keep)(*args)
    called = [n for n in graphs[0].graph.nodes if n.op == "call_function"]
    assert [str(node.target) for node in called] == ["masked_loss.linear_cross_entropy.default"]


@opchecks("linear_cross_entropy", "linear_cross_entropy_stats")
@pytest.mark.parametrize(
    ("name", "reduction"),
    [("plain", "mean"), *(("everything", reduction) for reduction in REDUCTIONS)],
)
def test_opcheck(name: str, reduction: str) -> None:
    tensors = problem(*SHAPE)
    args = tensors["hidden"], tensors["weight"], tensors["target"], tensors["mask"]
    options = {**concrete(name, reduction, torch.float32), "bias": tensors["bias"]}
    ops = torch.ops.masked_loss
    for operator in (ops.linear_cross_entropy, ops.linear_cross_entropy_stats):
        torch.library.opcheck(operator.default, args, options)


@opchecks("linear_cross_entropy_forward", "linear_cross_entropy_backward")
@pytest.mark.parametrize("chunk_tokens", [None, 4])
@pytest.mark.parametrize("needs", [[True] * 3, [False, True, False], [True, False, True]])
def test_opcheck_of_the_halves(
    needs: list[bool], chunk_tokens: int | None, dtype: torch.dtype
) -> None:
    """Their fakes know every type and stride: that of a weight gradient depends on the chunks."""
    tensors = problem(*SHAPE, dtype=dtype, requires=())
    hidden, weight, bias, mask = (tensors[name] for name in LEAVES)
    target = tensors["target"]
    each = 0.5 + torch.rand(SHAPE)
    inputs = (hidden, weight, bias, target, mask, None, None, torch.tensor([0, 4, 9]), each)
    how = {"chunk_tokens": chunk_tokens, "accumulation_dtype": None, "pack": True}
    how |= {"label_smoothing": 0.1, "z_loss": 0.1, "shift": True}
    forward = torch.ops.masked_loss.linear_cross_entropy_forward.default
    backward = torch.ops.masked_loss.linear_cross_entropy_backward.default
    tests = ("test_schema", "test_faketensor")
    values = how | {"stats": True, "needs": [False] * 3, "reduction": "none"}
    _, _, tokens, groups, *_ = forward(*inputs, **values)
    scalar = how | {"stats": True, "needs": needs, "reduction": "mean"}
    torch.library.opcheck(forward, inputs, scalar, test_utils=tests)
    dloss = torch.rand(SHAPE, dtype=tokens.dtype)
    saved = (dloss, hidden, weight, bias, target, tokens, groups, None, each)
    upstream = how | {"needs": needs, "reduction": "none"}
    torch.library.opcheck(backward, saved, upstream, test_utils=tests)


@opchecks("weigh", "rows", "reduce")
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_opcheck_of_the_kernels(reduction: str) -> None:
    tensors = problem(*SHAPE, requires=())
    target, mask = tensors["target"], tensors["mask"]
    ops, tests = torch.ops.masked_loss, ("test_schema", "test_faketensor")
    classes = tensors["weight"].shape[0]
    options = {"reduction": reduction, "label_smoothing": 0.1, "z_loss": 0.1}
    weigh = (target, mask, None, None, None, classes, False, True)
    torch.library.opcheck(ops.weigh.default, weigh, options, test_utils=tests)
    tokens, groups = ops.weigh(*weigh, **options)
    tokens[1:].zero_()
    logits, index = torch.randn(target.numel(), classes), target.reshape(-1)
    chunk = (logits, index, tokens, groups, None, 0.5 + torch.rand(index.shape))
    how = {"dloss": None, "first": 0, "classes": classes, "forward": True, "gradient": True}
    torch.library.opcheck(ops.rows.default, chunk, how | options, test_utils=tests)
    torch.library.opcheck(ops.reduce.default, (tokens, groups, target, True), options)
