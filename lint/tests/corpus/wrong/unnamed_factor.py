"""Nothing here is called a mask; dividing by its sum shows what it is."""

import torch.nn.functional as F


def loss_of(logits, labels, keep):
    loss = F.cross_entropy(logits, labels)
    return (loss * keep).sum() / keep.sum()  # expect: ML001 ML003


def by_class(logits, labels, weights):
    loss = F.cross_entropy(logits, labels)
    w = weights[labels]
    return (loss * w).sum() / w.sum()  # expect: ML001 ML003
