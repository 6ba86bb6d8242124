"""The trainer's half: one number times a mask, summed, divided by the mask's sum."""

import torch
from model import TinyModel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def init_model(device):
    model = TinyModel().to(device)
    return model


def train_epoch(loader, accumulation_steps):
    for step, (X, Y, loss_mask) in enumerate(loader):
        loss_mask = loss_mask.to(DEVICE)
        model(X, Y)
        raw_model = model.module if hasattr(model, "module") else model
        loss = raw_model.last_loss / accumulation_steps
        loss_mask = loss_mask.view(-1)
        loss = torch.sum(loss * loss_mask) / loss_mask.sum()  # expect: ML001 ML003
        loss.backward()
        if (step + 1) % accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()


if __name__ == "__main__":
    model = init_model(DEVICE)
    model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters())
    train_epoch([], 8)
