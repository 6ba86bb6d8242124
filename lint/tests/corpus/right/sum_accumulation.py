import torch.nn.functional as F


def train(model, batches, accumulation_steps):
    tokens = sum((batch["labels"] != -100).sum() for batch in batches)
    for batch in batches:
        logits = model(batch["ids"])
        loss = F.cross_entropy(logits, batch["labels"], ignore_index=-100, reduction="sum")
        (loss / tokens).backward()
    return loss / accumulation_steps
