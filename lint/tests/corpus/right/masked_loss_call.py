import masked_loss


def loss_of(logits, labels, mask, total):
    return masked_loss.masked_cross_entropy(logits, labels, mask, shift=True, normalizer=total)
