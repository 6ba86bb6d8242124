import torch.nn.functional as F


def masked_ce(logits, labels, mask=None, reduction="mean"):
    loss = F.cross_entropy(logits, labels, reduction="none")
    if mask is not None:
        loss = loss * mask
    if reduction == "mean":
        return loss.mean()
    if reduction == "sum":
        return loss.sum()
    return loss


def step(logits, labels, mask):
    return masked_ce(logits, labels, mask) + masked_ce(logits, labels, reduction="none") * mask
