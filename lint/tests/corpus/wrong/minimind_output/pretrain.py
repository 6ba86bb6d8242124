# SPDX-License-Identifier: BSD-3-Clause
import torch
from model import SmallModel
from settings import settings


def train_epoch(loader, accumulation_steps):
    for _step, (X, Y, loss_mask) in enumerate(loader):
        X, Y, loss_mask = X.to("cuda"), Y.to("cuda"), loss_mask.to("cuda")
        with torch.autocast("cuda"):
            out = model(X, Y)
            loss = out.last_loss / accumulation_steps  # expect: ML004
            loss_mask = loss_mask.view(-1)
            loss = torch.sum(loss * loss_mask) / loss_mask.sum()  # expect: ML001 ML003
        scaler.scale(loss).backward()


def init_model():
    model = SmallModel(settings).to("cuda")
    return model


if __name__ == "__main__":
    model = init_model()
    model = torch.nn.parallel.DistributedDataParallel(model, device_ids=[0])
    scaler = torch.amp.GradScaler()
    train_epoch([], 8)
