# SPDX-License-Identifier: BSD-3-Clause
"""What documents of different lengths cost: ``python benchmarks/variable_length.py``.

The same documents padded, packed and jagged; and one number of tokens cut into many documents or
into few. Processor time on one thread, the least of many rounds that take turns; results are
checked before. ``--memory`` is what a packed loss takes beside its logits, in documents of that
length.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import time
from collections.abc import Callable

import torch
from torch import Tensor

import masked_loss

CLASSES = 8192
LENGTHS = [37, 200, 64, 181, 12, 150, 96, 109, 3, 172]
"""1024 tokens, half of what they are padded to."""
CUTS = {"documents of 10": 10, "documents of 100,000": 100_000}
TOKENS = 1_000_000


def forms(kind: str) -> dict[str, Callable[[], Tensor]]:
    """One step of each form: forward, or forward and gradient."""
    random = torch.Generator().manual_seed(0)
    tokens = sum(LENGTHS)
    logits = torch.randn(tokens, CLASSES, generator=random)
    target = torch.randint(CLASSES, (tokens,), generator=random)
    bounds = masked_loss.cu_seqlens(lengths=LENGTHS).long()
    nested = [torch.nested.nested_tensor_from_jagged(x, bounds) for x in (logits, target)]
    rows = [
        torch.nested.to_padded_tensor(x, padding)
        for x, padding in zip(nested, (0.0, -100), strict=True)
    ]
    behind = rows[1].numel() - tokens
    inputs = {
        "padded": (rows[0].clone(), rows[1], None),
        "packed, padding behind": (
            torch.nn.functional.pad(logits, (0, 0, 0, behind)),
            torch.nn.functional.pad(target, (0, behind)),
            bounds,
        ),
        "packed": (logits, target, bounds),
        "jagged": (*nested, None),
    }

    def step(logits: Tensor, target: Tensor, bounds: Tensor | None) -> Callable[[], Tensor]:
        leaf = logits.detach().requires_grad_(kind == "step")

        def call() -> Tensor:
            loss = masked_loss.masked_cross_entropy(
                leaf, target, reduction="sequence_mean", shift=True, cu_seqlens=bounds
            )
            if kind == "step":
                torch.autograd.grad(loss, leaf)
            return loss

        return call

    return {name: step(*x) for name, x in inputs.items()}


def cuts(kind: str) -> dict[str, Callable[[], Tensor]]:
    """One number of tokens, cut into many documents or into few."""
    random = torch.Generator().manual_seed(0)
    values = torch.randn(TOKENS, generator=random).requires_grad_(kind == "step")

    def reduce(length: int) -> Callable[[], Tensor]:
        bounds = masked_loss.cu_seqlens(lengths=[length] * (TOKENS // length))

        def call() -> Tensor:
            loss = masked_loss.masked_reduce(values, reduction="sequence_mean", cu_seqlens=bounds)
            if kind == "step":
                torch.autograd.grad(loss, values)
            return loss

        return call

    return {name: reduce(length) for name, length in CUTS.items()}


def seconds(calls: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """The least of each. They take turns of some calls, the first of which finds its memory."""
    found = {name: float("inf") for name in calls}
    for _, (name, call), _ in itertools.product(range(8), calls.items(), range(8)):
        begin = time.process_time()
        call()
        found[name] = min(found[name], time.process_time() - begin)
    return found


def check() -> None:
    for kind in ("forward", "step"):
        padded, *others = (call().detach() for call in forms(kind).values())
        for other in others:
            torch.testing.assert_close(other, padded)
        few, many = (call().detach() for call in cuts(kind).values())
        torch.testing.assert_close(few, many, rtol=0, atol=1e-6)


def peak(length: int) -> float:
    """MiB that a packed loss takes beside its logits: the table of tokens is 5 floats each."""
    tokens, classes = 2_000_000, 4
    logits, target = torch.zeros(tokens, classes), torch.zeros(tokens, dtype=torch.int64)
    bounds = masked_loss.cu_seqlens(lengths=[length] * (tokens // length))
    small = (logits[:100], target[:100])
    masked_loss.masked_cross_entropy(*small, reduction="sequence_mean")  # what is made once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    masked_loss.masked_cross_entropy(
        logits, target, reduction="sequence_mean", shift=True, cu_seqlens=bounds
    )
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", type=int, metavar="LENGTH")
    options = parser.parse_args()
    if options.memory:
        print(f"{peak(options.memory):.1f} MiB")
        return
    torch.set_num_threads(1)
    check()
    for make in (forms, cuts):
        for kind in ("forward", "step"):
            times = seconds(make(kind))
            first = next(iter(times.values()))
            for name, found in times.items():
                print(f"{kind:8} {name:22} {found * 1e3:8.2f} ms  {found / first:5.2f}")


if __name__ == "__main__":
    main()
