# SPDX-License-Identifier: BSD-3-Clause
import torch


def early_exits(loss_fn, logits, labels, scales):
    losses = loss_fn(logits, labels).view(len(scales), -1)
    losses = losses.float().sum(-1) / (labels != -100).sum()
    return torch.sum(scales * losses)
