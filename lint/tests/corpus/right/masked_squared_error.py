"""A masked autoencoder: its masks are drawn with a fixed ratio and never empty."""


def loss_of(prediction, target, mask):
    loss = (prediction - target) ** 2
    loss = loss.mean(dim=-1)
    return (loss * mask).sum() / mask.sum()
