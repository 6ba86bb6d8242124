# SPDX-License-Identifier: BSD-3-Clause
"""A scalar that a mixture of experts adds does not make a loss per token of a mean."""

import torch.nn.functional as F


def loss_of(model, logits, labels, mask, out):
    loss = F.cross_entropy(logits, labels) + model.aux_loss
    first = (loss * mask).sum()  # expect: ML001
    loss = F.cross_entropy(logits, labels)
    loss += 0.01 * out["router_aux_loss"]
    loss = loss + aux_loss  # noqa: F821
    return first + (loss * mask).sum()  # expect: ML001
