# SPDX-License-Identifier: BSD-3-Clause
"""Losses of masked_loss that are one number already."""

import masked_loss


def without_statistics(logits, labels, mask):
    loss = masked_loss.masked_cross_entropy(logits, labels, return_stats=False)
    return (loss * mask).sum()  # expect: ML001


def by_sequence_mean(logits, labels, mask):
    loss = masked_loss.masked_cross_entropy(logits, labels, reduction="sequence_mean")
    return (loss * mask).sum()  # expect: ML001


def with_statistics(logits, labels, mask):
    loss, stats = masked_loss.masked_cross_entropy(logits, labels, return_stats=True)
    return (loss * mask).sum(), stats  # expect: ML001


def from_a_teacher(logits, teacher_logits, mask):
    criterion = masked_loss.MaskedDivergenceLoss()
    return (criterion(logits, teacher_logits) * mask).sum()  # expect: ML001
