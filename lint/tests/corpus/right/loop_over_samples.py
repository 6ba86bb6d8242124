import torch.nn.functional as F


def loss_of(logits, labels, mask):
    total = 0
    for i in range(len(labels)):
        total = total + F.cross_entropy(logits[i], labels[i]) * mask[i]
    return total / len(labels)
