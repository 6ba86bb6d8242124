from torch import nn


class Decoder:
    def __init__(self, pad):
        self.criterion = nn.CrossEntropyLoss(ignore_index=pad)

    def loss(self, outputs, targets):
        loss = 0
        for t, output in enumerate(outputs):
            loss = loss + self.criterion(output, targets[:, t])
        return loss / len(outputs)
