import torch
import torch.nn.functional as F


def attend(q, k, v, attention_mask, labels, head):
    scores = q @ k.transpose(-1, -2) + (1.0 - attention_mask) * -1e9
    hidden = torch.softmax(scores, -1) * attention_mask @ v
    return F.cross_entropy(head(hidden), labels)
