"""Nothing here is called a mask; dividing by its sum shows what it is."""

import torch.nn.functional as F


def loss_of(logits, labels, keep):
    loss = F.cross_entropy(logits, labels)
    return (loss * keep).sum() / keep.sum()  # expect: ML001 ML003
