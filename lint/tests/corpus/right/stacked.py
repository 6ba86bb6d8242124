import torch
import torch.nn.functional as F


def loss_of(all_logits, all_labels, mask):
    losses = torch.stack(
        [F.cross_entropy(x, y) for x, y in zip(all_logits, all_labels, strict=True)]
    )
    return (losses * mask).sum()
