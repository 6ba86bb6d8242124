import torch.nn.functional as F


class Trainer:
    def step(self, logits, labels, mask):
        losses = F.cross_entropy(logits, labels, reduction="none")
        loss = (losses * mask).sum() / mask.sum().clamp(min=1)
        (loss / self.args.accum_steps).backward()  # expect: ML004
