# SPDX-License-Identifier: BSD-3-Clause
"""Divergences on the CUDA emulator."""

from __future__ import annotations

import pytest
import torch
from accuracy import accumulation_dtype
from cuda_emulator.checks import Configure
from torch import Tensor

from masked_loss import masked_divergence, reference

pytestmark = pytest.mark.usefixtures("emulator")


def assert_close(ours: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """As close as what was computed in float32, of float64 in that, and then rounded."""
    eps, rounded = torch.finfo(accumulation_dtype(dtype)).eps, torch.finfo(ours.dtype)
    rtol = max(16 * eps, rounded.eps)
    atol = 32 * eps * truth.abs().max().item() + rounded.eps * rounded.tiny
    torch.testing.assert_close(ours.double(), truth, rtol=rtol, atol=atol)


@pytest.mark.parametrize("kind", reference.DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_divergences(kind: str, dtype: torch.dtype) -> None:
    """Values, statistics and gradients, with excluded classes, masked rows and a row per token."""
    student, teacher = (3 * torch.randn(2, 3, 700).to(dtype) for _ in range(2))
    excluded = torch.rand(700) < 0.1
    student, teacher = (x.masked_fill(excluded, -float("inf")) for x in (student, teacher))
    mask = torch.tensor([[1.0, 0.0, 2.0], [0.5, 1.0, 1.0]])
    student[0, 0] = float("nan")  # the row of the token that is masked
    options = {"kind": kind, "beta": 0.3, "softcap": 6.0, "shift": True, "return_stats": True}
    options |= {"teacher_softcap": 9.0, "temperature": 0.5 + torch.rand(2, 3)}
    options |= {"reduction": "sequence_mean", "cu_seqlens": torch.tensor([0, 2, 2, 3, 5])}
    found = []
    for function, wide in (
        (masked_divergence, dtype),
        (reference.masked_divergence, torch.float64),
    ):
        y = student.to(wide).requires_grad_()
        loss, stats = function(y, teacher.to(wide), mask, **options)
        (gradient,) = torch.autograd.grad(loss, y)
        found.append((loss.detach(), *stats, gradient))
    for ours, truth in zip(*found, strict=True):
        assert_close(ours, truth.double(), dtype)


# The columns before each row, of the student and of the teacher.
@pytest.mark.parametrize("before", [(0, 0), (0, 1), (3, 0), (5, 2)])
@pytest.mark.parametrize("kept", [227, 64], ids=["", "half in shared memory"])
@pytest.mark.parametrize(
    ("dtype", "teacher_dtype"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float16),
    ],
    ids=str,
)
def test_a_token_has_the_same_divergence_anywhere(
    dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    kept: int,
    before: tuple[int, int],
    configure: Configure,
) -> None:
    """However the rows are aligned, and whatever else is in the batch: value, gradient, both bits.

    A part of a row of so many classes moves in pieces of 16 bytes, by all lanes of a warp.
    """
    configure(shared_per_block=kept << 10)
    cols = 1101

    def rows(first: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(4, cols + 6).to(dtype)[:, first : first + cols]

    def results(y: Tensor, z: Tensor, kind: str) -> list[Tensor]:
        y = y.detach().requires_grad_()
        loss = masked_divergence(y, z, kind=kind, reduction="none")
        return [loss.detach(), *torch.autograd.grad(loss.sum(), y)]

    student, teacher = rows(before[0], dtype), rows(before[1], teacher_dtype)
    for kind in ("forward_kl", "jsd"):
        together = results(student, teacher, kind)
        for i in range(len(student)):
            alone = results(student[i].clone(), teacher[i].clone(), kind)
            for one, of_all in zip(alone, together, strict=True):
                assert torch.equal(one, of_all[i])
        truth = results(student.double(), teacher.double(), kind)
        for ours, true in zip(together, truth, strict=True):
            assert_close(ours, true, dtype)
        written, overwritten = student * 1, student * 1
        loss = masked_divergence(
            overwritten.requires_grad_(), teacher, kind=kind, reduction="none",
            inplace_backward=True,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(loss.sum(), overwritten)
        assert gradient.data_ptr() == overwritten.data_ptr()
        assert torch.equal(gradient, results(written, teacher, kind)[1])
