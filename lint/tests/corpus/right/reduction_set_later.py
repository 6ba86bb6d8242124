from torch import nn


def loss_of(logits, labels, mask):
    criterion = nn.CrossEntropyLoss()
    criterion.reduction = "none"
    return (criterion(logits, labels) * mask).sum()
