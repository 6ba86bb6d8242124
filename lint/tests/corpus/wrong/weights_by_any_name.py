# SPDX-License-Identifier: BSD-3-Clause
"""Where a product is summed or averaged, what was not a number was meant to have many elements."""

import torch
import torch.nn.functional as F
from torch import nn

criterion = nn.CrossEntropyLoss()


def importance(q, target, is_weights):
    return (F.mse_loss(q, target) * is_weights).mean()  # expect: ML001


def from_loader(net, loader):
    for x, y, batch_weights in loader:
        loss = criterion(net(x), y)
        loss = loss * batch_weights  # expect: ML001
        loss = loss.mean()
        loss.backward()


def per_class(logits, labels, class_weights, weight_map):
    loss = criterion(logits, labels)
    first = torch.mean(loss * weight_map)  # expect: ML001
    return first + (class_weights[labels] * loss).sum()  # expect: ML001


def by_length(logits, labels, lengths):
    loss = criterion(logits, labels)
    return (loss * lengths).sum() / lengths.sum()  # expect: ML001


def by_another_loss(logits, labels, other):
    uncertain = F.cross_entropy(other, labels, reduction="none")
    return (criterion(logits, labels) * uncertain).mean()  # expect: ML001


def guarded(logits, labels, keep):
    loss = criterion(logits, labels)
    return (loss * keep).sum() / keep.sum().clamp(min=1)  # expect: ML001


def focal(logits, labels, alpha_t):
    ce = F.cross_entropy(logits, labels)
    pt = torch.exp(-ce)
    return (alpha_t[labels] * (1 - pt) ** 2 * ce).mean()  # expect: ML001
