import torch.nn.functional as F


def loss_of(logits, labels, mask, reduce=False, size_average=None):
    losses = F.cross_entropy(logits, labels, reduce=reduce, size_average=size_average)
    return (losses * mask).sum()
