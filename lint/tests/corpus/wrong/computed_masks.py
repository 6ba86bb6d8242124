# SPDX-License-Identifier: BSD-3-Clause
"""Comparisons that do make a mask, and masks that are taken apart without becoming one number."""

import torch
import torch.nn.functional as F


def by_padding(logits, ids, tgt, pad_idx, lengths):
    loss = F.cross_entropy(logits, ids)
    first = loss * (ids != pad_idx)  # expect: ML001
    second = loss * (tgt != pad_idx).float()  # expect: ML001
    third = loss * (tgt != -100)  # expect: ML001
    mask = torch.arange(ids.size(1)) < lengths[:, None]
    fourth = loss * mask  # expect: ML001
    return first + second + third + fourth


def by_default(logits, labels, tgt, pad=0, ignore_index=-100):
    loss = F.cross_entropy(logits, labels)
    return loss * (labels != pad) + loss * (ignore_index != tgt)  # expect: ML001


def by_name(logits, labels, batch, x):
    loss = F.cross_entropy(logits, labels)
    mask = batch[2]
    a = loss * mask  # expect: ML001
    mask = batch["mask"][:, 1:]
    b = loss * mask  # expect: ML001
    mask = x > 0
    c = loss * mask  # expect: ML001
    return a + b + c
