import torch
import torch.nn.functional as F


def two_ways(logits, labels, mask):
    first = F.nll_loss(logits.log_softmax(-1), labels).mul(mask)  # expect: ML001
    second = torch.mul(mask.float(), F.cross_entropy(logits, labels))  # expect: ML001
    return first.sum() + second.sum()
