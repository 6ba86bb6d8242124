import torch.nn.functional as F


def loss_of(logits, labels, mask, alpha=0.5):
    loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
    loss = alpha * loss.float() / 2 + 1e-6
    return (loss.detach().clone() * ~mask).sum()  # expect: ML001
