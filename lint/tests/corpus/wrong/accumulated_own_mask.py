# SPDX-License-Identifier: BSD-3-Clause
"""A mean over the mask of masked_loss itself, which differs from micro-batch to micro-batch."""

import torch
import torch.nn.functional as F

import masked_loss
from masked_loss import masked_cross_entropy


def train(model, batches, accum_steps):
    criterion = masked_loss.MaskedCrossEntropyLoss()
    for ids, labels, mask in batches:
        x = model(ids)
        first = masked_cross_entropy(x, labels, mask) / accum_steps  # expect: ML004
        second = masked_loss.cross_entropy(x, labels, mask=mask) / accum_steps  # expect: ML004
        third = criterion(x, labels, mask) / accum_steps  # expect: ML004
        values = F.cross_entropy(x, labels, reduction="none")
        fourth = masked_loss.masked_reduce(values, mask) / accum_steps  # expect: ML004
        fifth = masked_loss.masked_mean(values, mask) * (1 / accum_steps)  # expect: ML004
        sixth = (1.0 / accum_steps) * criterion(x, labels, mask=mask)  # expect: ML004
        seventh = torch.ops.masked_loss.cross_entropy(x, labels, mask)
        seventh /= accum_steps  # expect: ML004
        (first + second + third + fourth + fifth + sixth + seventh).backward()
