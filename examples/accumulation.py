# SPDX-License-Identifier: BSD-3-Clause
"""Gradient accumulation over micro-batches of unequal length, right and wrong.

A batch that does not fit is split into micro-batches whose gradients add up. What people write is
the mean of each micro-batch, divided by their number: a token then counts for more, the fewer
tokens its micro-batch has. The token count of the whole batch as `normalizer` makes the sum of the
gradients that of the one big batch.

    python examples/accumulation.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from masked_loss import global_normalizer, masked_cross_entropy

VOCAB, DIM, LONGEST = 500, 64, 128
LENGTHS = (128, 3, 40, 2)  # tokens in each micro-batch: answers are short, documents are long


def make_batch() -> tuple[list[Tensor], list[Tensor]]:
    """One sequence per micro-batch, padded to the longest, and the masks."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB, (len(LENGTHS), 1, LONGEST), generator=generator)
    masks = torch.arange(LONGEST) < torch.tensor(LENGTHS)[:, None, None]
    return list(tokens), list(masks)


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(VOCAB, DIM), nn.Linear(DIM, DIM), nn.Linear(DIM, VOCAB))


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def one_big_batch(tokens: list[Tensor], masks: list[Tensor]) -> Tensor:
    """What the others should reproduce."""
    model = make_model()
    ids, mask = torch.cat(tokens), torch.cat(masks)
    masked_cross_entropy(model(ids), ids, mask, shift=True).backward()
    return gradient(model)


def mean_of_means(tokens: list[Tensor], masks: list[Tensor]) -> Tensor:
    """What people write."""
    model = make_model()
    for ids, mask in zip(tokens, masks, strict=True):
        loss = masked_cross_entropy(model(ids), ids, mask, shift=True)
        (loss / len(tokens)).backward()
    return gradient(model)


def one_count(tokens: list[Tensor], masks: list[Tensor]) -> Tensor:
    """The count of the whole batch; with several ranks, of all their batches."""
    model = make_model()
    normalizer = global_normalizer(tokens, masks, shift=True)
    for ids, mask in zip(tokens, masks, strict=True):
        masked_cross_entropy(model(ids), ids, mask, normalizer=normalizer, shift=True).backward()
    return gradient(model)


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def main() -> None:
    batch = make_batch()
    expected = one_big_batch(*batch)
    print(f"micro-batches of {', '.join(map(str, LENGTHS))} tokens")
    print("error of the accumulated gradient against the one big batch")
    for name, way in (("mean of means", mean_of_means), ("one count", one_count)):
        print(f"{name:>16}  {relative_error(way(*batch), expected):.1e}")


if __name__ == "__main__":
    main()
