import torch.nn.functional as F


def causal_loss(logits, ids):
    return F.cross_entropy(
        logits[:, :-1].contiguous().view(-1, logits.size(-1)),  # expect: ML005
        ids[:, 1:].reshape(-1),
    )
