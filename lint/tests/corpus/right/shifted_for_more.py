from torch import nn


def causal_loss(logits, labels, vocab_size):
    shift_logits = logits[..., :-1, :].contiguous()
    shift_labels = labels[..., 1:].contiguous()
    accuracy = (shift_logits.argmax(-1) == shift_labels).float().mean()
    loss = nn.CrossEntropyLoss()(shift_logits.view(-1, vocab_size), shift_labels.view(-1))
    return loss, accuracy
