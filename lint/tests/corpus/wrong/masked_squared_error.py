"""Whatever the loss is, a mask without a token divides 0 by 0."""


def loss_of(prediction, target, mask):
    loss = (prediction - target) ** 2
    loss = loss.mean(dim=-1)
    return (loss * mask).sum() / mask.sum()  # expect: ML003
