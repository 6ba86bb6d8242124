# SPDX-License-Identifier: BSD-3-Clause
import masked_loss


def train(model, batches, accum_steps):
    for ids, labels in batches:
        loss = masked_loss.masked_cross_entropy(model(ids), labels, None) / accum_steps
        loss = loss + masked_loss.masked_cross_entropy(model(ids), labels) * (1 / accum_steps)
        loss.backward()
