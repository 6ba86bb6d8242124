# SPDX-License-Identifier: BSD-3-Clause
"""linear_cross_entropy and linear_token_log_probs of a head whose rows are shared out to ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from shards import Ranks, flat
from torch import Tensor

from masked_loss import linear_cross_entropy, linear_token_log_probs
from masked_loss._op.linear_chunks import columns_of, dweight_dtype
from masked_loss.options import Chunking, Shards

V, D, SHAPE = 11, 6, (3, 5)
BOUNDS = ([0, V], [0, 0, 5, V], [0, 3, 4, 4, V])
Call = Callable[..., Any]

CROSS_ENTROPY: list[dict[str, Any]] = [
    {},
    {"reduction": "none", "softcap": 3.0, "temperature": 0.7},
    {"reduction": "sequence_mean", "shift": True, "label_smoothing": 0.2, "z_loss": 0.01},
    {"reduction": "sum", "class_weight": torch.linspace(0.5, 2, V), "label_smoothing": 0.1},
]
LOG_PROBS: list[dict[str, Any]] = [
    {},
    {"return_entropy": True, "softcap": 3.0, "temperature": 0.7, "shift": True},
]
LOSSES = [(linear_cross_entropy, {"return_stats": True, **o}) for o in CROSS_ENTROPY]
LOSSES += [(linear_token_log_probs, o) for o in LOG_PROBS]


def problem(dtype: torch.dtype) -> tuple[tuple[Tensor, ...], Tensor]:
    """hidden, weight, bias and mask; target."""
    random = torch.Generator().manual_seed(1)
    sizes = ((*SHAPE, D), (V, D), (V,))
    head = [torch.randn(s, generator=random, dtype=torch.float64).to(dtype) for s in sizes]
    mask = torch.rand(SHAPE, generator=random)
    mask = mask * (mask > 0.3)
    return (*head, mask), torch.randint(V, SHAPE, generator=random)


def run(function: Call, given: tuple[Tensor, ...], target: Tensor, **options: Any) -> list[Tensor]:
    """The results, and the gradients of hidden, weight, bias and, if it has one, mask."""
    hidden, weight, bias, mask = leaves = [x.clone().requires_grad_() for x in given]
    found = function(hidden, weight, target, mask, bias=bias, **options)
    found = flat(found)
    loss = sum((k + 1) * x.double().sum() for k, x in enumerate(found) if x.requires_grad)
    if function is linear_token_log_probs:
        leaves.pop()
    return [x.detach() for x in (*found, *torch.autograd.grad(loss, leaves))]


@pytest.mark.parametrize("chunk_tokens", [None, 4])
@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("k", range(len(LOSSES)))
def test_results_and_gradients(
    k: int, bounds: list[int], chunk_tokens: int | None, dtype: torch.dtype
) -> None:
    function, options = LOSSES[k]
    given, target = problem(dtype)
    options = {**options, "chunk_tokens": chunk_tokens}
    whole = run(function, given, target, **options)
    ranks = Ranks(bounds)

    def of_rank(rank: int, vocab: Any) -> list[Tensor]:
        return run(function, rows_of(given, bounds, rank), target, vocab=vocab, **options)

    each = ranks.run(of_rank)
    active = int((given[-1][:, 1:] if options.get("shift") else given[-1]).count_nonzero())
    chunks = -(-active // chunk_tokens) if chunk_tokens else 1
    once = options.get("reduction") == "none" or function is linear_token_log_probs
    assert ranks.exchanges == (1 if once else chunks) + 1  # and the sum of hidden's gradient
    # Whole words of three gradients and a mask's; what is before them are results.
    results = len(whole) - (3 if function is linear_token_log_probs else 4)
    for rank, found in enumerate(each):
        expected = list(whole)
        own = slice(bounds[rank], bounds[rank + 1])
        expected[results + 1 : results + 3] = whole[results + 1][own], whole[results + 2][own]
        for i, (x, y) in enumerate(zip(found, expected, strict=True)):
            assert x.dtype == y.dtype
            assert x.shape == y.shape
            # A rounding of each rank's part of hidden's gradient, and of their sum.
            eps = torch.finfo(x.dtype).eps if i != results else 4 * torch.finfo(x.dtype).eps
            scale = whole[i].abs().max().item()
            wide = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
            off = (x.double() - y.double()).abs().amax().item() if x.numel() else 0.0
            assert off <= 4 * max(eps, 8 * wide) * max(scale, 1e-3), (rank, i, off)
            alike = i <= results or i == results + 3
            assert not alike or torch.equal(x, each[0][i])  # the same bits on all ranks


def rows_of(given: tuple[Tensor, ...], bounds: list[int], rank: int) -> tuple[Tensor, ...]:
    hidden, weight, bias, mask = given
    own = slice(bounds[rank], bounds[rank + 1])
    return hidden, weight[own], bias[own], mask


def test_parts_of_the_gradient_of_hidden_add_up() -> None:
    """Where the caller adds them up: sequence parallelism scatters the sum."""
    bounds = [0, 3, V]
    given, target = problem(torch.float64)
    for function, results in ((linear_cross_entropy, 1), (linear_token_log_probs, 1)):
        whole = run(function, given, target)[results]
        ranks = Ranks(bounds)

        def of_rank(rank: int, vocab: Any, function: Call = function) -> list[Tensor]:
            part = Shards(str(rank), bounds, reduce_hidden=False)
            return run(function, rows_of(given, bounds, rank), target, vocab=part)

        each = ranks.run(of_rank)
        assert ranks.exchanges == 1
        torch.testing.assert_close(sum(found[results] for found in each), whole)


def test_without_gradients_all_chunks_are_one_exchange() -> None:
    given, target = problem(torch.float32)
    for function in (linear_cross_entropy, linear_token_log_probs):
        ranks = Ranks([0, 4, V])

        @torch.no_grad()
        def of_rank(rank: int, vocab: Any, function: Call = function) -> Tensor:
            hidden, weight, bias, mask = rows_of(given, [0, 4, V], rank)
            return function(hidden, weight, target, mask, bias=bias, vocab=vocab, chunk_tokens=2)

        hidden, weight, bias, mask = given
        expected = function(hidden, weight, target, mask, bias=bias)
        for found in ranks.run(of_rank):
            torch.testing.assert_close(found, expected)
        assert ranks.exchanges == 1


def test_all_ranks_take_equally_many_chunks() -> None:
    """Their size is counted by the widest shard, not by the rank's own, which may be empty."""
    shards = Shards("group", [0, 0, 100_000, 100_001])
    for rows in (0, 1, 100_000):
        weight = torch.empty(rows, 2, dtype=torch.bfloat16)
        assert columns_of(weight, shards) == 33_334
        for tokens, dtype in ((1000, torch.bfloat16), (1007, torch.float32)):
            assert dweight_dtype(weight.dtype, weight, tokens, Chunking(), shards) == dtype
