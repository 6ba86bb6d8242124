import torch
import torch.nn.functional as F


def loss_of(logits, labels, mask):
    losses = F.cross_entropy(logits, labels, reduction="none")
    count = mask.sum()
    if count == 0:
        return logits.new_zeros(())
    mean = (losses * mask).sum() / count
    return torch.nan_to_num(mean)
