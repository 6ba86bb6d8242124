import torch.nn.functional as F


def loss_of(logits, labels, mask):
    logits = logits * mask.unsqueeze(-1)
    return F.cross_entropy(logits.masked_fill(~mask.bool(), -1e4), labels)
