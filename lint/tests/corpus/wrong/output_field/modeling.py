from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class Output:
    loss: torch.Tensor
    logits: torch.Tensor


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.lm_head = nn.Linear(64, 100)
        self.loss_fn = nn.CrossEntropyLoss(ignore_index=-1)

    def forward(self, hidden, labels):
        logits = self.lm_head(hidden)
        loss = self.loss_fn(logits.view(-1, 100), labels.view(-1))
        return Output(loss=loss, logits=logits)
