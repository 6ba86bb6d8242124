# SPDX-License-Identifier: BSD-3-Clause
"""Loss modules in a ModuleDict, and losses that are summed as they are generated."""

import torch.nn.functional as F
from torch import nn


class Tasks(nn.Module):
    def __init__(self):
        super().__init__()
        self.losses = nn.ModuleDict({"ce": nn.CrossEntropyLoss(), "mse": nn.MSELoss()})

    def forward(self, x, y, mask):
        return (self.losses["ce"](x, y) * mask).sum()  # expect: ML001


def over_heads(heads, labels, mask):
    loss = sum(F.cross_entropy(logits, labels) for logits in heads)
    first = (loss * mask).sum()  # expect: ML001
    losses = [F.cross_entropy(logits, labels) for logits in heads]
    return first + (sum(losses) / len(losses) * mask).sum()  # expect: ML001
