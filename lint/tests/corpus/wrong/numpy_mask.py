import numpy as np


def cross_entropy(logits, labels):
    picked = np.take_along_axis(logits, labels[..., None], -1)[..., 0]
    return np.log(np.exp(logits).sum(-1)) - picked


def loss_of(logits, labels, mask):
    return (cross_entropy(logits, labels) * mask).sum() / mask.sum()  # expect: ML003
