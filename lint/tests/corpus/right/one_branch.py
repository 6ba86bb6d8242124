import torch.nn.functional as F


def loss_of(logits, labels, mask=None):
    if mask is None:
        return F.cross_entropy(logits, labels)
    loss = F.cross_entropy(logits, labels, reduction="none")
    return (loss * mask).sum() / max(mask.sum(), 1)
