import torch.nn.functional as F
from torch import nn


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, x, y):
        logits = self.head(x)
        return {"logits": logits, "loss": F.cross_entropy(logits, y)}
