# SPDX-License-Identifier: BSD-3-Clause
"""What was asked of others about packed sequences, as tests of this library."""

from __future__ import annotations

import torch

import masked_loss
from masked_loss import cu_seqlens

CLASSES = 7


def test_sample_mean_of_a_flattened_batch() -> None:
    """Liger-Kernel 329, unsloth 1216: [a, ..., g] and [x, y] flattened weigh 1/2 each, not 7/9."""
    logits, target = torch.randn(9, CLASSES), torch.randint(CLASSES, (9,))
    each = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    expected = (each[:7].mean() + each[7:].mean()) / 2
    bounds = cu_seqlens(position_ids=torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 1]]))
    ours = masked_loss.masked_cross_entropy(
        logits, target, reduction="sequence_mean", cu_seqlens=bounds
    )
    torch.testing.assert_close(ours, expected)


def test_weights_of_a_global_batch_of_packs() -> None:
    """LongAlign 8: each token 1 / N_i of its sequence's targets, then K / M over K devices."""
    segments = torch.tensor([1, 1, 1, 1, 2, 2, 3, 3])
    target = torch.tensor([-100, -100, -100, 1, -100, 2, -100, 3])
    logits = torch.randn(8, CLASSES)
    bounds = cu_seqlens(segment_ids=segments)
    each = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    weights = torch.tensor([0.0, 0, 0, 1, 0, 1, 0, 1])
    devices, sequences = 8, 40  # K and M: those of all devices
    expected = devices / sequences * (weights * each).sum()
    ours = masked_loss.masked_cross_entropy(
        logits, target, reduction="sequence_mean", cu_seqlens=bounds,
        normalizer=sequences / devices,
    )  # fmt: skip
    torch.testing.assert_close(ours, expected)
    assert masked_loss.global_normalizer(target, count="sequences", cu_seqlens=bounds) == 3


def test_per_sequence_sums_of_packed_segments() -> None:
    """tunix 1662: sums over segments of packed rows, whose padding is segment 0."""
    segments = torch.tensor([[1, 1, 2, 2, 2, 0], [1, 2, 2, 2, 3, 3]])
    log_ratio = torch.randn(2, 6)
    bounds = cu_seqlens(segment_ids=segments, max_sequences=8)
    ours = masked_loss.masked_reduce(
        log_ratio, segments != 0, reduction="sum", dim=-1, cu_seqlens=bounds
    )
    pieces = log_ratio.flatten().split([2, 3, 1, 1, 3, 2])
    expected = torch.stack([p.sum() for p in pieces] + 2 * [torch.tensor(0.0)])
    expected[2] = 0  # the padding
    torch.testing.assert_close(ours, expected)


def test_no_document_predicts_the_next() -> None:
    """torchtitan 4075, torchtune 1177: the last token of a document is not asked for the first of
    the next. They have labels that are shifted already; here the loss shifts."""
    tokens, bounds = torch.randint(CLASSES, (1, 12)), torch.tensor([0, 5, 6, 12])
    logits = torch.randn(1, 12, CLASSES)
    labels = torch.cat([tokens[:, 1:], torch.tensor([[-100]])], dim=1)
    labels[:, bounds[1:] - 1] = -100
    expected = torch.nn.functional.cross_entropy(logits[0], labels[0])
    ours = masked_loss.masked_cross_entropy(logits, tokens, shift=True, cu_seqlens=bounds)
    torch.testing.assert_close(ours, expected)
