import torch.nn.functional as F


def loss_of(logits, labels, mask=None):
    reduction = "mean" if mask is None else "none"
    loss = F.cross_entropy(logits, labels, reduction=reduction)
    if mask is not None:
        loss = (loss * mask).sum() / mask.sum().clamp(min=1)
    return loss
