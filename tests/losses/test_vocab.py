# SPDX-License-Identifier: BSD-3-Clause
"""VocabShard: bounds of the classes that ranks hold, and what is said of wrong ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import masked_loss
from masked_loss import VocabShard
from masked_loss.vocab import require_vocab

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"
)


def test_without_a_process_group() -> None:
    with pytest.raises(ValueError, match=r"even: needs a process group: .* not initialized"):
        VocabShard.even(5)


@pytest.fixture(scope="module")
def ranks() -> Iterator[int]:
    """A group of so many ranks, of which this process is the second."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=3)
    yield 3
    dist.destroy_process_group()


@pytest.mark.parametrize("classes", [1, 2, 3, 4, 5, 6, 7, 50257])
def test_even_is_how_torch_splits(classes: int, ranks: int) -> None:
    shard = VocabShard.even(classes)
    sizes = [len(x) for x in torch.arange(classes).chunk(ranks)]
    sizes += [0] * (ranks - len(sizes))
    assert [b - a for a, b in zip(shard.bounds, shard.bounds[1:], strict=False)] == sizes
    assert (shard.classes, shard.rank, shard.columns) == (classes, 1, sizes[1])
    require_vocab("f", shard, "logits", sizes[1])


BAD: list[tuple[Any, type[Exception], str]] = [
    ((0, 4, 8), ValueError, "bounds of vocab must be 4, one more than its group has ranks, got 3"),
    ((1, 4, 8, 9), ValueError, r"bounds of vocab must ascend from 0, got \[1, 4, 8, 9\]"),
    ((0, 4, 3, 9), ValueError, r"bounds of vocab must ascend from 0, got \[0, 4, 3, 9\]"),
    ((0, 4.0, 8, 9), TypeError, "every bound of vocab must be int, got float"),
    ((0, 0, 0, 0), ValueError, "bounds of vocab must have at least one class"),
    ((0, 4, 8, 9), ValueError, r"logits must have 4 classes on rank 1 .* \[0, 4, 8, 9\]; got 5"),
]


def test_numbers_are_integers(ranks: int) -> None:
    for call in (
        lambda: VocabShard.even(5.0),  # type: ignore[arg-type]
        lambda: VocabShard.gather("5"),  # type: ignore[arg-type]
    ):
        with pytest.raises(TypeError, match=r"VocabShard.\w+: \w+ must be int, got"):
            call()
    assert VocabShard.even(np.int64(5)) == VocabShard.even(5)


@pytest.mark.parametrize(("bounds", "error", "text"), BAD, ids=lambda x: str(x)[:20])
def test_errors(bounds: Any, error: type[Exception], text: str, ranks: int) -> None:
    shard = VocabShard(dist.group.WORLD, bounds)
    with pytest.raises(error, match=f"f: .*{text}"):
        require_vocab("f", shard, "logits", 5)


def test_errors_of_what_is_no_shard(ranks: int) -> None:
    with pytest.raises(TypeError, match="f: vocab must be a VocabShard, got tuple"):
        require_vocab("f", (dist.group.WORLD, (0, 5)), "logits", 5)
    with pytest.raises(TypeError, match="f: the group of vocab must be a ProcessGroup, got str"):
        require_vocab("f", VocabShard("tp", (0, 5)), "logits", 5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="even: classes must be at least 1, got 0"):
        VocabShard.even(0)
    with pytest.raises(ValueError, match="gather: columns must be at least 0, got -1"):
        VocabShard.gather(-1)
    others = dist.new_group([0, 2])
    with pytest.raises(ValueError, match="even: group must be one that this rank is in; rank 1"):
        VocabShard.even(5, others)


Case = tuple[Callable[..., Any], dict[str, torch.Tensor]]
TOKENS = {
    "target": torch.zeros(2, 3, dtype=torch.long),
    "mask": torch.ones(2, 3),
    "temperature": torch.ones(2, 3),
    "cu_seqlens": torch.tensor([0, 2, 6]),
}
HEAD = {"hidden": torch.randn(2, 3, 4), "weight": torch.randn(2, 4), "bias": torch.randn(2)}
OF_A_LOSS = {"class_weight": torch.ones(6), "normalizer": torch.tensor(2.0)}
CASES: list[Case] = [
    (masked_loss.masked_cross_entropy, {"logits": torch.randn(2, 3, 2)} | TOKENS | OF_A_LOSS),
    (masked_loss.token_log_probs, {"logits": torch.randn(2, 3, 2)} | TOKENS),
    (masked_loss.linear_cross_entropy, HEAD | TOKENS | OF_A_LOSS),
    (masked_loss.linear_token_log_probs, HEAD | TOKENS),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0].__name__)
def test_a_shard_on_meta_is_checked_and_exchanges_nothing(case: Case, ranks: int) -> None:
    """Seen here: an error of CUDA's that was not there, and a mask of another shape taken."""
    function, given = case
    shard = VocabShard.even(6)
    on_meta = {name: x.to("meta") for name, x in given.items()}
    assert function(**on_meta, vocab=shard).is_meta
    with pytest.raises(ValueError, match="mask must have shape"):
        function(**on_meta | {"mask": on_meta["mask"][:, :2]}, vocab=shard)
    first = next(iter(given))
    for name in given:
        for call in (given | {name: on_meta[name]}, on_meta | {name: given[name]}):
            with pytest.raises(ValueError, match="must be on the device") as error:
                function(**call, vocab=shard)
            assert name == first or f"{function.__name__}: {name} must" in str(error.value)
