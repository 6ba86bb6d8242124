# SPDX-License-Identifier: BSD-3-Clause
"""A mask is not only multiplied."""

import torch
import torch.nn.functional as F


def filled(logits, labels, pad_mask):
    loss = F.cross_entropy(logits, labels)
    return loss.masked_fill(pad_mask, 0.0).sum()  # expect: ML001


def selected(logits, labels, mask):
    loss = F.cross_entropy(logits, labels)
    return torch.masked_select(loss, mask).mean()  # expect: ML001


def chosen(logits, labels):
    loss = F.cross_entropy(logits, labels)
    return torch.where(labels != -100, loss, torch.zeros_like(loss)).sum()  # expect: ML001


def indexed(logits, labels, mask):
    loss = F.cross_entropy(logits, labels)
    return loss[mask.bool()].mean()  # expect: ML001


def summed(logits, labels, mask):
    loss = F.cross_entropy(logits, labels)
    return torch.einsum("i,i->", loss, mask)  # expect: ML001


def spread(logits, labels, mask):
    loss = F.cross_entropy(logits, labels)
    first = (loss.expand_as(mask) * mask).sum()  # expect: ML001
    second = (loss.unsqueeze(-1) * mask).sum()  # expect: ML001
    return first + second + (loss.view_as(mask) * mask).sum()  # expect: ML001
