import torch.nn.functional as F


def loss_of(logits, labels, mask_logits, masks, mask_weight=2.0):
    loss_cls = F.cross_entropy(logits, labels)
    loss_mask = F.binary_cross_entropy_with_logits(mask_logits, masks)
    return loss_cls * 0.5 + loss_mask * mask_weight


def by_size(logits, labels):
    loss = F.binary_cross_entropy_with_logits(logits, labels)
    return (loss * labels.size(1)).mean() + (loss * labels.shape[0]).mean()


def by_task(outputs, task_weights):
    total = 0
    for key, (output, label) in outputs.items():
        loss = F.cross_entropy(output, label) * task_weights[key]
        total += loss.mean()
    return total
