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
import time
from collections.abc import Callable
from functools import partial

import timing
import torch
from torch import Tensor

import masked_loss

Call = Callable[[], tuple[Tensor, ...]]
CLASSES = 8192
LENGTHS = [37, 200, 64, 181, 12, 150, 96, 109, 3, 172]
"""1024 tokens, half of what they are padded to."""
CUTS = {"documents of 10": 10, "documents of 100,000": 100_000}
TOKENS = 1_000_000


def forms(kind: str) -> dict[str, Call]:
    """Each form's loss; for a step its gradient too."""
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

    def step(logits: Tensor, target: Tensor, bounds: Tensor | None) -> Call:
        leaf = logits.detach().requires_grad_(kind == "step")

        def call() -> tuple[Tensor, ...]:
            loss = masked_loss.masked_cross_entropy(
                leaf, target, reduction="sequence_mean", shift=True, cu_seqlens=bounds
            )
            return (loss, *torch.autograd.grad(loss, leaf)) if kind == "step" else (loss,)

        return call

    return {name: step(*x) for name, x in inputs.items()}


def cuts(kind: str) -> dict[str, Call]:
    """The same of one number of tokens, cut into many documents or into few."""
    random = torch.Generator().manual_seed(0)
    values = torch.randn(TOKENS, generator=random).requires_grad_(kind == "step")

    def reduce(length: int) -> Call:
        bounds = masked_loss.cu_seqlens(lengths=[length] * (TOKENS // length))

        def call() -> tuple[Tensor, ...]:
            loss = masked_loss.masked_reduce(values, reduction="sequence_mean", cu_seqlens=bounds)
            return (loss, *torch.autograd.grad(loss, values)) if kind == "step" else (loss,)

        return call

    return {name: reduce(length) for name, length in CUTS.items()}


def seconds(calls: dict[str, Call]) -> dict[str, float]:
    """The least of each. They take turns of some calls, the first of which finds its memory."""
    found = {name: float("inf") for name in calls}
    for _, (name, call), _ in itertools.product(range(8), calls.items(), range(8)):
        begin = time.process_time()
        call()
        found[name] = min(found[name], time.process_time() - begin)
    return found


def of_tokens(gradient: Tensor) -> Tensor:
    """One document's rows behind the other's, without padding."""
    if gradient.is_nested:
        return gradient.values()
    if gradient.dim() == 3:
        return gradient[torch.arange(gradient.shape[1]) < torch.tensor(LENGTHS)[:, None]]
    assert not gradient[sum(LENGTHS) :].any()
    return gradient[: sum(LENGTHS)]


def check() -> None:
    """All forms have one loss and one gradient; so have all cuts, which are means of as many."""
    for kind in ("forward", "step"):
        (first, *padded), *others = (call() for call in forms(kind).values())
        for loss, *gradient in others:
            torch.testing.assert_close(loss, first)
            for ours, theirs in zip(gradient, padded, strict=True):
                torch.testing.assert_close(of_tokens(ours), of_tokens(theirs), rtol=1e-5, atol=1e-9)
        many, few = (call() for call in cuts(kind).values())
        torch.testing.assert_close(many[0], few[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(many[1:], few[1:], rtol=1e-6, atol=0)


def peak(length: int) -> float:
    """MiB that a packed loss takes beside its logits: the table of tokens is 5 floats each."""
    tokens, classes = 2_000_000, 4
    logits, target = torch.zeros(tokens, classes), torch.zeros(tokens, dtype=torch.int64)
    bounds = masked_loss.cu_seqlens(lengths=[length] * (tokens // length))
    small = (logits[:100], target[:100])
    masked_loss.masked_cross_entropy(*small, reduction="sequence_mean")  # what is made once
    options = {"reduction": "sequence_mean", "shift": True, "cu_seqlens": bounds}
    call = partial(masked_loss.masked_cross_entropy, logits, target, **options)
    return timing.peak_growth(call) / 2**20


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
