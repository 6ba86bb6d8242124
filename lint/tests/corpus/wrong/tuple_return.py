import torch.nn.functional as F


class GPT:
    def __call__(self, idx, targets=None):
        logits = self.blocks(idx)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.view(-1, 50), targets.view(-1))


def evaluate(loader):
    model = GPT()
    for x, y, mask in loader:
        _, loss = model(x, y)
        yield (loss * mask).sum()  # expect: ML001
