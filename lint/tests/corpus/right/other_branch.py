import torch.nn.functional as F


def loss_of(logits, labels, mask=None):
    if mask is None:
        loss = F.cross_entropy(logits, labels)
    else:
        loss = F.cross_entropy(logits, labels, reduction="none")
    if mask is not None:
        loss = loss * mask
    return loss.mean()
