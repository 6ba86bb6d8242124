# SPDX-License-Identifier: BSD-3-Clause
"""0 / 0 is NaN whatever is averaged, over all dimensions or over one."""

import torch


def advantage(values, response_mask):
    return (values * response_mask).sum() / response_mask.sum()  # expect: ML003


def by_row(logp, loss_mask):
    return (logp * loss_mask).sum(-1) / loss_mask.sum(-1)  # expect: ML003


def written_out(logp, mask):
    return torch.div(torch.sum(logp * mask), torch.sum(mask))  # expect: ML003


def of_pairs(scores):
    pair_mask = 1 - torch.eye(scores.shape[0])
    return (scores * pair_mask).sum() / pair_mask.sum()  # expect: ML003
