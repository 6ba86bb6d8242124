# SPDX-License-Identifier: BSD-3-Clause
"""Comparisons that switch a whole loss on or off: strings, epochs, the label of one sample."""

import random

import numpy as np
import torch
import torch.nn.functional as F


def adapt(logits, labels, target_domain, epoch, target_epoch):
    ce = F.cross_entropy(logits, labels)
    return ce * (target_domain == "real") + ce * (epoch > target_epoch)


def contrast(logits, label, max_tokens, tgt_len):
    ce = F.cross_entropy(logits, label)
    tokens_seen = max_tokens * 2
    ce = ce * (tokens_seen > 10)
    return ce * (label == 1) + ce * (max_tokens > 5) + ce * label.eq(1) + ce * (tgt_len > 0)


def warm_up(logits, labels, step, cfg, global_step):
    loss = F.cross_entropy(logits, labels)
    mask = torch.tensor(float(step > 100))
    late_mask = global_step >= cfg.warmup
    mask_now = torch.as_tensor(step > 100, dtype=torch.float32)
    return loss * mask + loss * late_mask + loss * mask_now


def configured(logits, labels, cfg):
    loss = F.cross_entropy(logits, labels)
    mask = cfg.mask_coef
    return loss * mask


def with_a_default(logits, labels, mask=1.0):
    return F.cross_entropy(logits, labels) * mask


def switched(logits, labels, args, epoch, epochs):
    loss = F.cross_entropy(logits, labels)
    mask = torch.ones(1)
    total = loss * mask
    mask = getattr(args, "mask_coef", 1.0)
    total = total + loss * mask
    mask = torch.tensor(args.train_on_masked, dtype=torch.float)
    total = total + loss * mask
    mask = (torch.rand(()) < 0.1).float()
    total = total + loss * mask
    mask = random.random() > 0.5
    total = total + loss * mask
    mask = np.exp(-epoch / epochs)
    total = total + loss * mask
    mask = 1 - epoch / epochs
    return total + loss * mask
