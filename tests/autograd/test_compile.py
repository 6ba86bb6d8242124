# SPDX-License-Identifier: BSD-3-Clause
"""torch.compile, torch.export, opcheck and AOTInductor: one node in a whole graph, of any size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from opchecks import checked_operators, opchecks
from samples import FEW_CASES, OPTIONS, REDUCE_CASES, REDUCTIONS, Case, concrete
from torch import Tensor

import masked_loss
from masked_loss import cross_entropy, masked_cross_entropy, masked_mean, masked_reduce

ops = torch.ops.masked_loss
EVERYTHING = OPTIONS["everything"]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def problem(*shape: int, classes: int = 7, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    logits = torch.randn(*shape, classes, dtype=dtype, requires_grad=True)
    mask = (torch.rand(shape) * (torch.rand(shape) < 0.7)).requires_grad_()
    return [logits, torch.randint(classes, shape), mask]


def assert_compiles(
    function: Callable[..., Any], samples: list[list[Tensor]], backend: str = "aot_eager"
) -> None:
    """Without a graph break and without a second compilation, the same results as in eager."""
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    torch._dynamo.utils.counters.clear()
    for tensors in samples:
        results = []
        for call in (compiled, function):
            loss = call(*tensors)
            leaves = [t for t in tensors if t.requires_grad]
            results.append([loss, *torch.autograd.grad(loss.sum(), leaves)])
        for ours, expected in zip(*results, strict=True):
            assert ours.dtype == expected.dtype
            torch.testing.assert_close(ours, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_inductor(reduction: str) -> None:
    """In the middle of a model, with every option, forward and backward, for several sizes."""
    class_weight = torch.rand(7)
    options = {**EVERYTHING, "class_weight": class_weight, "reduction": reduction}

    def model(logits: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        return masked_cross_entropy(logits * 2, target, mask + 0.5, **options) * 3

    samples = [problem(3, 5), problem(4, 6), problem(2, 9)]
    assert_compiles(model, samples, backend="inductor")


# Every option with the mean, and none and all of them with every reduction.
CASES = [(name, "mean") for name in OPTIONS if name != "inplace"]
CASES += [(name, r) for name in ("plain", "everything") for r in REDUCTIONS if r != "mean"]


@pytest.mark.parametrize(("name", "reduction"), CASES)
def test_every_option(name: str, reduction: str) -> None:
    options = {"reduction": reduction, **concrete(OPTIONS[name], (), 7, torch.float32)}

    def loss(logits: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        return masked_cross_entropy(logits, target, mask, **options)

    assert_compiles(loss, [problem(3, 5), problem(4, 6)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype(dtype: torch.dtype) -> None:
    assert_compiles(masked_cross_entropy, [problem(3, 5, dtype=dtype), problem(4, 6, dtype=dtype)])


def test_without_a_mask_and_with_a_bool_mask() -> None:
    logits, target, mask = problem(3, 5)
    assert_compiles(masked_cross_entropy, [[logits, target]])
    torch._dynamo.reset()
    assert_compiles(masked_cross_entropy, [[logits, target, mask != 0]])


def test_a_normalizer_that_is_computed_in_the_graph() -> None:
    def loss(logits: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        count = (mask != 0).sum()
        return masked_cross_entropy(logits, target, mask, reduction="sum", normalizer=count)

    assert_compiles(loss, [problem(3, 5), problem(4, 6)])


def test_masked_reduce_and_masked_mean() -> None:
    def loss(logits: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        values = logits.square().sum(-1)
        parts = [masked_reduce(values, mask, reduction=reduction) for reduction in REDUCTIONS]
        return parts[0].sum() + sum(parts[1:]) + masked_mean(values, mask)

    assert_compiles(loss, [problem(3, 5), problem(4, 6)])


def test_dropin() -> None:
    def loss(logits: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        return cross_entropy(logits.transpose(1, 2), target, label_smoothing=0.1, mask=mask)

    assert_compiles(loss, [problem(3, 5), problem(4, 6)])


def test_dropin_with_probabilities() -> None:
    def loss(logits: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        probabilities = torch.nn.functional.one_hot(target, 7).to(logits.dtype)
        return cross_entropy(logits.transpose(1, 2), probabilities.transpose(1, 2), mask=mask)

    assert_compiles(loss, [problem(3, 5), problem(4, 6)])


def test_module() -> None:
    module = masked_loss.MaskedCrossEntropyLoss(class_weight=torch.rand(7), z_loss=0.1)
    assert_compiles(module, [problem(3, 5), problem(4, 6)])


def test_statistics() -> None:
    def both(logits: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        loss, stats = masked_cross_entropy(logits, target, mask, z_loss=0.1, return_stats=True)
        return torch.stack([loss, *stats])

    def loss_only(logits: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        return both(logits, target, mask)[0]

    samples = [problem(3, 5), problem(4, 6)]
    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend="aot_eager")
    for sample in samples:
        torch.testing.assert_close(compiled(*sample), both(*sample))
    assert_compiles(loss_only, samples)


def test_gradient_in_place_of_the_logits() -> None:
    def loss(weight: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        return masked_cross_entropy(weight * 2, target, mask, inplace_backward=True)

    assert_compiles(loss, [problem(3, 5), problem(4, 6)])
    torch._dynamo.reset()
    assert_compiles(loss, [problem(3, 5)], backend="inductor")


def test_every_token_masked() -> None:
    """Compiled or not, nobody relies on what a buffer happened to hold."""
    compiled = torch.compile(masked_cross_entropy, fullgraph=True, backend="inductor")
    logits, target, _ = problem(3, 5)
    loss = compiled(logits, target, torch.zeros(3, 5))
    assert loss == 0
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_one_node_in_the_graph() -> None:
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Any]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    def both(logits: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        return masked_cross_entropy(logits, target, mask) + masked_mean(mask, mask)

    torch.compile(both, fullgraph=True, backend=keep)(*problem(3, 5))
    called = [
        str(node.target) for node in graphs[0].graph.nodes if "masked_loss" in str(node.target)
    ]
    assert sorted(name.split(".")[1] for name in called) == ["cross_entropy", "masked_reduce"]


def test_errors_of_a_compiled_graph() -> None:
    compiled = torch.compile(masked_cross_entropy, fullgraph=True, backend="aot_eager")
    logits, target, _ = problem(3, 5)
    target[1, 2] = 7
    with pytest.raises(
        (IndexError, RuntimeError), match=r"target\[1, 2\] is 7, expected 0 <= target < 7"
    ):
        compiled(logits, target)
    with pytest.raises(Exception, match=r"target must have shape \[3, 5\], got \[3, 4\]"):
        compiled(logits, target[:, :4])


OPCHECK_CASES = [case for case in FEW_CASES if not case.options.get("inplace_backward")]


@opchecks("cross_entropy", "cross_entropy_stats")
@pytest.mark.parametrize("case", OPCHECK_CASES, ids=str)
def test_opcheck(case: Case) -> None:
    """The schema tells the truth, and the fake and the autograd formula fit the kernel."""
    sample = case.sample(torch.float32)
    if isinstance(sample.options.get("normalizer"), int):
        sample.options["normalizer"] = torch.tensor(float(sample.options["normalizer"]))
    for operator in (ops.cross_entropy, ops.cross_entropy_stats):
        torch.library.opcheck(operator.default, sample.args, sample.options)


class Given(NamedTuple):
    """Arguments of the operators that the public ones are made of."""

    inputs: tuple[Any, ...]
    options: dict[str, Any]


def given(case: Case) -> Given:
    sample = case.sample(torch.float32)
    logits, target = sample.values.detach(), sample.target
    mask = torch.rand(target.shape)
    weight = torch.rand(logits.shape[-1])
    reduction = sample.options["reduction"]
    bounds = torch.tensor([0, 1, target.numel()])
    options = {"reduction": reduction, "label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0}
    options |= {"shift": True}
    each = 0.5 + torch.rand(target.shape)
    return Given((logits, target, mask, None, weight, bounds, each), options)


@opchecks(
    "cross_entropy_forward", "cross_entropy_backward", "cross_entropy_backward_out", "mask_grad"
)
@pytest.mark.parametrize("case", OPCHECK_CASES, ids=str)
def test_opcheck_of_the_halves(case: Case) -> None:
    inputs, options = given(case)
    logits, target, mask, _, weight, _, each = inputs
    forward = {"stats": True, **options}
    torch.library.opcheck(ops.cross_entropy_forward.default, inputs, forward)
    loss, _, tokens, groups = ops.cross_entropy_forward(*inputs, **forward)
    dloss, out = torch.ones_like(loss), torch.empty(logits.shape)
    backward = (dloss, logits, target, tokens, groups, weight, each)
    into = {"recompute_unless_one": False, **options}
    of_mask = (dloss, mask, tokens, groups, target, weight, 0.1, False)
    torch.library.opcheck(ops.cross_entropy_backward.default, backward, options)
    torch.library.opcheck(ops.cross_entropy_backward_out.default, (out, *backward), into)
    torch.library.opcheck(ops.mask_grad.default, of_mask)


REDUCED_CASES = [case for case in OPCHECK_CASES if case.options["reduction"] != "none"]


@opchecks("cross_entropy_fused")
@pytest.mark.parametrize("case", REDUCED_CASES, ids=str)
def test_opcheck_of_forward_and_gradient_in_one(case: Case) -> None:
    inputs, options = given(case)
    out = torch.empty(inputs[0].shape)
    torch.library.opcheck(
        ops.cross_entropy_fused.default, (out, *inputs), {"stats": True, **options}
    )


@opchecks("masked_reduce_forward", "masked_reduce_backward")
@pytest.mark.parametrize(
    ("reduction", "split"), [*((r, False) for r in REDUCTIONS), ("sum", True), ("mean", True)]
)
def test_opcheck_of_the_halves_of_masked_reduce(reduction: str, split: bool) -> None:
    values, mask = torch.rand(3, 5), torch.rand(3, 5)
    for bounds in (torch.tensor([0, 1, 15]), None):
        inputs = (values, mask, None, bounds, split, reduction)
        torch.library.opcheck(ops.masked_reduce_forward.default, inputs)
        loss, tokens, groups = ops.masked_reduce_forward(*inputs)
        backward = (torch.ones_like(loss), values, tokens, groups, split)
        torch.library.opcheck(ops.masked_reduce_backward.default, backward)


def test_opcheck_is_of_every_operator() -> None:
    """Here or beside the tests of what it computes, but those that take no tensor."""
    defined = {
        name.removeprefix("masked_loss::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("masked_loss::")
    }
    no_tensors = {"check_formula", "cpu_capability", "cuda_architectures", "table_sizes"}
    assert defined - no_tensors == checked_operators()


FEW_REDUCE_CASES = [
    case for case in REDUCE_CASES if case.name.endswith(("mask_none", "tensor", "padded"))
]


@opchecks("masked_reduce")
@pytest.mark.parametrize("case", FEW_REDUCE_CASES, ids=str)
def test_opcheck_of_masked_reduce(case: Case) -> None:
    sample = case.sample(torch.float32)
    torch.library.opcheck(ops.masked_reduce.default, sample.args, sample.options)


class Model(torch.nn.Module):
    """What an exported training objective looks like."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(8, 11)

    def forward(self, hidden: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        loss, stats = masked_cross_entropy(
            self.head(hidden), target, mask, label_smoothing=0.1, shift=True, return_stats=True
        )
        return loss, stats.tokens


def exported(model: torch.nn.Module) -> torch.export.ExportedProgram:
    batch, time = torch.export.Dim("batch", min=2), torch.export.Dim("time", min=2)
    arguments = (torch.randn(3, 5, 8), torch.randint(11, (3, 5)), torch.rand(3, 5))
    return torch.export.export(model, arguments, dynamic_shapes=[{0: batch, 1: time}] * 3)


def assert_same_as(model: torch.nn.Module, function: Callable[..., Any]) -> None:
    for shape in [(3, 5), (7, 4)]:
        arguments = torch.randn(*shape, 8), torch.randint(11, shape), torch.rand(shape)
        with torch.no_grad():
            torch.testing.assert_close(tuple(function(*arguments)), model(*arguments))


def test_export(tmp_path: Path) -> None:
    model = Model()
    program = exported(model)
    assert_same_as(model, program.module())
    torch.export.save(program, tmp_path / "loss.pt2")
    assert_same_as(model, torch.export.load(tmp_path / "loss.pt2").module())


class Policy(torch.nn.Module):
    """What a trainer of policies and students computes besides."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.teacher = torch.nn.Linear(8, 11), torch.nn.Linear(8, 11)

    def forward(self, hidden: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        logits, others = self.head(hidden), self.teacher(hidden).detach()
        head = (hidden, self.head.weight)
        teacher = (hidden.detach(), self.teacher.weight.detach())
        log_probs, entropy = masked_loss.token_log_probs(
            logits, target, mask, temperature=0.8, shift=True, return_entropy=True
        )
        return (
            log_probs,
            entropy,
            masked_loss.masked_divergence(logits, others, mask, kind="jsd", shift=True),
            masked_loss.linear_token_log_probs(*head, target, mask, bias=self.head.bias),
            masked_loss.linear_divergence(*head, *teacher, mask, kind="reverse_kl"),
        )


def test_export_of_log_probs_and_divergences() -> None:
    model = Policy()
    assert_same_as(model, exported(model).module())


def test_log_probs_and_divergences() -> None:
    """All in one graph, each with its gradients."""
    model = Policy()

    def loss(hidden: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        return torch.stack([result.mean() for result in model(hidden, target, mask)])

    samples = []
    for shape in ((3, 5), (4, 6)):
        hidden = torch.randn(*shape, 8, requires_grad=True)
        samples.append([hidden, torch.randint(11, shape), torch.rand(shape)])
    assert_compiles(loss, samples)


@pytest.mark.slow
def test_aot_inductor(tmp_path: Path) -> None:
    """Compiled ahead of time, loaded from a file and run, for sizes that were not known then."""
    model = Model()
    path = torch._inductor.aoti_compile_and_package(
        exported(model), package_path=str(tmp_path / "loss.pt2")
    )
    assert_same_as(model, torch._inductor.aoti_load_package(path))
