import torch.nn.functional as F


def loss_of(logits, labels, mask):
    labels = labels * mask - 100 * (1 - mask)
    return F.cross_entropy(logits, labels)
