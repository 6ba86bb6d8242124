# SPDX-License-Identifier: BSD-3-Clause
import torch.nn.functional as F


class Result:
    pass


class Tagger:
    def run(self, x, y):
        result = Result()
        result.token_loss = F.cross_entropy(self.head(x), y)
        return result
