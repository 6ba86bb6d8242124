import torch.nn.functional as F


def loss_of(logits, labels, mask, smooth):
    if smooth:
        loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
    else:
        loss = F.cross_entropy(logits, labels)
    return loss * mask  # expect: ML001
