# SPDX-License-Identifier: BSD-3-Clause
"""Losses of a vocabulary that is shared out to ranks, in real process groups (gloo).

The ranks are spawned once, and do all cases of their number in one go.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_cases import ENDS, Case, errors_of, needs_gloo, report
from torch import Tensor

from masked_loss import (
    VocabShard,
    linear_cross_entropy,
    linear_token_log_probs,
    masked_cross_entropy,
    token_log_probs,
)

V, SHAPE = 13, (3, 7)

pytestmark = needs_gloo


def problem(shift: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(5)
    logits = torch.randn(*SHAPE, V, generator=random, dtype=torch.float64)
    target = torch.randint(V, SHAPE, generator=random)
    mask = torch.rand(SHAPE, generator=random, dtype=torch.float64)
    mask = mask * (mask > 0.3)
    masked = mask == 0
    if shift:
        masked = torch.cat([masked[:, 1:], masked[:, :1] | True], dim=1)
    logits[masked] = torch.nan  # never read
    return logits, target, mask


def all_shards(ranks: int) -> list[VocabShard]:
    """An even split, one without classes on the second rank, and one of many on the last."""
    group = dist.group.WORLD
    assert group is not None
    rank = dist.get_rank()
    empty = VocabShard(group, (0, 4, 4, *range(5, 5 + ranks - 3), V) if ranks > 2 else (0, 0, V))
    return [VocabShard.even(V), empty, VocabShard.gather(1 if rank < ranks - 1 else V + 1 - ranks)]


def mine(x: Tensor, shard: VocabShard) -> Tensor:
    first = shard.bounds[shard.rank]
    return x[..., first : first + shard.columns].clone().requires_grad_()


def assert_equal_on_all_ranks(x: Tensor) -> None:
    everyones = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(everyones, x.detach())
    assert all(torch.equal(x.detach(), other) for other in everyones)


def collectives(function: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, int | None]:
    """What a call gives, and its collectives as the first rank counts them: to import what counts
    takes as long as torch itself."""
    if dist.get_rank() > 0:
        return function(*args, **options), None
    from torch.distributed.tensor.debug import CommDebugMode

    with CommDebugMode() as mode:
        result = function(*args, **options)
    return result, mode.get_total_counts()


def flat(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else [x for r in results for x in flat(r)]


CROSS_ENTROPY: list[dict[str, Any]] = [
    {},
    {"reduction": "none", "softcap": 3.0, "temperature": 0.7},
    {"reduction": "sequence_mean", "shift": True, "label_smoothing": 0.2, "z_loss": 0.01},
    {"class_weight": torch.linspace(0.5, 2, V), "label_smoothing": 0.1, "normalizer": 5.0},
]
LOG_PROBS: list[dict[str, Any]] = [{}, {"softcap": 3.0, "temperature": 0.7, "shift": True}]
WHOLE = [(masked_cross_entropy, {"return_stats": True, **o}) for o in CROSS_ENTROPY]
WHOLE += [(token_log_probs, {"return_entropy": True, **o}) for o in LOG_PROBS]


def of_logits(rank: int, ranks: int) -> None:
    """The results and gradients of one process; on all ranks the same, of one exchange."""
    for shard in all_shards(ranks):
        for function, options in WHOLE:
            logits, target, mask = problem(options.get("shift", False))
            leaves = [logits.requires_grad_()]
            if function is masked_cross_entropy:
                leaves.append(mask.requires_grad_())
            expected = flat(function(logits, target, mask, **options))
            smooth = [k for k, x in enumerate(expected) if x.requires_grad]
            upstream = [torch.linspace(1, 2, x.numel()).to(x).view(x.shape) for x in expected]
            upstream = [upstream[k] for k in smooth]
            wanted = torch.autograd.grad([expected[k] for k in smooth], leaves, upstream)

            leaves[0] = local = mine(logits.detach(), shard)
            found, count = collectives(function, local, target, mask, vocab=shard, **options)
            found = flat(found)
            assert count in (1, None)
            torch.testing.assert_close(found, expected)
            for x in found:
                assert_equal_on_all_ranks(x)
            results = [found[k] for k in smooth]
            gradients, count = collectives(torch.autograd.grad, results, leaves, upstream)
            assert count in (0, None)
            dlogits, *dmask = wanted
            torch.testing.assert_close(gradients, (mine(dlogits, shard).detach(), *dmask))
            for x in gradients[1:]:
                assert_equal_on_all_ranks(x)
            with torch.no_grad():
                again = flat(function(local, target, mask, vocab=shard, **options))
            assert all(map(torch.equal, again, found))


def linear(rank: int, ranks: int) -> None:
    """An exchange for each chunk and one sum of hidden's gradient; without gradients one of all."""
    random = torch.Generator().manual_seed(6)
    hidden, head = (torch.randn(*s, 4, generator=random).double() for s in (SHAPE, (V,)))
    _, target, mask = problem()
    chunks = -(-int(mask.count_nonzero()) // 5)
    for shard in all_shards(ranks):
        first = shard.bounds[shard.rank]
        own = slice(first, first + shard.columns)
        for function in (linear_cross_entropy, linear_token_log_probs):
            leaves = [x.clone().requires_grad_() for x in (hidden, head)]
            expected = function(*leaves, target, mask)
            wanted = torch.autograd.grad(expected.sum(), leaves)
            leaves = [hidden.clone().requires_grad_(), head[own].clone().requires_grad_()]
            args, options = (*leaves, target, mask), {"vocab": shard, "chunk_tokens": 5}
            found, count = collectives(function, *args, **options)
            scalar = function is linear_cross_entropy  # whose gradients forward computes
            assert count in (chunks + 1 if scalar else 1, None)
            torch.testing.assert_close(found, expected)
            assert_equal_on_all_ranks(found)
            gradients, count = collectives(torch.autograd.grad, found.sum(), leaves)
            assert count in (0 if scalar else 1, None)
            torch.testing.assert_close(gradients, (wanted[0], wanted[1][own]))
            with torch.no_grad():
                again, count = collectives(function, *args, **options)
            assert count in (1, None)
            torch.testing.assert_close(again, expected)
            bad = target.clone()
            bad[mask != 0] = V
            with pytest.raises(IndexError, match=rf"is {V}, .* target < {V}"):
                function(*leaves, bad, vocab=shard)
            nothing = function(*leaves, target, torch.zeros(SHAPE), vocab=shard)
            assert (nothing == 0).all()


def compiled(rank: int, ranks: int) -> None:
    """One graph, whatever the loss: nothing of it is computed while tracing."""
    if ranks > 2:
        return
    logits, target, _ = problem()
    shard = VocabShard.even(V)
    hidden, head = torch.randn(*SHAPE, 4).double(), torch.randn(V, 4).double()
    for x in (hidden, head):
        dist.broadcast(x, 0)
    first = shard.bounds[rank]
    head = head[first : first + shard.columns].clone().requires_grad_()
    local = mine(logits.nan_to_num(), shard)

    def losses(local: Tensor, head: Tensor) -> Tensor:
        dense = masked_cross_entropy(local, target, vocab=shard)
        scores, entropy = token_log_probs(local, target, vocab=shard, return_entropy=True)
        linear = linear_cross_entropy(hidden, head, target, vocab=shard)
        each = linear_token_log_probs(hidden, head, target, vocab=shard)
        return dense + scores.sum() + entropy.sum() + linear + each.sum()

    results = []
    for function in (losses, torch.compile(losses, fullgraph=True, backend="aot_eager")):
        loss = function(local, head)
        results.append((loss.detach(), *torch.autograd.grad(loss, (local, head))))
    torch.testing.assert_close(*results)


def out_of_range(rank: int, ranks: int) -> None:
    """An error on every rank, of whom none waits for the others; also with nothing to compute."""
    for shard in all_shards(ranks):
        logits, target, _ = problem()
        local = mine(logits.nan_to_num(), shard)
        bad = target.clone()
        bad[1, 2] = V
        with pytest.raises(IndexError, match=rf"target\[1, 2\] is {V}, .* target < {V}"):
            masked_cross_entropy(local, bad, vocab=shard)
        with pytest.raises(ValueError, match=r"masked_cross_entropy: logits must have \d+ classes"):
            masked_cross_entropy(torch.zeros(*SHAPE, V + 1), target, vocab=shard)
        loss = masked_cross_entropy(local, bad, torch.zeros(SHAPE), vocab=shard)
        loss.backward()
        assert loss == 0
        assert (local.grad == 0).all()
        nothing = masked_cross_entropy(local[:0], bad[:0], vocab=shard)
        assert nothing == 0


CASES: dict[str, Case] = {
    "losses of logits": of_logits,
    "losses of hidden states": linear,
    "compiled": compiled,
    "out of range": out_of_range,
}
RANKS = (2, 3, 4)


@pytest.fixture(scope="module")
def all_errors() -> dict[int, dict[str, str]]:
    return errors_of(__name__, RANKS)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("case", [*CASES, ENDS])
def test_ranks(case: str, ranks: int, all_errors: dict[int, dict[str, str]]) -> None:
    report(case, all_errors[ranks])
