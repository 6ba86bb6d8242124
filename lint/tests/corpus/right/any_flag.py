import torch.nn.functional as F


def loss_of(logits, labels, mask):
    """Switches the whole loss off when nothing is left."""
    loss = F.cross_entropy(logits, labels, ignore_index=-100)
    return loss * mask.any() + loss * (mask.sum() > 0).float()
