"""Micro-batches of images have equal sizes: the mean of means is the mean."""

import torch.nn.functional as F


def train(model, loader, accumulation_steps):
    for images, labels in loader:
        loss = F.cross_entropy(model(images), labels) / accumulation_steps
        loss.backward()
