import torch.nn.functional as F


def loss_of(logits, labels, mask_logits, masks, mask_weight=2.0):
    loss_cls = F.cross_entropy(logits, labels)
    loss_mask = F.binary_cross_entropy_with_logits(mask_logits, masks)
    return loss_cls * 0.5 + loss_mask * mask_weight
