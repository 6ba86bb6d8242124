# SPDX-License-Identifier: BSD-3-Clause
"""What is done token by token on the CUDA emulator: weights, sums over tokens, gradients scaled."""

from __future__ import annotations

from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from accuracy import assert_as_accurate_as_eager
from cuda_emulator.build import NAMESPACE
from cuda_emulator.checks import Configure, check
from rounding import HALF_TYPES
from samples import REDUCE_CASES, REDUCTIONS, Case

from masked_loss import masked_cross_entropy, masked_reduce, reference

pytestmark = pytest.mark.usefixtures("emulator")


@pytest.mark.parametrize("case", REDUCE_CASES, ids=str)
def test_every_reduction(case: Case, dtype: torch.dtype) -> None:
    assert_as_accurate_as_eager(masked_reduce, reference.masked_reduce, case, dtype)


@pytest.mark.parametrize(
    "shape", [(1, 2048), (2, 2049), (2, 4099), (140_001,), (300, 2), (5, 1700)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sums_over_many_tokens(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """By one block alone; a group in several pieces, in more than a warp has lanes; many groups.

    Half types, too, are added up in float32: test_every_reduction is of all types.
    """
    for reduction in REDUCTIONS:
        case = Case(f"tokens-{reduction}", shape, None, options={"reduction": reduction})
        assert_as_accurate_as_eager(masked_reduce, reference.masked_reduce, case, dtype)


@pytest.mark.parametrize(
    "options", [{}, {"class_weight": True}, {"shift": True, "z_loss": 0.01}], ids=str
)
@pytest.mark.parametrize("shape", [(2, 333), (33, 20)], ids=str)
def test_every_place_of_a_batch(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    """A lane takes several tokens at a time, and then the rest: by one block, and by many."""
    for reduction in REDUCTIONS:
        case = Case(f"batch-{reduction}", shape, 3, options={"reduction": reduction, **options})
        check(case, torch.float32, return_stats=True)


# More sequences than a block has warps, than a warp has lanes; longer than a piece of 2048 tokens.
PACKED = {
    "few": [0, 2, 2, 9, 13],
    "many": list(range(0, 3001, 3)),
    "long": [0, 1, 5000, 5000, 5001],
}


@pytest.mark.parametrize("max_blocks", [1 << 30, 3])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", PACKED)
def test_packed_sequences(name: str, reduction: str, max_blocks: int, configure: Configure) -> None:
    configure(max_blocks=max_blocks)
    bounds = torch.tensor(PACKED[name])
    options = {"reduction": reduction, "cu_seqlens": bounds}
    shape = (int(bounds[-1]) + 2,)
    case = Case(f"packed-{name}-{reduction}", shape, classes=None, options=options)
    assert_as_accurate_as_eager(masked_reduce, reference.masked_reduce, case, torch.float32)
    values, mask = torch.randn(shape, requires_grad=True), torch.rand(shape, requires_grad=True)
    each = masked_reduce(values, mask, dim=-1, cu_seqlens=bounds)
    if name == "few":
        check(
            Case(f"packed-rows-{reduction}", shape, 5, options=options | {"shift": True}),
            torch.float32,
        )
    total = (each * 2).sum()
    with_dim = torch.autograd.grad(total, (values, mask))
    total = (
        2
        * torch.stack(
            [
                (values[a:b] * mask[a:b]).sum() / mask[a:b].sum()
                for a, b in pairwise(PACKED[name])
                if b > a
            ]
        ).sum()
    )
    by_hand = torch.autograd.grad(total, (values, mask))
    for ours, theirs in zip(with_dim, by_hand, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)], ids=str)
def test_no_tokens(shape: tuple[int, ...]) -> None:
    for reduction in REDUCTIONS:
        logits = torch.zeros(*shape, 5, requires_grad=True)
        target = torch.zeros(shape, dtype=torch.int64)
        loss = masked_cross_entropy(logits, target, reduction=reduction)
        assert loss.sum() == 0
        loss.sum().backward()
        assert logits.grad is not None


def test_weights_that_cancel_leave_no_z_loss_of_zero_behind() -> None:
    """Their sum is 0, but not that of their class weights: scale_z is infinite, and not used."""
    logits = torch.randn(2, 5, requires_grad=True)
    mask, c = torch.tensor([1.0, -1.0], requires_grad=True), torch.tensor([1.0, 2, 1, 1, 1])
    ours, expected = (
        torch.autograd.grad(
            loss(logits, torch.tensor([0, 1]), mask, class_weight=c), (logits, mask)
        )
        for loss in (masked_cross_entropy, reference.masked_cross_entropy)
    )
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    ("shape", "reduction", "launches"),
    [
        ((8192,), "mean", 3),
        ((8193,), "mean", 5),
        ((32, 256), "sequence_mean", 3),
        ((33, 200), "sequence_mean", 7),
        ((32, 300), "sequence_mean", 5),
    ],
    ids=str,
)
def test_launches(
    shape: tuple[int, ...], reduction: str, launches: int, module: ModuleType
) -> None:
    """Weights, rows, reduction: one each, up to 8192 tokens in 32 sequences."""
    logits, target = torch.randn(*shape, 3), torch.zeros(shape, dtype=torch.int64)
    before = module.launches()
    masked_cross_entropy(logits, target, reduction=reduction)
    assert module.launches() - before == launches


SCALED = [(x, x) for x in (torch.float64, torch.float32, *HALF_TYPES)]


@pytest.mark.parametrize("device", ["emulated", "cpu"])
@pytest.mark.parametrize("types", [*SCALED, *((torch.float32, x) for x in HALF_TYPES)], ids=str)
def test_a_gradient_times_a_number(
    types: tuple[torch.dtype, torch.dtype], device: str, configure: Configure
) -> None:
    """Rounded once, of any length and alignment, in place and apart; with 1 nothing is written."""
    configure(multiprocessors=1)
    ops = torch.ops.masked_loss if device == "cpu" else getattr(torch.ops, NAMESPACE)
    of_gradient, of_scaled = types
    wide = torch.promote_types(of_gradient, torch.float32)
    for count, skipped in ((0, 0), (7, 0), (20_011, 0), (20_011, 1), (20_011, 3)):
        gradient = torch.randn(count + skipped).to(of_gradient)[skipped:]
        for number in (0.3, 1.0, -(2.0**-10)):
            factor = torch.tensor(number, dtype=wide)
            expected = (gradient.to(wide) * factor).to(of_scaled)
            scaled = torch.full((count + skipped,), 9.0, dtype=of_scaled)[skipped:]
            ops.scale(scaled, gradient, factor)
            assert torch.equal(scaled, expected)
            if of_gradient == of_scaled:
                ops.scale(in_place := gradient.clone(), in_place, factor)
                assert torch.equal(in_place, expected)
