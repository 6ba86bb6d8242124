# SPDX-License-Identifier: BSD-3-Clause
"""A library wraps the model: what comes out is still the model's."""

from accelerate import Accelerator


def training_step(model, hidden, labels, loss_mask):
    accelerator = Accelerator()
    model = accelerator.prepare_model(model)
    out = model(hidden, labels)
    return (out.loss * loss_mask).sum()  # expect: ML001
