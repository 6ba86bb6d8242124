# SPDX-License-Identifier: BSD-3-Clause
"""Derivatives beyond a first gradient, of every loss: second ones, forward mode, torch.func."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from samples import OPTIONS, REDUCTIONS
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
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

Loss = Callable[..., Tensor]
ops = torch.ops.masked_loss
CLASSES = 5


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def problem(*shape: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """logits, target, mask; one token is ignored."""
    target = torch.randint(CLASSES, shape)
    target.view(-1)[0] = -100
    return [torch.randn(*shape, CLASSES, dtype=dtype), target, torch.rand(shape, dtype=dtype) + 0.1]


def check(function: Loss, *leaves: Tensor) -> None:
    """First and second derivatives, forwards and backwards, against differences."""
    leaves = tuple(x.detach().clone().requires_grad_() for x in leaves)
    torch.autograd.gradcheck(function, leaves, check_forward_ad=True, fast_mode=True)
    torch.autograd.gradgradcheck(function, leaves, check_fwd_over_rev=True, fast_mode=True)


# Every option, against differences


# Every option with the mean, and the largest ones with every reduction.
CASES = [(name, "mean") for name in OPTIONS if name != "inplace"]
CASES += [(name, r) for name in ("plain", "everything") for r in REDUCTIONS if r != "mean"]


@pytest.mark.parametrize(("name", "reduction"), CASES)
def test_masked_cross_entropy(name: str, reduction: str) -> None:
    options = {"reduction": reduction, **OPTIONS[name]}
    if "normalizer" in options:
        options["normalizer"] = 7 if reduction != "none" else None
    if "class_weight" in options:
        options["class_weight"] = torch.rand(CLASSES, dtype=torch.float64) + 0.5
    if options.get("temperature") == "each":
        options["temperature"] = torch.rand(2, 3) + 0.5
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
    "smoothing": {"label_smoothing": 0.1, "class_weight": torch.rand(CLASSES).double()},
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
    {"reduction": "sum", "temperature": torch.rand(2, 3) + 0.5, "normalizer": 5},
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
    assert first.requires_grad
    _, pushed = torch.func.jvp(lambda x: masked_whiten(x, mask), (values,), (values,))
    _, var, _ = masked_moments(values, mask)
    torch.testing.assert_close(pushed, values / (var + 1e-8).sqrt())


# Every transform, against the specification

HEAD = torch.eye(CLASSES, dtype=torch.float64) + 0.1
TEACHER = torch.linspace(-1, 1, CLASSES, dtype=torch.float64)


def of_logits(x: Tensor, mask: Tensor) -> Tensor:
    return reference.linear_logits(x, HEAD, None, mask)


def likelihood(f: Loss) -> Loss:
    """Of a function that gives log-probabilities and entropies."""

    def loss(x: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        log_probs, entropy = f(x, target, mask)
        return (mask * (log_probs.exp() + 0.1 * entropy)).sum()

    return loss


LOSSES: dict[str, tuple[Loss, Loss]] = {
    "mean": (masked_cross_entropy, reference.masked_cross_entropy),
    "none": (
        lambda *a: masked_cross_entropy(*a, reduction="none", z_loss=0.1, shift=True).sum(),
        lambda *a: reference.masked_cross_entropy(
            *a, reduction="none", z_loss=0.1, shift=True
        ).sum(),
    ),
    "statistics": (
        lambda *a: masked_cross_entropy(*a, return_stats=True)[0],
        reference.masked_cross_entropy,
    ),
    "drop-in": (
        lambda x, t, m: cross_entropy(x.movedim(-1, 1), t, mask=m),
        lambda x, t, m: reference.cross_entropy(x.movedim(-1, 1), t, mask=m),
    ),
    "probabilities": (
        lambda x, t, m: cross_entropy(x.movedim(-1, 1), x.movedim(-1, 1).softmax(1), mask=m),
        lambda x, t, m: reference.cross_entropy(
            x.movedim(-1, 1), x.movedim(-1, 1).softmax(1), mask=m
        ),
    ),
    "masked_reduce": (
        lambda x, t, m: masked_reduce(x[..., 0] ** 2, m, reduction="sequence_mean"),
        lambda x, t, m: reference.masked_reduce(x[..., 0] ** 2, m, reduction="sequence_mean"),
    ),
    "linear": (
        lambda x, t, m: linear_cross_entropy(x, HEAD, t, m),
        lambda x, t, m: reference.masked_cross_entropy(of_logits(x, m), t, m),
    ),
    "log-probabilities": (
        likelihood(lambda *a: token_log_probs(*a, return_entropy=True)),
        likelihood(lambda *a: reference.token_log_probs(*a, return_entropy=True)),
    ),
    "linear log-probabilities": (
        likelihood(lambda x, t, m: linear_token_log_probs(x, HEAD, t, m, return_entropy=True)),
        likelihood(
            lambda x, t, m: reference.token_log_probs(of_logits(x, m), t, m, return_entropy=True)
        ),
    ),
    "divergence": (
        lambda x, t, m: masked_divergence(x, TEACHER.expand_as(x), m, kind="jsd"),
        lambda x, t, m: reference.masked_divergence(x, TEACHER.expand_as(x), m, kind="jsd"),
    ),
    "linear divergence": (
        lambda x, t, m: linear_divergence(x, HEAD, x.new_ones(*m.shape, 1), TEACHER[:, None], m),
        lambda x, t, m: reference.masked_divergence(of_logits(x, m), TEACHER.expand_as(x), m),
    ),
}
# The same through the operators, and nothing that is not one.
OPERATORS: dict[str, tuple[Loss, Loss]] = {
    "cross_entropy": (lambda *a: ops.cross_entropy(*a), reference.masked_cross_entropy),
    "cross_entropy_stats": (
        lambda *a: ops.cross_entropy_stats(*a)[0],
        reference.masked_cross_entropy,
    ),
    "masked_reduce": (
        lambda x, t, m: ops.masked_reduce(x[..., 0] ** 2, m, reduction="sequence_mean"),
        LOSSES["masked_reduce"][1],
    ),
    "linear_cross_entropy": (
        lambda x, t, m: ops.linear_cross_entropy(x, HEAD, t, m),
        LOSSES["linear"][1],
    ),
    "token_log_probs": (
        likelihood(lambda x, t, m: ops.token_log_probs_entropy(x, t, m)),
        LOSSES["log-probabilities"][1],
    ),
    "linear_token_log_probs": (
        likelihood(lambda x, t, m: ops.linear_token_log_probs_entropy(x, HEAD, t, m)),
        LOSSES["linear log-probabilities"][1],
    ),
    "masked_divergence": (
        lambda x, t, m: ops.masked_divergence(x, TEACHER.expand_as(x), m, kind="jsd"),
        LOSSES["divergence"][1],
    ),
    "linear_divergence": (
        lambda x, t, m: ops.linear_divergence(
            x, HEAD, x.new_ones(*m.shape, 1), TEACHER[:, None], m
        ),
        LOSSES["linear divergence"][1],
    ),
}
EVERYTHING = {**LOSSES, **{f"ops.{name}": pair for name, pair in OPERATORS.items()}}
all_losses = pytest.mark.parametrize("loss", LOSSES)
all_operators = pytest.mark.parametrize("loss", EVERYTHING)


def push(f: Loss) -> Loss:
    return lambda x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1]


def penalty(f: Loss) -> Loss:
    """A second derivative through a nonlinear function of the first."""
    return torch.func.grad(lambda x: (torch.func.grad(f)(x) ** 2).sum())


TRANSFORMS: dict[str, Callable[[Loss], Loss]] = {
    "grad": torch.func.grad,
    "vjp": lambda f: lambda x: torch.func.vjp(f, x)[1](torch.ones_like(f(x)))[0],
    "jvp": push,
    "jacrev": torch.func.jacrev,
    "jacfwd": torch.func.jacfwd,
    "hessian": torch.func.hessian,
    "reverse over reverse": lambda f: torch.func.jacrev(torch.func.jacrev(f)),
    "reverse over forward": lambda f: torch.func.jacrev(torch.func.jacfwd(f)),
    "forward over forward": lambda f: torch.func.jacfwd(torch.func.jacfwd(f)),
    "grad of jvp": lambda f: torch.func.grad(push(f)),
    "jvp of vjp": lambda f: lambda x: push(torch.func.vjp(f, x)[1])(torch.ones_like(f(x))),
    "penalty": penalty,
    "linearize": lambda f: lambda x: torch.func.linearize(f, x)[1](x),
    "third": lambda f: torch.func.grad(lambda x: (penalty(f)(x) ** 2).sum()),
    "forward over third": lambda f: push(penalty(f)),
}


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


def total(which: int) -> Loss:
    """The sum of several losses: to compile one graph of them takes less than a graph of each."""
    names = ("mean", "masked_reduce", "linear", "log-probabilities", "divergence")
    return lambda *args: sum(LOSSES[name][which](*args) for name in names)


@pytest.mark.parametrize("transform", ["grad", "jvp", "penalty"])
def test_compiled_transforms(transform: str) -> None:
    torch._dynamo.reset()
    logits, target, mask = problem(2, 3)

    def transformed(x: Tensor, which: int = 0) -> Tensor:
        return TRANSFORMS[transform](lambda x: total(which)(x, target, mask))(x)

    compiled = torch.compile(transformed, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(logits), transformed(logits, 1))


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
    torch.testing.assert_close(pushed.double(), truth, rtol=1e-5, atol=1e-6)


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


# Tracing


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(mode: str) -> None:
    logits, target, mask = problem(2, 3)
    function = total(0)

    def gradient(x: Tensor, t: Tensor, m: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(2 * function(x, t, m), x)[0]

    def transformed(x: Tensor, t: Tensor, m: Tensor) -> Tensor:
        return penalty(lambda x: function(x, t, m))(x)

    for f in (gradient,) if mode == "symbolic" else (gradient, transformed):
        graph = make_fx(f, tracing_mode=mode, _allow_non_fake_inputs=True)(logits, target, mask)
        torch.testing.assert_close(graph(logits, target, mask), f(logits, target, mask))


def test_compiled_autograd() -> None:
    torch._dynamo.reset()
    logits, target, mask = problem(2, 3)
    function = total(0)
    leaves = [logits.requires_grad_(), mask.requires_grad_()]
    expected = torch.autograd.grad(2 * function(logits, target, mask), leaves)
    loss = 2 * function(logits, target, mask)

    def compiler(graph: torch.fx.GraphModule) -> Any:
        return torch.compile(graph, backend="aot_eager", fullgraph=True)

    with torch._dynamo.compiled_autograd._enable(compiler):
        loss.backward()
    torch.testing.assert_close([leaf.grad for leaf in leaves], list(expected))


@all_losses
def test_saved_tensor_hooks(loss: str) -> None:
    logits, target, mask = problem(2, 3)
    function, truth = LOSSES[loss]
    logits.requires_grad_()

    def second(f: Loss) -> Tensor:
        (g,) = torch.autograd.grad(f(logits, target, mask), logits, create_graph=True)
        return torch.autograd.grad((g**2).sum(), logits)[0]

    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
        ours = second(function)  # also what the second derivative saves itself
    torch.testing.assert_close(ours, second(truth))


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
