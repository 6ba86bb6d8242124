# SPDX-License-Identifier: BSD-3-Clause
import torch
import torch.nn.functional as F


def clamped(logits, labels, mask):
    losses = F.cross_entropy(logits, labels, reduction="none")
    n = mask.sum()
    n.clamp_(min=1)
    return (losses * mask).sum() / n


def tested(logits, labels, mask):
    losses = F.cross_entropy(logits, labels, reduction="none")
    loss = (losses * mask).sum() / mask.sum()
    if loss != loss:
        loss = torch.zeros_like(loss)
    return loss
