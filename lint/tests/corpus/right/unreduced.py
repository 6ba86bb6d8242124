import torch.nn.functional as F


def loss_of(logits, labels, mask):
    loss = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return (loss * mask).sum() / mask.sum().clamp(min=1)
