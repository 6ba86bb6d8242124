# SPDX-License-Identifier: BSD-3-Clause
"""What a masked loss means, case by case, on numbers that can be checked by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from samples import REDUCTIONS, problem
from torch import Tensor

import masked_loss
from masked_loss import masked_cross_entropy, reference
from masked_loss.options import Meaning

pytestmark = pytest.mark.usefixtures("on_the_device")
NAN = float("nan")
MASK_DTYPES = [
    torch.bool,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
]


def token_losses(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    flat = F.cross_entropy(logits.flatten(0, -2), target.flatten(), reduction="none", **options)
    return flat.view(target.shape)


def test_weight_of_a_token() -> None:
    """w = mask * [target != ignore_index]."""
    logits, target = problem(4)
    target[1] = -100
    mask = torch.tensor([1.0, 1.0, 0.0, 0.5])
    w = torch.tensor([1.0, 0.0, 0.0, 0.5])
    loss = masked_cross_entropy(logits, target, mask, reduction="none")
    expected = w * token_losses(logits, target.clamp(min=0))
    torch.testing.assert_close(loss, expected)
    assert (loss[w == 0] == 0).all()


def test_ignore_index_may_be_a_class() -> None:
    logits, target = problem(4)
    target[:] = torch.tensor([0, 3, 3, 1])
    loss = masked_cross_entropy(logits, target, ignore_index=3, reduction="none")
    assert loss[1] == loss[2] == 0
    assert (loss[[0, 3]] > 0).all()


@pytest.mark.parametrize("mask_dtype", MASK_DTYPES, ids=str)
def test_mask_of_every_type(mask_dtype: torch.dtype, dtype: torch.dtype, device: str) -> None:
    logits, target = problem(2, 3)
    logits, target = logits.detach().to(device, dtype), target.to(device)
    mask = torch.tensor([[1, 0, 2], [3, 1, 0]], device=device).to(mask_dtype)
    for reduction in REDUCTIONS:
        loss = masked_cross_entropy(logits, target, mask, reduction=reduction)
        expected = masked_cross_entropy(logits, target, mask.double(), reduction=reduction)
        torch.testing.assert_close(loss, expected)


def test_sum_and_mean() -> None:
    logits, target = problem(3, 4)
    mask = torch.rand(3, 4)
    ce = token_losses(logits, target)
    total = masked_cross_entropy(logits, target, mask, reduction="sum")
    mean = masked_cross_entropy(logits, target, mask, reduction="mean")
    torch.testing.assert_close(total, (mask * ce).sum())
    torch.testing.assert_close(mean, (mask * ce).sum() / mask.double().sum())


def test_the_mean_is_the_stock_idiom_done_right() -> None:
    logits, target = problem(3, 4)
    mask = torch.rand(3, 4) < 0.5
    idiom = (token_losses(logits, target) * mask).sum() / mask.sum()
    torch.testing.assert_close(masked_cross_entropy(logits, target, mask), idiom)


def test_class_weights_divide_as_in_pytorch() -> None:
    logits, target = problem(6)
    target[2] = -100
    c = torch.rand(5, dtype=torch.float64)
    loss = masked_cross_entropy(logits, target, class_weight=c)
    torch.testing.assert_close(loss, F.cross_entropy(logits, target, c))
    mask = torch.rand(6, dtype=torch.float64)
    w = mask * (target != -100)
    index = target.clamp(min=0)
    expected = (w * token_losses(logits, index, weight=c)).sum() / (w * c[index]).sum()
    torch.testing.assert_close(masked_cross_entropy(logits, target, mask, class_weight=c), expected)


def test_z_loss_carries_no_class_weight() -> None:
    """The mean of the z-loss divides by the weights alone, whatever the class weights are."""
    logits, target = problem(6)
    c, w = torch.rand(5, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    z = 0.1 * torch.logsumexp(logits, -1) ** 2
    for reduction, expected in {
        "none": w * z,
        "sum": (w * z).sum(),
        "mean": (w * z).sum() / w.sum(),
    }.items():
        options = {"reduction": reduction, "class_weight": c}
        with_z = masked_cross_entropy(logits, target, w, z_loss=0.1, **options)
        without = masked_cross_entropy(logits, target, w, **options)
        torch.testing.assert_close(with_z - without, expected)


@pytest.mark.parametrize("options", [
    {"z_loss": 1.0},
    {"label_smoothing": 1.0},
    {"label_smoothing": 1.0, "z_loss": 1.0, "class_weight": [0.7, 0.2, 0.9, 0.5, 0.4]},
    {"softcap": 1.0},
    {"temperature": 2.0},
], ids="-".join)  # fmt: skip
def test_one_value_of_an_option_leaves_it_out(options: dict[str, Any]) -> None:
    """A z-loss of 0 is none, and 1 is not; a temperature of 1 is none, and 2 is not."""
    logits, target = problem(3, 4)
    if "class_weight" in options:  # on the device of the test
        weight = torch.tensor(options["class_weight"], dtype=torch.float64)
        options = {**options, "class_weight": weight}
    mask = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    for reduction in REDUCTIONS:
        found = []
        for loss_of in (masked_cross_entropy, reference.masked_cross_entropy):
            loss = loss_of(logits, target, mask, reduction=reduction, **options)
            found.append((loss, *torch.autograd.grad(loss.sum(), (logits, mask))))
        torch.testing.assert_close(*found)


def test_class_weights_of_zero_follow_arithmetic() -> None:
    """0 / 0 where tokens take part is NaN, as in PyTorch; it is not the case of no token."""
    logits, target = problem(3)
    loss = masked_cross_entropy(logits, target, class_weight=torch.zeros(5, dtype=torch.float64))
    assert loss.isnan()
    assert F.cross_entropy(logits, target, torch.zeros(5, dtype=torch.float64)).isnan()


def test_weights_that_cancel_follow_arithmetic() -> None:
    logits, target = problem(2)
    mask = torch.tensor([1.0, -1.0], dtype=torch.float64, requires_grad=True)
    loss = masked_cross_entropy(logits, target, mask)
    assert not loss.isfinite()
    # With class weights that do not cancel there is no 0 / 0, not even of a z-loss of 0.
    logits.requires_grad_()
    target, c = torch.tensor([0, 1]), torch.tensor([1.0, 2, 1, 1, 1], dtype=torch.float64)
    for inputs in ((logits,), (logits, mask)):  # in the forward pass, and after it
        weights = mask if len(inputs) == 2 else mask.detach()
        ours, expected = (
            torch.autograd.grad(loss(logits, target, weights, class_weight=c), inputs)
            for loss in (masked_cross_entropy, reference.masked_cross_entropy)
        )
        torch.testing.assert_close(ours, expected)


def test_a_weight_that_underflows_is_none() -> None:
    """A sequence of such weights is one without tokens: computed in float32 they are 0."""
    logits, target = problem(2, 3)
    mask = torch.tensor([[1.0], [1e-60]], dtype=torch.float64).expand(2, 3)
    loss = masked_cross_entropy(logits.float(), target, mask, reduction="sequence_mean")
    torch.testing.assert_close(loss, masked_cross_entropy(logits[0].float(), target[0]))


def test_sequence_mean() -> None:
    """A mean for each sequence; a sequence without tokens does not count."""
    logits, target = problem(3, 4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
    ce = token_losses(logits, target)
    loss = masked_cross_entropy(logits, target, mask, reduction="sequence_mean")
    torch.testing.assert_close(loss, (ce[0].mean() + ce[1, 0]) / 2)


def test_sequence_mean_of_more_dimensions() -> None:
    logits, target = problem(2, 3, 4)
    mask = torch.rand(2, 3, 4, dtype=torch.float64)
    ce = token_losses(logits, target)
    expected = ((mask * ce).sum(-1) / mask.sum(-1)).mean()
    loss = masked_cross_entropy(logits, target, mask, reduction="sequence_mean")
    torch.testing.assert_close(loss, expected)
    flat = masked_cross_entropy(
        logits.flatten(0, 1), target.flatten(0, 1), mask.flatten(0, 1), reduction="sequence_mean"
    )
    torch.testing.assert_close(loss, flat)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize(
    "kind", ["int", "float", "tensor", "integer tensor", "0-dim float64", "numpy"]
)
def test_normalizer(kind: str, reduction: str) -> None:
    logits, target = problem(3, 4)
    mask, c = torch.rand(3, 4), torch.rand(5, dtype=torch.float64)
    normalizer: Any = {
        "int": 8,
        "float": 8.0,
        "tensor": torch.tensor(8.0),
        "integer tensor": torch.tensor(8),
        "0-dim float64": torch.tensor(8.0, dtype=torch.float64),
        "numpy": np.int64(8),
    }[kind]
    options: dict[str, Any] = {"class_weight": c, "z_loss": 0.1}
    loss = masked_cross_entropy(
        logits, target, mask, reduction=reduction, normalizer=normalizer, **options
    )
    total = masked_cross_entropy(logits, target, mask, reduction="sum", **options)
    torch.testing.assert_close(loss, total / 8)


def test_normalizer_makes_accumulation_exact() -> None:
    """Micro-batches that divide by the count of all tokens add up to the loss of the batch."""
    logits, target = problem(6, 4)
    mask = torch.rand(6, 4) < 0.5
    whole = masked_cross_entropy(logits, target, mask)
    (expected,) = torch.autograd.grad(whole, logits)
    leaf = logits.detach().requires_grad_()
    parts = [
        masked_cross_entropy(leaf[i : i + 2], target[i : i + 2], mask[i : i + 2],
                             reduction="sum", normalizer=mask.sum())
        for i in (0, 2, 4)
    ]  # fmt: skip
    for part in parts:
        part.backward()
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(leaf.grad, expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_dtypes_of_the_results(reduction: str, dtype: torch.dtype, device: str) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    logits = torch.randn(2, 3, 5, device=device).to(dtype).requires_grad_()
    target = torch.randint(5, (2, 3), device=device)
    for mask_dtype in (torch.bfloat16, torch.float64):
        mask = torch.ones(2, 3, dtype=mask_dtype, device=device, requires_grad=True)
        loss, stats = masked_cross_entropy(
            logits, target, mask, reduction=reduction, return_stats=True
        )
        assert loss.dtype == wide
        assert loss.device.type == device
        assert loss.shape == ((2, 3) if reduction == "none" else ())
        gradients = torch.autograd.grad(loss.sum(), (logits, mask))
        assert [g.dtype for g in gradients] == [dtype, mask_dtype]
        assert [g.shape for g in gradients] == [logits.shape, mask.shape]
        assert isinstance(stats, masked_loss.LossStats)
        for value in stats:
            assert value.dtype == torch.float64
            assert value.dim() == 0
            assert not value.requires_grad


def test_half_logits_are_rounded_once() -> None:
    """The gradient is the float32 gradient of the same numbers, rounded to their type."""
    for dtype in (torch.float16, torch.bfloat16):
        logits = torch.randn(9, 1000).to(dtype).requires_grad_()
        wide = logits.detach().float().requires_grad_()
        target = torch.randint(1000, (9,))
        for reduction in ("mean", "none"):
            loss = masked_cross_entropy(logits, target, reduction=reduction)
            expected = masked_cross_entropy(wide, target, reduction=reduction)
            torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
            (gradient,) = torch.autograd.grad(loss.sum(), logits)
            (truth,) = torch.autograd.grad(expected.sum(), wide)
            tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
            bound = (0.5 * torch.finfo(dtype).eps + 1e-5) * truth.abs() + tiny
            assert ((gradient.float() - truth).abs() <= bound).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("shift", [False, True])
def test_empty_batch(shift: bool, shape: tuple[int, ...], reduction: str, device: str) -> None:
    logits = torch.zeros(*shape, 5, device=device, requires_grad=True)
    target = torch.zeros(shape, dtype=torch.long, device=device)
    mask = torch.zeros(shape, device=device, requires_grad=True)
    for arguments in ((logits, target), (logits, target, mask)):
        loss, stats = masked_cross_entropy(
            *arguments, reduction=reduction, shift=shift, return_stats=True
        )
        assert loss.shape == (shape if reduction == "none" else ())
        assert (loss == 0).all()
        assert stats.tokens == 0
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert gradient.shape == logits.shape


def test_one_token_without_dimensions() -> None:
    logits, target = torch.randn(5), torch.tensor(3)
    for reduction in ("none", "sum", "mean"):
        loss = masked_cross_entropy(logits, target, torch.tensor(2.0), reduction=reduction)
        expected = F.cross_entropy(logits, target) * (1 if reduction == "mean" else 2)
        torch.testing.assert_close(loss, expected)
        assert loss.shape == ()


def test_label_smoothing_as_in_pytorch() -> None:
    logits, target = problem(6)
    target[0] = -100
    c = torch.rand(5, dtype=torch.float64)
    for weight in (None, c):
        for smoothing in (0.0, 0.1, 1.0):
            loss = masked_cross_entropy(
                logits, target, label_smoothing=smoothing, class_weight=weight
            )
            expected = F.cross_entropy(logits, target, weight, label_smoothing=smoothing)
            torch.testing.assert_close(loss, expected)


def test_softcap_comes_first() -> None:
    logits, target = problem(6)
    capped = 2 * torch.tanh(logits / 2)
    options: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 0.1}
    loss = masked_cross_entropy(logits, target, softcap=2.0, **options)
    expected = masked_cross_entropy(capped, target, **options)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits)
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_shift(reduction: str) -> None:
    """logits[t] scores target[t + 1], with the mask of the latter."""
    logits, target = problem(3, 6)
    target[0, 3] = -100
    mask = torch.rand(3, 6, dtype=torch.float64, requires_grad=True)
    loss = masked_cross_entropy(logits, target, mask, reduction=reduction, shift=True)
    sliced = masked_cross_entropy(logits[:, :-1], target[:, 1:], mask[:, 1:], reduction=reduction)
    if reduction == "none":
        assert loss.shape == target.shape
        assert (loss[:, 0] == 0).all()
        torch.testing.assert_close(loss[:, 1:], sliced)
    else:
        torch.testing.assert_close(loss, sliced)
    gradients = torch.autograd.grad(loss.sum(), (logits, mask))
    torch.testing.assert_close(gradients, torch.autograd.grad(sliced.sum(), (logits, mask)))
    assert (gradients[0][:, -1] == 0).all()
    assert (gradients[1][:, 0] == 0).all()


def test_shift_never_reads_the_last_row_and_the_first_target() -> None:
    logits, target = problem(2, 4)
    logits = logits.detach()
    logits[:, -1] = NAN
    logits.requires_grad_()
    target[:, 0] = 77
    mask = torch.ones(2, 4)
    mask[:, 0] = NAN
    loss = masked_cross_entropy(logits, target, mask, shift=True)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


def test_shift_of_a_single_step() -> None:
    logits = torch.full((2, 1, 5), NAN, requires_grad=True)
    target = torch.tensor([[3], [99]])
    loss, stats = masked_cross_entropy(logits, target, shift=True, return_stats=True)
    loss.backward()
    assert loss == stats.tokens == 0
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("name", ["cross_entropy_forward", "cross_entropy_fused"])
def test_operators_default_to_what_functions_leave_out(name: str) -> None:
    schema = getattr(torch.ops.masked_loss, name).default._schema
    defaults = {argument.name: argument.default_value for argument in schema.arguments}
    assert defaults["stats"] is False
    assert {key: defaults[key] for key in Meaning._fields} == Meaning()._asdict()


def test_inputs_are_left_alone() -> None:
    logits, target = problem(4, 3)
    mask = torch.rand(4, 3, requires_grad=True)
    copies = logits.detach().clone(), target.clone(), mask.detach().clone()
    for reduction in REDUCTIONS:
        masked_cross_entropy(logits, target, mask, reduction=reduction).sum().backward()
    assert torch.equal(logits, copies[0])
    assert torch.equal(target, copies[1])
    assert torch.equal(mask, copies[2])


def test_one_class() -> None:
    logits = torch.randn(3, 1, requires_grad=True)
    loss = masked_cross_entropy(logits, torch.zeros(3, dtype=torch.long))
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()
