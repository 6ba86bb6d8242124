from torch import nn


def causal_loss(logits, labels, vocab_size):
    shift_logits = logits[..., :-1, :].contiguous()  # expect: ML005
    shift_labels = labels[..., 1:].contiguous()
    loss_fct = nn.CrossEntropyLoss()
    shift_logits = shift_logits.view(-1, vocab_size)
    return loss_fct(shift_logits, shift_labels.view(-1))
