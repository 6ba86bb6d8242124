import torch.nn.functional as F


def loss_of(logits, labels, mask):
    loss = F.cross_entropy(logits, labels, reduction="none").mean()
    return (loss * mask).sum()  # expect: ML001
