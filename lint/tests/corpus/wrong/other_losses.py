# SPDX-License-Identifier: BSD-3-Clause
import torch
import torch.nn.functional as F
from torch import nn

ctc = nn.CTCLoss(blank=0, zero_infinity=True)


def speech(log_probs, targets, sizes, target_sizes, utterance_mask):
    return ctc(log_probs, targets, sizes, target_sizes) * utterance_mask  # expect: ML001


def regression(mean, target, variance, mask):
    return (F.gaussian_nll_loss(mean, target, variance) * mask).sum()  # expect: ML001


def own_mean(prediction, target, mask):
    loss = ((prediction - target) ** 2).mean()
    return (loss * mask).sum() / mask.sum().clamp(min=1)  # expect: ML001


def own_likelihood(log_probs, actions, mask):
    nll = -log_probs.gather(-1, actions).squeeze(-1)
    loss = torch.mean(nll)
    return (loss * mask).sum()  # expect: ML001


def l2_loss(prediction, target):
    return (prediction - target).pow(2).mean()


def by_helper(prediction, target, mask):
    return (l2_loss(prediction, target) * mask).sum()  # expect: ML001
