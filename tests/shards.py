# SPDX-License-Identifier: BSD-3-Clause
"""A vocabulary shared out to ranks that are threads of one process.

The functions run as they are; only what exchanges numbers between ranks is replaced. One rank runs
at a time, so nothing here asks for more than one core, or for an emulator with several.
"""

from __future__ import annotations

import random
import threading
import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from masked_loss import functional, linear, linear_log_probs, log_probs
from masked_loss._op import exchange
from masked_loss.options import Shards

TAKING_VOCAB = [functional, log_probs, linear, linear_log_probs]


def splits(classes: int, name: str, most: int = 7) -> list[int]:
    """Bounds of 1 to ``most`` shards, some of which are empty or have one class."""
    chance = random.Random(zlib.crc32(name.encode()))
    ranks = chance.randint(1, most)
    inner = sorted(chance.randint(0, classes) for _ in range(ranks - 1))
    return [0, *inner, classes]


class Ranks:
    def __init__(self, bounds: Sequence[int]) -> None:
        self.bounds, self.count = list(bounds), len(bounds) - 1
        self.exchanges = 0
        self._told: list[Any] = [None] * self.count
        self._turn, self._all = threading.Lock(), threading.Barrier(self.count)

    def run(self, function: Callable[[int, Any], Any]) -> list[Any]:
        """``function(rank, vocab)`` on every rank."""
        results: list[Any] = [None] * self.count
        errors: list[BaseException] = []
        grad, tracked = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        assert not tracked

        def work(rank: int) -> None:
            try:
                with self._turn, torch.set_grad_enabled(grad):
                    results[rank] = function(rank, (self, rank))
            except BaseException as error:
                errors.append(error)
                self._all.abort()

        with ExitStack() as stack:
            for module in TAKING_VOCAB:
                stack.enter_context(mock.patch.object(module, "shards_of", self._shards_of))
            for name in ("columns", "gathered", "add_up"):
                stack.enter_context(mock.patch.object(exchange, name, getattr(self, name)))
            threads = [threading.Thread(target=work, args=(r,)) for r in range(self.count)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        real = [e for e in errors if not isinstance(e, threading.BrokenBarrierError)]
        if errors:
            raise (real or errors)[0]
        return results

    @staticmethod
    def _shards_of(who: str, vocab: Any, what: str, columns: int) -> Shards:
        if isinstance(vocab, Shards):
            return vocab
        ranks, rank = vocab
        assert columns == ranks.bounds[rank + 1] - ranks.bounds[rank], (who, what)
        return Shards(str(rank), ranks.bounds)

    def columns(self, shards: Shards) -> tuple[int, int]:
        return self.bounds[int(shards.vocab_group)], self.bounds[-1]

    def gathered(self, part: Tensor, shards: Shards) -> Tensor:
        return torch.stack(self._exchange(int(shards.vocab_group), part))

    def add_up(self, x: Tensor, shards: Shards) -> None:
        total = torch.stack(self._exchange(int(shards.vocab_group), x.clone())).sum(0)
        x.copy_(total)

    def _exchange(self, rank: int, x: Tensor) -> list[Tensor]:
        self._told[rank] = x
        self._turn.release()
        self._all.wait()
        told = list(self._told)
        self._all.wait()
        self._turn.acquire()
        self.exchanges += rank == 0
        return told


def sharded(
    function: Callable[..., Any], bounds: Sequence[int], results: int = 1
) -> Callable[..., Any]:
    """``function`` of logits whose shards have these bounds, as if it were of all of them.

    Its first results are differentiable. That every rank gets the same bits is asserted.
    """

    def call(logits: Tensor, target: Tensor, mask: Tensor | None = None, **options: Any) -> Any:
        ranks = Ranks(bounds)
        shards = [logits[..., a:b] for a, b in pairwise(bounds)]
        if options.get("inplace_backward"):  # into memory of its own
            shards = [x.clone() for x in shards]

        def of_rank(rank: int, vocab: Any) -> tuple[Tensor, ...]:
            weight = mask if mask is None or rank == 0 else mask.detach()
            found = function(shards[rank], target, weight, vocab=vocab, **options)
            return found if isinstance(found, tuple) else (found,)

        each = ranks.run(of_rank)
        assert ranks.exchanges == 1
        for others in each[1:]:
            for x, y in zip(flat(each[0]), flat(others), strict=True):
                same = (x == y) | (x.isnan() & y.isnan())
                assert same.all(), "ranks differ"
        whole = []
        for k in range(results):
            values = [found[k] for found in each]
            # The value of one rank, and of each rank the gradient of what it has.
            total = values[0]
            for value in values[1:]:
                total = total.detach().where(~value.isfinite(), total + (value - value.detach()))
            whole.append(total)
        rest = each[0][results:]
        return (*whole, *rest) if len(each[0]) > 1 else whole[0]

    return call


def flat(results: Any) -> list[Tensor]:
    if isinstance(results, Tensor):
        return [results]
    return [x for result in results for x in flat(result)]
