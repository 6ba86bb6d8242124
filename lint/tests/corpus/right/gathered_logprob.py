import torch


def policy_loss(logits, actions, advantages, mask):
    logp = torch.gather(logits.log_softmax(-1), -1, actions.unsqueeze(-1)).squeeze(-1)
    return -(logp * advantages * mask).sum() / mask.sum().clamp(min=1)
