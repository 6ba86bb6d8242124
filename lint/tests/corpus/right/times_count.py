import torch.nn.functional as F


def total(logits, labels, mask):
    """A mean back to a sum: the count of a mask is a number."""
    loss = F.cross_entropy(logits, labels)
    return loss * mask.sum(), loss * mask.float().mean(), loss * len(mask)
