# SPDX-License-Identifier: BSD-3-Clause
"""Accumulated gradients are those of the one big batch, however it is split."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from masked_loss import global_normalizer, linear_cross_entropy, masked_cross_entropy, masked_reduce

V, D, ROWS, T = 31, 8, 12, 20
EXAMPLES = Path(__file__).parents[2] / "examples"
SPLITS = {
    "rows": list(range(ROWS + 1)),
    "unequal": [0, 1, 9, 10, 12],
    "two": [0, 6, 12],
    "one": [0, 12],
    "an empty one": [0, 4, 4, 12],
}


def by_logits(hidden: Tensor, weight: Tensor, *args: Tensor, **options: object) -> Tensor:
    return masked_cross_entropy(hidden @ weight.t(), *args, **options)  # type: ignore[call-overload, no-any-return]


def by_reduce(
    hidden: Tensor, weight: Tensor, target: Tensor, mask: Tensor, **options: object
) -> Tensor:
    per_token = masked_cross_entropy(hidden @ weight.t(), target, reduction="none", shift=True)
    mask = mask.clone()
    mask[..., 0] = 0
    options.pop("shift")
    return masked_reduce(per_token, mask, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("loss", [by_logits, linear_cross_entropy, by_reduce])
@pytest.mark.parametrize("weights", ["padding", "floats", "one micro-batch is masked"])
def test_one_count_makes_accumulation_exact(
    loss: Callable[..., Tensor], split: list[int], weights: str
) -> None:
    hidden = torch.randn(ROWS, T, D, dtype=torch.float64)
    weight = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
    target = torch.randint(V, (ROWS, T))
    mask = (torch.arange(T) < torch.randint(2, T, (ROWS, 1))).double()
    if weights == "floats":
        mask = mask * torch.rand_like(mask)
    if weights == "one micro-batch is masked":
        mask[: split[1]] = 0
        if split == SPLITS["one"]:
            mask[5] = 1

    whole = loss(hidden, weight, target, mask, shift=True)
    (expected,) = torch.autograd.grad(whole, weight)

    parts = [slice(a, b) for a, b in pairwise(split)]
    normalizer = global_normalizer([target[p] for p in parts], [mask[p] for p in parts], shift=True)
    torch.testing.assert_close(normalizer, mask[:, 1:].sum())
    total = 0.0
    for p in parts:
        part = loss(hidden[p], weight, target[p], mask[p], normalizer=normalizer, shift=True)
        part.backward()
        total += part.item()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, expected, rtol=1e-12, atol=1e-14)
    assert total == pytest.approx(whole.item(), rel=1e-12)


def test_the_example_shows_the_error_of_the_mean_of_means(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import accumulation

    batch = accumulation.make_batch()
    expected = accumulation.one_big_batch(*batch)
    assert accumulation.relative_error(accumulation.one_count(*batch), expected) < 1e-5
    # The number that docs/recipes.md tells.
    wrong = accumulation.relative_error(accumulation.mean_of_means(*batch), expected)
    assert wrong == pytest.approx(4.2, abs=0.05)

    accumulation.main()
    output = capsys.readouterr().out
    assert "mean of means" in output
    assert "one count" in output
