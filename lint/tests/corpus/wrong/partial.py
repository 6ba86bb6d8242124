from functools import partial

import torch.nn.functional as F

token_loss = partial(F.cross_entropy, ignore_index=0)


def loss_of(logits, labels, loss_mask):
    return token_loss(logits, labels) * loss_mask  # expect: ML001
