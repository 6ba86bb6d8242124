# SPDX-License-Identifier: BSD-3-Clause
import torch.nn.functional as F


class Classifier:
    def __call__(self, x, y):
        self.loss = F.cross_entropy(self.head(x), y)
        return self
