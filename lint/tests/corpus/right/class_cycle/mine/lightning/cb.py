# SPDX-License-Identifier: BSD-3-Clause
"""A class whose base is, by the names of the folders, itself."""

from torch import nn

from lightning.cb import Base as B  # noqa: N817


class Base(B):
    def step(self, x, y, mask):
        loss = self.criterion(x, y)
        return (loss * mask).sum()


class Other(Base):
    criterion = nn.CrossEntropyLoss(reduction="none")
