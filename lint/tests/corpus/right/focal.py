import torch
import torch.nn.functional as F


def focal(logits, labels, mask, gamma=2.0):
    ce = F.cross_entropy(logits, labels, reduction="none")
    loss = (1 - torch.exp(-ce)) ** gamma * ce
    return (loss * mask).sum() / (mask.sum() + 1e-6)
