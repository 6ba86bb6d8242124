import torch.nn.functional as F


def loss_of(all_logits, all_labels, masks):
    losses = [
        F.cross_entropy(x, y) * mask
        for x, y, mask in zip(all_logits, all_labels, masks, strict=True)
    ]
    for x, y, mask in zip(all_logits, all_labels, masks, strict=True):
        losses.append(F.cross_entropy(x, y) * mask)
    return sum(losses)
