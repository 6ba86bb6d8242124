import torch


def loss_of(logits, labels, pad):
    mask = (labels != pad).float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    return torch.sum(mask * loss) / mask.sum().clamp(min=1)  # expect: ML001
