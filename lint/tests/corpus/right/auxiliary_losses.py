# SPDX-License-Identifier: BSD-3-Clause
import torch.nn.functional as F


def loss_of(model, logits, labels, mask, token_loss, kl_loss):
    losses = F.cross_entropy(logits, labels, reduction="none") + model.aux_loss
    per_token = F.cross_entropy(logits, labels) + token_loss
    with_kl = F.cross_entropy(logits, labels) + kl_loss
    return (losses * mask).sum() + (per_token * mask).sum() + (with_kl * mask).sum()
