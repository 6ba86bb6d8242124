import torch
from torch import nn

loss_fct = nn.CrossEntropyLoss(reduction="none")


def loss_of(logits, labels, mask):
    losses = loss_fct(logits, labels)
    count = torch.sum(mask)
    if mask is not None:
        losses = losses * mask
    return losses.sum() / count  # expect: ML003
