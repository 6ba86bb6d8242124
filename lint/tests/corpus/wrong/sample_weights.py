import torch.nn.functional as F


def loss_of(logits, labels, sample_weights):
    loss = F.binary_cross_entropy_with_logits(logits, labels)
    weighted = loss * sample_weights  # expect: ML001
    return weighted.mean()
