import torch.nn.functional as F


def loss_of(logits, labels, mask):
    return F.cross_entropy(logits[mask], labels[mask])
