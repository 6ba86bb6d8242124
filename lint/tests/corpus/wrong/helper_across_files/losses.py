import torch.nn.functional as F


def lm_loss(logits, labels):
    shifted = logits[:, :-1]
    return F.cross_entropy(shifted.reshape(-1, shifted.size(-1)), labels[:, 1:].reshape(-1))


def masked_mean(values, mask):
    return (values * mask).sum() / mask.sum().clamp(min=1)  # expect: ML001
