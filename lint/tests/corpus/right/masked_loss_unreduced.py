import masked_loss


def loss_of(logits, labels, mask, advantage):
    losses = masked_loss.masked_cross_entropy(logits, labels, mask, reduction="none")
    return (losses * advantage * mask).sum()
