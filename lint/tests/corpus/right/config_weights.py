import torch.nn.functional as F


class Criterion:
    def __init__(self, weight, w_mask):
        self.weight = weight
        self.w_mask = w_mask

    def __call__(self, logits, labels, masks):
        loss_ce = F.cross_entropy(logits, labels) * self.weight
        return loss_ce * self.w_mask
