import torch.nn.functional as F


def loss_of(logits, labels, mask):
    losses = F.cross_entropy(logits, labels, reduction="none")
    mask = mask.view(-1).float()
    return (losses * mask).sum() / mask.sum()  # expect: ML003
