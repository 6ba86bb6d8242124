# SPDX-License-Identifier: BSD-3-Clause
"""Divided by the count of the whole batch already, and then by the number of batches."""

import masked_loss


def train(model, batches, tokens, accumulation_steps):
    criterion = masked_loss.MaskedCrossEntropyLoss(ignore_index=0)
    for ids, labels, mask in batches:
        first = masked_loss.masked_cross_entropy(model(ids), labels, mask, normalizer=tokens)
        second = criterion(model(ids), labels, mask, normalizer=tokens)
        third = masked_loss.masked_cross_entropy(model(ids), labels, ignore_index=0, normalizer=1.0)
        ((first + second) / accumulation_steps + third / accumulation_steps).backward()
