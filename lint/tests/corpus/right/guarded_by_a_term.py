# SPDX-License-Identifier: BSD-3-Clause
import torch


def masked_mean(mask, value, dim, eps: float = 1e-4):
    return torch.sum(mask * value, dim=dim) / (eps + torch.sum(mask, dim=dim))


def by_length(logits, mask, penalty):
    return (logits * mask).sum(1) / mask.sum(1) ** penalty
