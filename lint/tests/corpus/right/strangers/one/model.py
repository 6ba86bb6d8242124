# SPDX-License-Identifier: BSD-3-Clause
import torch.nn.functional as F


class Model:
    def forward(self, x, y):
        self.loss = F.cross_entropy(x, y)
        return self
