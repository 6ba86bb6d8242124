"""The model's half of MiniMind's case, written anew: the loss is reduced here."""

import torch.nn.functional as F
from torch import nn


class TinyModel(nn.Module):
    last_loss = None

    def __init__(self, vocab=6400, dim=512):
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.output = nn.Linear(dim, vocab, bias=False)

    def forward(self, tokens, targets=None):
        logits = self.output(self.embed(tokens))
        if targets is not None:
            self.last_loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))
        else:
            self.last_loss = None
        return logits
