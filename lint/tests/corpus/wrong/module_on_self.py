from torch import nn


class Trainer:
    def __init__(self, model):
        self.model = model
        self.criterion = nn.CrossEntropyLoss()

    def step(self, batch):
        logits = self.model(batch["input_ids"])
        loss = self.criterion(logits.view(-1, logits.size(-1)), batch["labels"].view(-1))
        loss = loss * batch["loss_mask"].view(-1)  # expect: ML001
        return loss.sum() / batch["loss_mask"].sum().clamp(min=1)
