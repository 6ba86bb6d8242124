import torch.nn.functional as F
from torch import nn


class TinyModel(nn.Module):
    def forward(self, tokens, targets):
        logits = self.output(self.embed(tokens))
        self.last_loss = F.cross_entropy(
            logits.view(-1, logits.size(-1)), targets.view(-1), reduction="none"
        )
        return logits
