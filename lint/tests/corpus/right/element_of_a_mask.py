# SPDX-License-Identifier: BSD-3-Clause
"""One loss per sample or time step, times that sample's element of the mask."""

import torch.nn.functional as F


def by_index(xs, ys, mask):
    total = 0
    for i in range(len(xs)):
        mask_i = mask[i]
        total += F.cross_entropy(xs[i], ys[i]) * mask_i
    return total


def by_step(steps, targets, mask):
    total = 0
    for t, logits in enumerate(steps):
        step_mask = mask[t].float()
        total = total + F.cross_entropy(logits, targets[t]) * step_mask
    return total


def by_iteration(xs, ys, masks):
    total = 0
    for i, mask in enumerate(masks):
        total += F.cross_entropy(xs[i], ys[i]) * mask
    for mask in masks:
        total += F.cross_entropy(xs, ys) * mask
    return total


def one(x, y, mask):
    return F.cross_entropy(x, y) * mask


def by_map(xs, ys, masks):
    return sum(map(one, xs, ys, masks)) + sum(
        map(lambda x, y, mask: F.cross_entropy(x, y) * mask, xs, ys, masks)
    )
