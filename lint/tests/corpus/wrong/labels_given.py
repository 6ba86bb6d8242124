# SPDX-License-Identifier: BSD-3-Clause
"""A model of transformers that is given labels returns their mean."""

import torch
from transformers import AutoModelForCausalLM, Trainer


def by_attribute(model, ids, mask):
    outputs = model(input_ids=ids, labels=ids)
    return (outputs.loss * mask).sum()  # expect: ML001


def by_key(ids, sample_weights):
    model = AutoModelForCausalLM.from_pretrained("small")
    loss = model(input_ids=ids, labels=ids)["loss"]
    return (loss * sample_weights).mean()  # expect: ML001


def by_position(model, batch, loss_mask):
    loss = model(batch["ids"], labels=batch["ids"])[0]
    return torch.sum(loss * loss_mask) / loss_mask.sum().clamp(min=1)  # expect: ML001


class WeightedTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False):
        weights = inputs.pop("weights")
        loss = super().compute_loss(model, inputs)
        return (loss * weights).mean()  # expect: ML001

    def both(self, model, inputs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        return loss * inputs["loss_mask"], outputs  # expect: ML001
