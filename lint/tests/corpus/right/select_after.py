import torch.nn.functional as F


def loss_of(logits, labels, mask):
    losses = F.cross_entropy(logits, labels, reduction="none")
    return losses[mask].mean()
