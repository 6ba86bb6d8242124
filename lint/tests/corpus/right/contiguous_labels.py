import torch.nn.functional as F


def loss_of(logits, labels, steps):
    """The copy is of the labels, and nothing is shifted in the logits."""
    return F.cross_entropy(logits.view(-1, 100), labels[:, 1:].contiguous().view(-1))
