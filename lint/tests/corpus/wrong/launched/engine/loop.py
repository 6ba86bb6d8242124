# SPDX-License-Identifier: BSD-3-Clause
class Loop:
    def __init__(self, net):
        self.net = net

    def fit(self):
        for x, y, loss_mask in self.batches():
            out = self.net.run(x, y)
            (out.token_loss * loss_mask).sum().backward()  # expect: ML001
