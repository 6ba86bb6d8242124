# SPDX-License-Identifier: BSD-3-Clause
"""Criteria out of a dictionary, by name, as a default argument, as an argument."""

from torch import nn

CRITERIA = {"ce": nn.CrossEntropyLoss, "mse": nn.MSELoss}


def by_dictionary(name, x, y, mask):
    criterion = CRITERIA[name]()
    return (criterion(x, y) * mask).sum()  # expect: ML001


def by_name(args, x, y, mask):
    criterion = getattr(nn, args.loss_name)()
    return (criterion(x, y) * mask).sum()  # expect: ML001


def by_default(x, y, mask, loss_fn=nn.MSELoss()):  # noqa: B008
    return (loss_fn(x, y) * mask).sum()  # expect: ML001


def by_argument(x, y, mask, objective):
    return (objective(x, y) * mask).sum()  # expect: ML001


class Runner:
    def __init__(self, objective):
        self.objective = objective

    def step(self, x, y, mask):
        return self.objective(x, y) * mask  # expect: ML001


def main(x, y, mask):
    runner = Runner(nn.L1Loss())
    return by_argument(x, y, mask, nn.BCELoss()) + runner.step(x, y, mask)
