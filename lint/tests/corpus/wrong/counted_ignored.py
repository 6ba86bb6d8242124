# SPDX-License-Identifier: BSD-3-Clause
"""reduction="none" gives 0 for an ignored target, and .mean() counts it."""

import torch.nn.functional as F
from torch import nn


def loss_of(logits, labels, pad_id):
    losses = F.cross_entropy(logits, labels, ignore_index=pad_id, reduction="none")
    return losses.mean()  # expect: ML006


class Criterion(nn.Module):
    def __init__(self):
        super().__init__()
        self.ce = nn.CrossEntropyLoss(ignore_index=0, reduction="none")

    def forward(self, logits, labels):
        return self.ce(logits, labels).mean()  # expect: ML006
