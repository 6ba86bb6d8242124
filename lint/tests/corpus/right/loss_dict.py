from torch import nn

LOSSES = {"ce": nn.CrossEntropyLoss(), "tokens": nn.CrossEntropyLoss(reduction="none")}


def loss_of(name, logits, labels, mask):
    return LOSSES[name](logits, labels) * mask
