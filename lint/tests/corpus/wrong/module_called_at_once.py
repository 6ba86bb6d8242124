from torch import nn


def loss_of(logits, labels, valid_mask):
    return nn.CrossEntropyLoss(reduction="sum")(logits, labels) * valid_mask  # expect: ML001
