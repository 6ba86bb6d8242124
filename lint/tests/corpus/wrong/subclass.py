from torch import nn


class MaskedCrossEntropy(nn.CrossEntropyLoss):
    """Inherits the default reduction, and means to mask."""

    def forward(self, input, target, mask=None):
        loss = super().forward(input, target)
        if mask is not None:
            loss = loss * mask  # expect: ML001
        return loss


criterion = MaskedCrossEntropy(ignore_index=0)
