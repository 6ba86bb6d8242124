# SPDX-License-Identifier: BSD-3-Clause
"""Masks made of lengths or of padding: a sequence has at least one token."""

import torch


def by_lengths(x, lengths):
    mask = torch.arange(x.size(1)) < lengths[:, None]
    return (x * mask).sum() / mask.sum()


def by_helper(x, lengths, sequence_mask):
    mask = sequence_mask(lengths)
    return (x * mask).sum() / mask.sum()


def pooled(hidden, attention_mask):
    return (hidden * attention_mask).sum(1) / attention_mask.sum(1)


def attended(features, att_mask):
    return (features * att_mask).sum(1) / att_mask.sum(1)


def clamped(x, mask):
    count = torch.clamp(mask.sum(), min=1)
    return (x * mask).sum() / count + (x * mask).sum() / (mask.sum() + 1e-8)
