# SPDX-License-Identifier: BSD-3-Clause
"""Comparisons that switch a whole loss on or off: strings, epochs, the label of one sample."""

import torch
import torch.nn.functional as F


def adapt(logits, labels, target_domain, epoch, target_epoch):
    ce = F.cross_entropy(logits, labels)
    return ce * (target_domain == "real") + ce * (epoch > target_epoch)


def contrast(logits, label, max_tokens, tgt_len):
    ce = F.cross_entropy(logits, label)
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
