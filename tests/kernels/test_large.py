# SPDX-License-Identifier: BSD-3-Clause
"""Sizes beyond 32-bit offsets.

Memory that is allocated but never touched costs nothing on the CPU, and masked rows are never read:
only the tests that write a whole gradient need the memory that they name.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from masked_loss import masked_cross_entropy

pytestmark = pytest.mark.slow


def needs(gigabytes: float, device: str) -> None:
    if device == "cuda":
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        if free < gigabytes * 1e9:
            pytest.skip(f"needs {gigabytes} GB of the GPU's memory, found {free / 1e9:.1f}")


def set_rows(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Random numbers in these rows, NaN in their neighbours; returns a copy of the rows."""
    for row in rows:
        for neighbour in (row - 1, row + 1):
            if 0 <= neighbour < logits.shape[0]:
                logits[neighbour] = float("nan")
    for row in rows:
        logits[row] = torch.randn(logits.shape[1], device=logits.device)
    return logits[rows].float()


@pytest.mark.parametrize("elements", [2**31, 2**32], ids=["2^31", "2^32"])
def test_forward_beyond(elements: int, device: str) -> None:
    """Up to 8.6 GB of address space, of which a few rows are touched."""
    needs(2.2 * elements / 1e9, device)
    classes = 65_537
    rows = elements // classes + 3
    logits = torch.empty(rows, classes, dtype=torch.bfloat16, device=device)
    assert logits.numel() > elements
    active = [0, rows // 2, rows - 2, rows - 1]
    expected = set_rows(logits, active)
    target = torch.full((rows,), -100, device=device)
    target[active] = torch.tensor([1, 2, classes - 1, 0], device=device)
    loss, stats = masked_cross_entropy(logits, target, reduction="none", return_stats=True)
    truth = F.cross_entropy(expected, target[active], reduction="none")
    torch.testing.assert_close(loss[active], truth)
    assert stats.tokens == len(active)
    assert (loss != 0).sum() == len(active)


def test_row_stride_beyond(device: str) -> None:
    """Rows that lie 2^31 elements apart."""
    needs(9, device)
    stride, classes = 2**31 + 16, 1000
    storage = torch.empty(2 * stride + classes, dtype=torch.float16, device=device)
    logits = storage.as_strided((3, classes), (stride, 1))
    logits[:] = torch.randn(3, classes, device=device)
    logits.requires_grad_()
    compact = logits.detach().clone().requires_grad_()
    target = torch.tensor([5, 0, 999], device=device)
    loss = masked_cross_entropy(logits, target)
    expected = masked_cross_entropy(compact, target)
    assert torch.equal(loss, expected)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.equal(gradient, torch.autograd.grad(expected, compact)[0])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_beyond(reduction: str, device: str) -> None:
    """4.3 GB of gradient, zeros but for a few rows."""
    needs(10, device)
    classes = 65_537
    rows = 2**31 // classes + 3
    logits = torch.empty(rows, classes, dtype=torch.bfloat16, device=device)
    active = [0, rows // 2, rows - 1]
    compact = set_rows(logits, active).bfloat16().requires_grad_()
    target = torch.full((rows,), -100, device=device)
    target[active] = torch.tensor([1, 2, classes - 1], device=device)
    logits.requires_grad_()
    loss = masked_cross_entropy(logits, target, reduction=reduction).sum()
    loss.backward()
    gradient = logits.grad
    expected = masked_cross_entropy(compact, target[active], reduction=reduction).sum()
    torch.testing.assert_close(loss, expected)
    expected.backward()
    torch.testing.assert_close(gradient[active], compact.grad)
    step = rows // 16
    nonzero = sum(int(part.count_nonzero()) for part in gradient.split(step))
    assert nonzero == int(compact.grad.count_nonzero())


def test_backward_in_place_beyond(device: str) -> None:
    """4.3 GB of logits, which the gradient overwrites: no second copy of them."""
    needs(5, device)
    classes = 65_537
    rows = 2**31 // classes + 3
    logits = torch.empty(rows, classes, dtype=torch.bfloat16, device=device)
    active = [0, rows - 1]
    compact = set_rows(logits, active).bfloat16().requires_grad_()
    target = torch.full((rows,), -100, device=device)
    target[active] = torch.tensor([1, classes - 1], device=device)
    logits.requires_grad_()
    loss = masked_cross_entropy(logits, target, inplace_backward=True)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.data_ptr() == logits.data_ptr()
    expected = masked_cross_entropy(compact, target[active])
    torch.testing.assert_close(gradient[active], torch.autograd.grad(expected, compact)[0])
    for neighbour in (1, rows - 2):
        assert (gradient[neighbour] == 0).all()
