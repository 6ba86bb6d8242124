import torch.distributed as dist
import torch.nn.functional as F


def loss_of(logits, labels, mask, world_size):
    losses = F.cross_entropy(logits, labels, reduction="none")
    total = mask.sum().clone().float() + 0
    dist.all_reduce(total)
    return (losses * mask).sum() * world_size / total
