import masked_loss


def loss_of(logits, labels, mask, total):
    return masked_loss.masked_cross_entropy(logits, labels, mask, shift=True, normalizer=total)


def by_sequence(values, mask, weights):
    return (masked_loss.masked_reduce(values, mask, dim=-1) * weights).sum()


def with_statistics(logits, labels, mask):
    result = masked_loss.masked_cross_entropy(logits, labels, mask, return_stats=True)
    return (result * mask).sum()
