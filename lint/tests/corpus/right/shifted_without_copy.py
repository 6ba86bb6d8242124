import torch.nn.functional as F


def causal_loss(logits, labels):
    shifted = logits[:, :-1].transpose(1, 2)
    return F.cross_entropy(shifted, labels[:, 1:])
