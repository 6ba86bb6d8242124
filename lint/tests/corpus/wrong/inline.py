import torch.nn.functional as F


def loss_of(logits, labels, mask):
    loss = F.cross_entropy(logits.transpose(1, 2), labels)
    return (loss * mask).mean()  # expect: ML001
