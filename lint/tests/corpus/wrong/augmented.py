from torch.nn.functional import cross_entropy as ce


def loss_of(logits, labels, mask):
    loss = ce(logits, labels)
    loss *= mask  # expect: ML001
    return loss.sum()
