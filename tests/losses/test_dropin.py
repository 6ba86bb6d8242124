# SPDX-License-Identifier: BSD-3-Clause
"""masked_loss.cross_entropy in the place of torch.nn.functional.cross_entropy."""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import accumulation_dtype
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import SampleInput

import masked_loss
from masked_loss import reference

(OPINFO,) = [op for op in op_db if op.name == "nn.functional.cross_entropy"]
NAN = float("nan")


@pytest.fixture(autouse=True)
def on_the_device(device: str) -> Iterator[None]:
    """What a test makes without naming a device lies on this one."""
    with nullcontext() if device == "cpu" else torch.device(device):
        yield


# An input, and the shape of the indices that go with it. Classes are in dimension 1.
SHAPES = [(7,), (4, 7), (4, 7, 3), (2, 7, 3, 5), (2, 7, 1, 2, 3), (1, 1), (5, 1, 2)]


def index_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:1], *shape[2:]) if len(shape) > 1 else ()


def classes(shape: tuple[int, ...]) -> int:
    return shape[1] if len(shape) > 1 else shape[0]


def torch_cross_entropy(input: Tensor, target: Tensor, *args: Any, **options: Any) -> Tensor:
    """PyTorch's, as float32 computes it for half types: its loss is float32 as ours is."""
    wide = accumulation_dtype(input.dtype)
    if target.is_floating_point():
        target = target.to(wide)
    for name, value in options.items():
        if isinstance(value, Tensor):
            options[name] = value.to(wide)
    return F.cross_entropy(input.to(wide), target, *args, **options)


def assert_agrees(input: Tensor, target: Tensor, **options: Any) -> None:
    """The same loss and the same gradients, to the rounding of the types."""
    leaves = [x for x in (input, target) if x.requires_grad]
    loss = masked_loss.cross_entropy(input, target, **options)
    expected = torch_cross_entropy(input, target, **options)
    torch.testing.assert_close(loss, expected)
    if leaves:
        upstream = torch.randn_like(loss)
        gradients = torch.autograd.grad(loss, leaves, upstream)
        truth = torch.autograd.grad(expected, leaves, upstream)
        torch.testing.assert_close(gradients, truth)


def test_signature() -> None:
    """PyTorch's arguments in PyTorch's order; the mask is ours and comes by name only."""
    ours = list(inspect.signature(masked_loss.cross_entropy).parameters.values())
    theirs = list(inspect.signature(F.cross_entropy).parameters.values())
    assert [(p.name, p.default) for p in ours[:-1]] == [(p.name, p.default) for p in theirs]
    assert (ours[-1].name, ours[-1].default) == ("mask", None)
    assert ours[-1].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize("requires_grad", [False, True], ids=["forward", "backward"])
def test_samples_of_pytorch(requires_grad: bool, dtype: torch.dtype, device: str) -> None:
    def check(sample: SampleInput) -> None:
        assert_agrees(sample.input, *sample.args, **sample.kwargs)

    samples = list(OPINFO.sample_inputs(device, dtype, requires_grad=requires_grad))
    assert len(samples) >= 20
    for sample in samples:
        check(sample)
        check(sample.noncontiguous())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_indices(reduction: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    input = torch.randn(shape, dtype=dtype, requires_grad=True)
    target = torch.randint(classes(shape), index_shape(shape))
    if target.numel() > 1:
        target.view(-1)[0] = -100
    weight = torch.rand(classes(shape), dtype=accumulation_dtype(dtype)) + 0.5
    for smoothing, class_weight in itertools.product((0.0, 0.3), (None, weight)):
        options = {"label_smoothing": smoothing, "weight": class_weight, "reduction": reduction}
        assert_agrees(input, target, **options)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_probabilities(reduction: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    input = torch.randn(shape, dtype=dtype, requires_grad=True)
    scores = torch.randn(shape, dtype=dtype)
    target = scores.softmax(dim=1 if len(shape) > 1 else 0)
    weight = torch.rand(classes(shape), dtype=accumulation_dtype(dtype)) + 0.5
    for smoothing, class_weight in itertools.product((0.0, 0.3), (None, weight)):
        options = {"label_smoothing": smoothing, "weight": class_weight, "reduction": reduction}
        assert_agrees(input, target, **options)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_probabilities_that_require_grad(reduction: str, dtype: torch.dtype) -> None:
    input = torch.randn(4, 7, 3, dtype=dtype, requires_grad=True)
    target = torch.rand(4, 7, 3, dtype=dtype, requires_grad=True)
    weight = torch.rand(7, dtype=accumulation_dtype(dtype))
    assert_agrees(input, target, weight=weight, label_smoothing=0.2, reduction=reduction)
    assert_agrees(input.detach(), target, reduction=reduction)


def test_probabilities_that_do_not_add_up_to_one() -> None:
    input = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    assert_agrees(input, 3 * torch.rand(4, 7, dtype=torch.float64))
    assert_agrees(input, torch.zeros(4, 7, dtype=torch.float64))
    assert_agrees(input, -torch.rand(4, 7, dtype=torch.float64), label_smoothing=0.1)


@pytest.mark.parametrize("target_kind", ["indices", "probabilities"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_mask(reduction: str, target_kind: str) -> None:
    input = torch.randn(4, 7, 3, dtype=torch.float64, requires_grad=True)
    target = torch.rand(4, 7, 3, dtype=torch.float64)
    if target_kind == "indices":
        target = target.argmax(dim=1)
    mask = torch.rand(4, 3, dtype=torch.float64) * (torch.rand(4, 3) < 0.7)
    mask.requires_grad_()
    weight = torch.rand(7, dtype=torch.float64)
    for options in ({}, {"weight": weight, "label_smoothing": 0.1}):
        loss = masked_loss.cross_entropy(input, target, reduction=reduction, mask=mask, **options)
        truth = reference.cross_entropy(input, target, reduction=reduction, mask=mask, **options)
        torch.testing.assert_close(loss, truth)
        torch.testing.assert_close(
            torch.autograd.grad(loss.sum(), (input, mask)),
            torch.autograd.grad(truth.sum(), (input, mask)),
        )


@pytest.mark.parametrize("target_kind", ["indices", "probabilities"])
def test_masked_rows_are_never_read(target_kind: str) -> None:
    input = torch.randn(4, 7, 3)
    input[1, :, 2] = NAN
    input[2] = float("inf")
    input.requires_grad_()
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[1, 2] = mask[2] = False
    target = torch.rand(4, 7, 3)
    if target_kind == "indices":
        target = target.argmax(dim=1)
        target[2] = 99
    else:
        target[2] = NAN
    loss = masked_loss.cross_entropy(input, target, mask=mask)
    assert loss.isfinite()
    loss.backward()
    assert input.grad.isfinite().all()
    assert (input.grad.movedim(1, -1)[~mask] == 0).all()


@pytest.mark.parametrize("reduce", [None, True, False])
@pytest.mark.parametrize("size_average", [None, True, False])
def test_legacy_arguments(size_average: bool | None, reduce: bool | None) -> None:
    """size_average and reduce overrule reduction, as they do in PyTorch, with its warning."""
    input, target = torch.randn(4, 7), torch.randint(7, (4,))
    legacy = size_average is not None or reduce is not None
    with warnings.catch_warnings(record=True) as theirs:
        warnings.simplefilter("always")
        expected = F.cross_entropy(
            input, target, size_average=size_average, reduce=reduce, reduction="sum"
        )
    with warnings.catch_warnings(record=True) as ours:
        warnings.simplefilter("always")
        loss = masked_loss.cross_entropy(
            input, target, size_average=size_average, reduce=reduce, reduction="sum"
        )
    torch.testing.assert_close(loss, expected)
    assert bool(theirs) == legacy
    assert bool(ours) == legacy


def test_legacy_arguments_by_position() -> None:
    input, target, weight = torch.randn(4, 7), torch.tensor([0, 2, 2, 6]), torch.rand(7)
    args = (input, target, weight, None, 2, None, "sum", 0.1)
    torch.testing.assert_close(masked_loss.cross_entropy(*args), F.cross_entropy(*args))
    with pytest.warns(UserWarning, match="reduc"):
        loss = masked_loss.cross_entropy(input, target, weight, False, 2)
    with pytest.warns(UserWarning, match="reduc"):
        expected = F.cross_entropy(input, target, weight, False, 2)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 3, 7, 255])
def test_ignore_index(ignore_index: int) -> None:
    input = torch.randn(6, 7, requires_grad=True)
    target = torch.tensor([1, ignore_index, 2, 5, ignore_index, 6])
    for reduction in ("none", "sum", "mean"):
        assert_agrees(input, target, ignore_index=ignore_index, reduction=reduction)


def test_int32_indices() -> None:
    """PyTorch has no kernel for them."""
    input = torch.randn(4, 7, 3, requires_grad=True)
    target = torch.randint(7, (4, 3))
    loss = masked_loss.cross_entropy(input, target.int())
    assert torch.equal(loss, masked_loss.cross_entropy(input, target))
    torch.testing.assert_close(loss, F.cross_entropy(input, target))


def test_everything_ignored_gives_zero() -> None:
    """PyTorch divides 0 by 0."""
    input = torch.randn(4, 7, requires_grad=True)
    target = torch.full((4,), -100)
    assert F.cross_entropy(input, target).isnan()
    loss = masked_loss.cross_entropy(input, target)
    assert loss == 0
    loss.backward()
    assert (input.grad == 0).all()


def test_half_types_give_a_float32_loss() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        input, target = torch.randn(4, 7, dtype=dtype), torch.randint(7, (4,))
        assert F.cross_entropy(input, target).dtype == dtype
        loss = masked_loss.cross_entropy(input, target)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, F.cross_entropy(input.float(), target))


def test_float32_class_weights_with_half_logits() -> None:
    """PyTorch wants the class weights in the logits' type."""
    input, target = torch.randn(4, 7, dtype=torch.bfloat16), torch.randint(7, (4,))
    weight = torch.rand(7)
    loss = masked_loss.cross_entropy(input, target, weight)
    torch.testing.assert_close(loss, F.cross_entropy(input.float(), target, weight))


def test_empty_batch() -> None:
    """Nothing to average is 0 here; PyTorch's mean of nothing is NaN."""
    input, target = torch.zeros(0, 7, requires_grad=True), torch.zeros(0, dtype=torch.long)
    assert masked_loss.cross_entropy(input, target, reduction="none").shape == (0,)
    for reduction in ("sum", "mean"):
        loss = masked_loss.cross_entropy(input, target, reduction=reduction)
        assert loss == 0
        (gradient,) = torch.autograd.grad(loss, input)
        assert gradient.shape == (0, 7)


def test_classes_in_dimension_one_keep_their_layout() -> None:
    """(N, C, d1) as ``logits.transpose(1, 2)`` makes it: the rows are contiguous already."""
    logits = torch.randn(3, 5, 7, requires_grad=True)
    target = torch.randint(7, (3, 5))
    loss = masked_loss.cross_entropy(logits.transpose(1, 2), target, reduction="none")
    assert torch.equal(loss, masked_loss.masked_cross_entropy(logits, target, reduction="none"))
    assert loss.shape == (3, 5)
