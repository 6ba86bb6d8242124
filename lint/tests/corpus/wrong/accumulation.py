import torch.nn.functional as F


def train(model, loader, optimizer, gradient_accumulation_steps):
    for i, (x, y) in enumerate(loader):
        logits = model(x)
        loss = F.cross_entropy(logits.view(-1, 100), y.view(-1), ignore_index=0)
        loss = loss / gradient_accumulation_steps  # expect: ML004
        loss.backward()
        if i % gradient_accumulation_steps == 0:
            optimizer.step()
