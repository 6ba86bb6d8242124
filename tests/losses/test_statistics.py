# SPDX-License-Identifier: BSD-3-Clause
"""What return_stats counts: tokens, correct predictions, entropy and the z-loss."""

from __future__ import annotations

import pytest
import torch
from samples import REDUCTIONS, predictions, problem

from masked_loss import masked_cross_entropy

pytestmark = pytest.mark.usefixtures("on_the_device")
INF, NAN = float("inf"), float("nan")


def test_statistics() -> None:
    logits, target = problem(4, 3)
    with torch.no_grad():
        logits[0, 0] = 0  # a tie: the first index wins
        target[0, 0] = 0
        logits[0, 1] = 0
        target[0, 1] = 1
    target[3] = -100
    mask = torch.rand(4, 3, dtype=torch.float64)
    mask[1, 0] = 0
    w = mask * (target != -100)
    p = logits.softmax(-1)
    for reduction in REDUCTIONS:
        loss, stats = masked_cross_entropy(
            logits, target, mask, z_loss=0.1, reduction=reduction, return_stats=True
        )
        torch.testing.assert_close(stats.tokens, w.sum())
        torch.testing.assert_close(stats.correct, (w * (logits.argmax(-1) == target)).sum())
        torch.testing.assert_close(stats.entropy, -(w * (p * p.log()).sum(-1)).sum().detach())
        z = (w * 0.1 * torch.logsumexp(logits, -1) ** 2).sum().detach()
        torch.testing.assert_close(stats.z_loss, z)
        assert loss.requires_grad
        assert not any(value.requires_grad for value in stats)
    assert stats._fields == ("tokens", "correct", "entropy", "z_loss")


@pytest.mark.parametrize("width", [5, 33, 1000, 40000])
def test_the_first_of_equal_logits_is_the_prediction(width: int) -> None:
    for first in sorted({0, 1, width // 2, width - 2}):
        logits = torch.zeros(3, width)
        logits[:, first] = logits[:, width - 1] = 1
        target = torch.tensor([first, width - 1, max(first - 1, 0)])
        _, stats = masked_cross_entropy(logits[:2], target[:2], return_stats=True)
        assert stats.correct == 1
    for value in (NAN, 0.0):  # torch.argmax takes a NaN, wherever it stands
        logits = torch.full((1, width), 1.0)
        logits[0, width - 1] = value
        _, stats = masked_cross_entropy(logits, torch.tensor([0]), return_stats=True)
        assert stats.correct == (value == 0)
    for value in (0.0, -INF, torch.finfo(torch.float32).min):
        logits = torch.full((1, width), value)
        for column, expected in ((0, 1), (width - 1, 0)):
            _, stats = masked_cross_entropy(logits, torch.tensor([column]), return_stats=True)
            assert stats.correct == expected


def test_predictions_of_rows_that_are_not_finite(device: str) -> None:
    for row, target, expected in predictions():
        found = torch.tensor([target], device=device)
        _, stats = masked_cross_entropy(row[None].to(device), found, return_stats=True)
        assert stats.correct == expected, (row, target)


def test_statistics_do_not_change_the_loss(device: str) -> None:
    """To the bit; on a GPU, where other kernels take them, to the rounding."""
    rtol = 0 if device == "cpu" else 1e-14
    logits, target = problem(4, 3)
    for reduction in REDUCTIONS:
        loss, _ = masked_cross_entropy(logits, target, reduction=reduction, return_stats=True)
        expected = masked_cross_entropy(logits, target, reduction=reduction)
        torch.testing.assert_close(loss, expected, rtol=rtol, atol=rtol)
