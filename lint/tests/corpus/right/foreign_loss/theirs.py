# SPDX-License-Identifier: BSD-3-Clause
"""Objects of other libraries, whose .loss holds what they like."""

import torch
import trackers
from diffusion import Scheduler, load_scheduler
from peft import LoraConfig, get_peft_model
from transformers import AutoModel


def step(batch, mask):
    scheduler = Scheduler(steps=1000)
    terms = scheduler.training_losses(batch)
    a = (scheduler.loss * mask).sum() + (terms.loss * mask).sum()
    b = (load_scheduler("ddpm").loss * mask).sum()
    with trackers.Tracker() as tracker:
        return a + b + (tracker.loss * mask).sum()


def adapted(batch, options, mask):
    model = AutoModel.from_pretrained("small", **options, **batch).to("cuda")
    model = torch.compile(get_peft_model(model, LoraConfig()))
    return (model(**batch).loss * mask).sum()


class Trainer:
    def __init__(self, name):
        self.backbone = AutoModel.from_pretrained(name)

    def step(self, batch, mask):
        out = self.backbone(**batch)
        return (out.loss * mask).sum()
