# SPDX-License-Identifier: BSD-3-Clause
"""First derivatives under everything that autograd can do; test_differences.py and
test_transforms.py have the others."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from samples import CASES, REDUCE_CASES, REDUCTIONS, Case
from torch import Tensor

from masked_loss import (
    cross_entropy,
    linear_cross_entropy,
    masked_cross_entropy,
    masked_reduce,
    reference,
)

SMALL_CASES = [case for case in CASES if not case.options.get("inplace_backward")]


def problem(*shape: int, classes: int = 7, dtype: torch.dtype = torch.float64) -> Any:
    logits = torch.randn(*shape, classes, dtype=dtype, requires_grad=True)
    mask = torch.rand(shape, dtype=dtype) + 0.1
    return logits, torch.randint(classes, shape), mask.requires_grad_()


def check_gradients(function: Callable[..., Any], case: Case) -> None:
    """gradcheck in float64, of the values and of those mask entries that are not 0."""
    sample = case.sample(torch.float64)
    if sample.mask is not None and sample.mask.requires_grad:
        mask = sample.mask.detach().double()
        if not (mask != 0).all():  # an entry that is 0 takes no part: no difference shows there
            mask = mask.where(mask != 0, 0.5)
        sample.mask = mask.requires_grad_()
    if not all(step for step in sample.values.stride()):  # gradcheck wants its own memory
        sample.values = sample.values.detach().clone().requires_grad_()
    torch.autograd.gradcheck(
        lambda *args: function(*args, **sample.options),
        sample.args,
        fast_mode=True,
        check_batched_grad=True,
    )


@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_gradcheck(case: Case) -> None:
    check_gradients(masked_cross_entropy, case)


@pytest.mark.parametrize("case", REDUCE_CASES, ids=str)
def test_gradcheck_of_masked_reduce(case: Case) -> None:
    check_gradients(masked_reduce, case)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradient_of_the_mask_of_a_masked_token_is_zero(reduction: str) -> None:
    logits, target, mask = problem(3, 4)
    target[0, 0] = -100
    with torch.no_grad():
        mask[1, 2] = 0
    loss = masked_cross_entropy(logits, target, mask, reduction=reduction, z_loss=0.1)
    (gradient,) = torch.autograd.grad(loss.sum(), mask)
    assert gradient[0, 0] == gradient[1, 2] == 0
    assert (gradient != 0).sum() == 10


@pytest.mark.parametrize("needs", ["logits", "mask"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_only_one_input_requires_grad(reduction: str, needs: str) -> None:
    logits, target, mask = problem(3, 4)
    both = masked_cross_entropy(logits, target, mask, reduction=reduction)
    expected = dict(
        zip(("logits", "mask"), torch.autograd.grad(both.sum(), (logits, mask)), strict=True)
    )
    leaf = {"logits": logits, "mask": mask}[needs]
    {"logits": mask, "mask": logits}[needs].requires_grad_(False)
    loss = masked_cross_entropy(logits, target, mask, reduction=reduction)
    torch.testing.assert_close(loss, both)
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), leaf)[0], expected[needs])


def test_no_grad() -> None:
    logits, target, mask = problem(3, 4)
    with torch.no_grad():
        loss = masked_cross_entropy(logits, target, mask)
    assert not loss.requires_grad
    assert not masked_cross_entropy(logits.detach(), target, mask.detach()).requires_grad
    with torch.inference_mode():
        inferred = masked_cross_entropy(logits, target, mask)
    torch.testing.assert_close(loss, inferred)
    torch.testing.assert_close(loss, masked_cross_entropy(logits, target, mask).detach())


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_retain_graph(reduction: str, device: str) -> None:
    """A second backward gives the same gradient, whatever the first one's upstream was."""
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randn(3, 4, 300, dtype=dtype, device=device, requires_grad=True)
        target = torch.randint(300, (3, 4), device=device)
        mask = torch.rand(3, 4, device=device, requires_grad=True)
        loss = masked_cross_entropy(logits, target, mask, reduction=reduction).sum()
        first = torch.autograd.grad(loss, (logits, mask), retain_graph=True)
        kept = [gradient.clone() for gradient in first]
        torch.autograd.grad(3 * loss, (logits, mask), retain_graph=True)
        second = torch.autograd.grad(loss, (logits, mask))
        for a, b, c in zip(first, second, kept, strict=True):
            assert torch.equal(a, c), "a later backward changed a gradient that was given out"
            assert torch.equal(b, c)


def test_backward_twice_without_retain_graph() -> None:
    logits, target, mask = problem(3, 4)
    loss = masked_cross_entropy(logits, target, mask)
    loss.backward()
    with pytest.raises(RuntimeError, match=r"second time|retain_graph"):
        loss.backward()


def test_a_gradient_that_is_written_over_does_not_reach_the_next() -> None:
    """``.grad`` may become the tensor that backward made; optimizers write into it."""
    logits, target, mask = problem(3, 4)
    loss = masked_cross_entropy(logits, target, mask)
    loss.backward(retain_graph=True)
    expected = logits.grad.clone()
    logits.grad.mul_(100)
    logits.grad = None
    loss.backward()
    assert torch.equal(logits.grad, expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_accumulate(reduction: str) -> None:
    logits, target, mask = problem(3, 4)
    for _ in range(3):
        masked_cross_entropy(logits, target, mask, reduction=reduction).sum().backward()
    totals = logits.grad, mask.grad
    logits.grad = mask.grad = None
    (3 * masked_cross_entropy(logits, target, mask, reduction=reduction).sum()).backward()
    torch.testing.assert_close(totals, (logits.grad, mask.grad))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("scale", [1.0, 65536.0, 2.0**-10, 0.0])
def test_upstream_gradient_is_rounded_once(scale: float, reduction: str, device: str) -> None:
    """A GradScaler's 65536: the scale comes before the rounding to float16, not after it.

    Unscaled, most of these gradients are below the smallest float16.
    """
    logits = torch.randn(16, 3000, device=device).half().requires_grad_()
    target = torch.randint(3000, (16,), device=device)
    wide = logits.detach().double().requires_grad_()
    options = {"reduction": reduction}
    (masked_cross_entropy(logits, target, **options).sum() * scale).backward()
    (reference.masked_cross_entropy(wide, target, **options).sum() * scale).backward()
    tiny = torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps
    bound = wide.grad.abs() * (0.5 * torch.finfo(torch.float16).eps + 1e-5) + 0.51 * tiny
    error = (logits.grad.double() - wide.grad).abs()
    overflow = wide.grad.abs() >= 65520  # what rounds to more than 65504, the largest float16
    assert (error <= bound)[~overflow].all()
    assert logits.grad[overflow].isinf().all()
    if scale == 65536.0 and reduction == "mean":
        assert (logits.grad != 0).all()


def test_grad_scaler_and_autocast() -> None:
    model = torch.nn.Linear(8, 50)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    input, target = torch.randn(4, 6, 8), torch.randint(50, (4, 6))
    mask = torch.rand(4, 6) < 0.7
    losses = []
    for _ in range(5):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input)
            assert logits.dtype == torch.bfloat16
            loss = masked_cross_entropy(logits, target, mask)
        assert loss.dtype == torch.float32
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_upstream_gradient_of_any_layout(reduction: str) -> None:
    logits, target, mask = problem(3, 4)
    loss = masked_cross_entropy(logits, target, mask, reduction=reduction)
    dense = torch.rand(3, 4, dtype=torch.float64) if reduction == "none" else torch.tensor(2.0)
    dense = dense.to(loss)
    layouts = [dense, torch.ones((), dtype=loss.dtype).expand(loss.shape)]
    if reduction == "none":
        layouts += [dense.t().contiguous().t(), dense.repeat(1, 2)[:, :4]]
    for upstream in layouts:
        ours = torch.autograd.grad(loss, (logits, mask), upstream, retain_graph=True)
        truth = reference.masked_cross_entropy(logits, target, mask, reduction=reduction)
        expected = torch.autograd.grad(truth, (logits, mask), upstream)
        torch.testing.assert_close(ours, expected)


def test_nan_upstream_does_not_reach_masked_rows() -> None:
    logits, target, mask = problem(4)
    with torch.no_grad():
        mask[1] = 0
    loss = masked_cross_entropy(logits, target, mask, reduction="none")
    upstream = torch.tensor([1.0, float("nan"), 2.0, 3.0], dtype=torch.float64)
    gradients = torch.autograd.grad(loss, (logits, mask), upstream)
    for gradient in gradients:
        assert gradient.isfinite().all()
        assert (gradient[1] == 0).all()


LOSSES: dict[str, Callable[..., Tensor]] = {
    "mean": masked_cross_entropy,
    "none": lambda *args: masked_cross_entropy(*args, reduction="none").sum(),
    "drop-in": lambda logits, target, mask: cross_entropy(
        logits.movedim(-1, 1), target, reduction="sum", mask=mask
    ),
    "masked_reduce": lambda logits, target, mask: masked_reduce(logits[..., 0], mask),
    "linear": lambda logits, target, mask: linear_cross_entropy(
        logits, torch.eye(7, dtype=logits.dtype), target, mask
    ),
}
all_losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@all_losses
def test_gradients_outside_of_vmap(loss: Callable[..., Tensor]) -> None:
    """Inside, no tensor says that it requires grad."""
    logits, target, mask = problem(2, 3, 4)

    def gradients(losses: Tensor) -> tuple[Tensor, ...]:
        penalty = 0.1 * (logits.sum() + mask.sum())
        return torch.autograd.grad((losses**2).sum() + penalty, (logits, mask))

    ours = gradients(torch.func.vmap(loss)(logits, target, mask))
    rows = zip(logits, target, mask, strict=True)
    torch.testing.assert_close(ours, gradients(torch.stack([loss(*row) for row in rows])))


@all_losses
@pytest.mark.parametrize("inplace", [False, True])
def test_batched_upstream_gradients(loss: Callable[..., Tensor], inplace: bool) -> None:
    logits, target, mask = problem(3, 4)
    if inplace:
        loss = partial(masked_cross_entropy, inplace_backward=True)
    upstream = torch.randn(5, dtype=torch.float64)
    (batched,) = torch.autograd.grad(
        loss(logits, target, mask), logits, upstream, is_grads_batched=True
    )
    (single,) = torch.autograd.grad(loss(logits, target, mask), logits)
    torch.testing.assert_close(batched, upstream[:, None, None, None] * single)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_func_grad(reduction: str) -> None:
    logits, target, mask = (x.detach() for x in problem(3, 4))
    options = {"reduction": reduction, "z_loss": 0.1, "shift": True}
    gradients = torch.func.grad(
        lambda x, m: masked_cross_entropy(x, target, m, **options).sum(), argnums=(0, 1)
    )(logits, mask)
    expected = torch.func.grad(
        lambda x, m: reference.masked_cross_entropy(x, target, m, **options).sum(), argnums=(0, 1)
    )(logits, mask)
    torch.testing.assert_close(gradients, expected)
    gradients, values = torch.func.grad_and_value(
        lambda x: masked_cross_entropy(x, target, mask, **options).sum()
    )(logits)
    torch.testing.assert_close(gradients, expected[0])
    torch.testing.assert_close(values, masked_cross_entropy(logits, target, mask, **options).sum())


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_vmap(reduction: str) -> None:
    """Over the batch, one loss for each sequence, whatever is batched and in which dimension."""
    logits, target, mask = (x.detach() for x in problem(3, 4))

    def loss(x: Tensor, t: Tensor, m: Tensor | None) -> Tensor:
        return masked_cross_entropy(x, t, m, reduction=reduction, label_smoothing=0.1)

    expected = torch.stack([loss(*row) for row in zip(logits, target, mask, strict=True)])
    torch.testing.assert_close(torch.func.vmap(loss)(logits, target, mask), expected)
    moved = torch.func.vmap(loss, in_dims=(1, 0, 1))(logits.movedim(0, 1), target, mask.t())
    torch.testing.assert_close(moved, expected)
    shared = torch.func.vmap(lambda x: loss(x, target[0], None))(logits)
    expected = torch.stack([loss(row, target[0], None) for row in logits])
    torch.testing.assert_close(shared, expected)


def test_vmap_of_grad() -> None:
    """Per-sample gradients."""
    logits, target, mask = (x.detach() for x in problem(3, 4))
    with torch.no_grad():
        mask[1, 2] = 0
    ours = torch.func.vmap(torch.func.grad(masked_cross_entropy))(logits, target, mask)
    expected = [
        torch.func.grad(reference.masked_cross_entropy)(*row)
        for row in zip(logits, target, mask, strict=True)
    ]
    torch.testing.assert_close(ours, torch.stack(expected))


def test_func_on_the_other_functions() -> None:
    logits, target, mask = (x.detach() for x in problem(3, 4))
    input = logits.movedim(-1, 1)
    torch.testing.assert_close(
        torch.func.grad(cross_entropy)(input, target),
        torch.func.grad(reference.cross_entropy)(input, target),
    )
    torch.testing.assert_close(
        torch.func.grad(masked_reduce)(logits[..., 0], mask),
        torch.func.grad(reference.masked_reduce)(logits[..., 0], mask),
    )
    torch.testing.assert_close(
        torch.func.vmap(masked_reduce)(logits[..., 0], mask),
        torch.stack([masked_reduce(*row) for row in zip(logits[..., 0], mask, strict=True)]),
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradient_in_place_of_the_logits(reduction: str, dtype: torch.dtype, device: str) -> None:
    """The same bits as without, in the storage of the logits."""
    weight = torch.randn(3, 5, 64, device=device).to(dtype).requires_grad_()
    target = torch.randint(64, (3, 5), device=device)
    mask = torch.rand(3, 5, device=device) * (torch.rand(3, 5, device=device) < 0.7)

    def gradient(inplace: bool) -> tuple[Tensor, Tensor, Tensor]:
        logits = weight * 2  # not a leaf: backward is its only other reader
        logits.retain_grad()
        loss = masked_cross_entropy(
            logits, target, mask, reduction=reduction, inplace_backward=inplace
        )
        before = weight.detach() * 2
        assert torch.equal(before, logits)
        (result,) = torch.autograd.grad(2 * loss.sum(), logits)
        assert torch.equal(before, logits) is not inplace
        assert (result.data_ptr() == logits.data_ptr()) is inplace
        return loss, result

    loss, result = gradient(inplace=True)
    expected_loss, expected = gradient(inplace=False)
    assert torch.equal(loss, expected_loss)
    assert torch.equal(result, expected)


def test_gradient_in_place_of_a_single_row() -> None:
    """Without a dimension of tokens."""
    weight = torch.randn(64, requires_grad=True)
    gradients = []
    for inplace in (False, True):
        logits = weight * 2
        loss = masked_cross_entropy(logits, torch.tensor(5), inplace_backward=inplace)
        gradients += torch.autograd.grad(loss, weight)
    assert torch.equal(*gradients)


def test_gradient_in_place_reaches_the_weights() -> None:
    layer = torch.nn.Linear(6, 11)
    input, target = torch.randn(4, 6), torch.randint(11, (4,))
    masked_cross_entropy(layer(input), target, inplace_backward=True).backward()
    ours = layer.weight.grad.clone()
    layer.zero_grad()
    masked_cross_entropy(layer(input), target).backward()
    assert torch.equal(ours, layer.weight.grad)


def test_gradient_in_place_without_backward_touches_nothing() -> None:
    logits = torch.randn(4, 11, requires_grad=True)
    before = logits.detach().clone()
    loss = masked_cross_entropy(logits * 1, torch.randint(11, (4,)), inplace_backward=True)
    masked_cross_entropy(logits, torch.randint(11, (4,)), inplace_backward=True)
    assert torch.equal(logits, before)
    assert loss.requires_grad


def test_gradient_in_place_is_seen_by_autograd() -> None:
    """Whoever saved the logits for its own backward hears of it, instead of reading a gradient."""
    weight = torch.randn(4, 11, requires_grad=True)
    logits = weight.exp()  # exp keeps its result for backward
    loss = masked_cross_entropy(logits, torch.randint(11, (4,)), inplace_backward=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_logits_changed_before_backward() -> None:
    """Backward reads the logits again: it says that they are others now."""
    logits, target, mask = problem(3, 4)
    loss = masked_cross_entropy(logits, target, mask, reduction="none").sum()
    with torch.no_grad():
        logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, logits)


def test_statistics_have_no_gradient() -> None:
    logits, target, mask = problem(3, 4)
    loss, stats = masked_cross_entropy(logits, target, mask, return_stats=True)
    (gradient,) = torch.autograd.grad(loss, logits)
    (expected,) = torch.autograd.grad(masked_cross_entropy(logits, target, mask), logits)
    assert torch.equal(gradient, expected)
    assert all(value.grad_fn is None for value in stats)


def test_checkpointing() -> None:
    logits, target, mask = problem(3, 4)
    loss = torch.utils.checkpoint.checkpoint(
        masked_cross_entropy, logits, target, mask, use_reentrant=False
    )
    (ours,) = torch.autograd.grad(loss, logits)
    (expected,) = torch.autograd.grad(masked_cross_entropy(logits, target, mask), logits)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    "logits",
    [
        torch.zeros(10).unfold(0, 4, 1),
        torch.zeros(1, 4, 5).expand(3, 4, 5),
        torch.zeros(5, 7).t(),
        torch.zeros(3, 2, 4, 5).transpose(0, 1),
        torch.randn(3, 4)[:, ::2],
        torch.randn(10)[::2],
        torch.zeros(1, 3, 5).expand(2, 3, 5),
        torch.zeros(13).as_strided((3, 5), (4, 1)),
    ],
    ids=[
        "overlapping", "expanded", "classes apart", "irregular rows", "two classes apart",
        "of one row", "two rows in one place", "rows that share one class",
    ],
)  # fmt: skip
def test_gradient_in_place_needs_a_place(logits: Tensor) -> None:
    """Said in forward: in backward nobody knows any more who asked for it."""
    target = torch.zeros(logits.shape[:-1], dtype=torch.int64)
    with pytest.raises(ValueError, match=r"masked_cross_entropy: inplace_backward needs logits"):
        masked_cross_entropy(logits.requires_grad_(), target, inplace_backward=True)
    with pytest.raises(RuntimeError, match="inplace_backward needs logits"):
        torch.ops.masked_loss.cross_entropy(logits, target, inplace_backward=True)


@pytest.mark.parametrize(
    "logits", [torch.randn(20).as_strided((4, 1, 5), (5, 0, 1)), torch.randn(1, 3).t()]
)
def test_gradient_in_place_along_dimensions_of_one(logits: Tensor) -> None:
    """Which may have any stride."""
    target = torch.zeros(logits.shape[:-1], dtype=torch.int64)
    found = []
    for inplace in (False, True):
        leaf = logits.detach().requires_grad_()
        loss = masked_cross_entropy(leaf, target, inplace_backward=inplace)
        found.append(torch.autograd.grad(loss, leaf)[0].clone())
    assert torch.equal(*found)
