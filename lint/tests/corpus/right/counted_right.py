# SPDX-License-Identifier: BSD-3-Clause
import torch.nn.functional as F


def loss_of(logits, labels, pad_id):
    losses = F.cross_entropy(logits, labels, ignore_index=pad_id, reduction="none")
    return losses.sum() / (labels != pad_id).sum().clamp(min=1)


def selected(logits, labels, pad_id):
    losses = F.cross_entropy(logits, labels, ignore_index=pad_id, reduction="none")
    return losses[labels != pad_id].mean()


def by_masked_select(logits, labels, pad_id):
    losses = F.cross_entropy(logits, labels, ignore_index=pad_id, reduction="none")
    return losses.masked_select(labels.ne(pad_id)).mean()


def by_sequence(logits, labels, pad_id):
    losses = F.cross_entropy(logits, labels, ignore_index=pad_id, reduction="none")
    return losses.sum(1).mean()
