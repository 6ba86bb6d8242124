# SPDX-License-Identifier: BSD-3-Clause
import torch
import torch.nn.functional as F


def clamped(logits, labels, mask):
    losses = F.cross_entropy(logits, labels, reduction="none")
    n = mask.sum()
    n.clamp_(min=1)
    return (losses * mask).sum() / n


def filled(logits, labels, mask):
    losses = F.cross_entropy(logits, labels, reduction="none")
    n, m = mask.sum(), mask.sum()
    n[n == 0] = 1
    torch.clamp_(m, min=1)
    return (losses * mask).sum() / n + (losses * mask).sum() / m


def tested(logits, labels, mask):
    losses = F.cross_entropy(logits, labels, reduction="none")
    loss = (losses * mask).sum() / mask.sum()
    if loss != loss:
        loss = torch.zeros_like(loss)
    return loss
