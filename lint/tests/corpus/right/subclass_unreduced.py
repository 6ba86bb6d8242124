from torch import nn


class MaskedCrossEntropy(nn.CrossEntropyLoss):
    def __init__(self, **options):
        super().__init__(reduction="none", **options)

    def forward(self, input, target, mask):
        return (super().forward(input, target) * mask).sum()
