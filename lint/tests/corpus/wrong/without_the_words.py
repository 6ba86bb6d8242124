# SPDX-License-Identifier: BSD-3-Clause
"""Functions that use a loss under a name of their own, and lambdas that nobody calls here."""

from torch import nn
from torch.nn.functional import cross_entropy as ce

crit = nn.CrossEntropyLoss()


def by_alias(x, y, keep):
    return (ce(x, y) * keep).sum() / keep.sum()  # expect: ML001 ML003


def by_module(x, y, keep):
    return (crit(x, y) * keep).sum() / keep.sum()  # expect: ML001 ML003


def objective(x, y):
    return nn.functional.cross_entropy(x, y)


def by_helper(x, y, keep):
    return (objective(x, y) * keep).sum() / keep.sum()  # expect: ML001 ML003


class Step:
    def __init__(self):
        self.crit = nn.CrossEntropyLoss()

    def by_member(self, x, y, keep):
        return (self.crit(x, y) * keep).sum() / keep.sum()  # expect: ML001 ML003


by_lambda = lambda x, y, mask: (ce(x, y) * mask).sum()  # noqa: E731  # expect: ML001


def make():
    return lambda x, y, mask: (ce(x, y) * mask).sum()  # expect: ML001


TABLE = {"ce": lambda x, y, mask: ce(x, y) * mask}  # expect: ML001
