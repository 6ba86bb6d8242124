# SPDX-License-Identifier: BSD-3-Clause
"""What benchmarks/gpu.py checks before it times anything; every failure is reported.

Loss and gradient against float64, twice the same bits, and on a GPU a step in a CUDA graph. It runs
on any device, and in the tests on the CPU and on the emulator.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from masked_loss import masked_cross_entropy, reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CLASSES = (5, 1000, 6400, 50257)
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"reduction": "none"},
    {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 30.0},
)

# What a gradient may be off, in roundings of its type: of each element, and of the largest. In
# float64 the truth is hardly better itself: eager PyTorch's sums over the classes have up to one
# rounding for each of them.
ROUNDINGS = {torch.float64: (50_000, 5_000), torch.float32: (16, 2)}
HALF_ROUNDINGS = (4, 1)

Loss = Callable[..., Tensor]


def problem(
    tokens: int, classes: int, dtype: torch.dtype, masked: float, device: str = "cuda"
) -> tuple[Tensor, Tensor]:
    logits = torch.empty(tokens, classes, dtype=dtype, device=device).normal_(std=3)
    target = torch.randint(classes, (tokens,), device=device)
    if masked:
        target[torch.rand(tokens, device=device) < masked] = -100
        target[0] = 1  # at least one takes part
    return logits.requires_grad_(), target


def excess(found: Tensor, truth: Tensor, rtol: float, atol: float) -> float:
    """The worst error as a multiple of what is allowed; a NaN is infinitely wrong."""
    error = (found.double() - truth.double()).abs()
    allowed = rtol * truth.abs() + atol * truth.abs().max()
    worst = torch.where(error == 0, 0.0, error / allowed).nan_to_num(nan=torch.inf).max()
    return float(worst)


def step(loss: Loss, logits: Tensor, target: Tensor, options: dict[str, Any]) -> list[Tensor]:
    value = loss(logits, target, **options)
    return [value.detach(), *torch.autograd.grad(value.sum(), logits)]


def check_case(
    loss: Loss, device: str, tokens: int, classes: int, dtype: torch.dtype, options: dict[str, Any]
) -> list[str]:
    logits, target = problem(tokens, classes, dtype, 0.5, device)
    first, second = (step(loss, logits, target, options) for _ in range(2))
    found = []
    for name, one, other in zip(("loss", "gradient"), first, second, strict=True):
        if not torch.equal(one, other):
            found.append(f"two runs differ in the {name}")
    wide = logits.detach().double().requires_grad_()
    truth = step(reference.masked_cross_entropy, wide, target, options)
    eps = torch.finfo(dtype).eps
    rtol, atol = ROUNDINGS.get(dtype, HALF_ROUNDINGS)
    worst = {
        "loss": excess(first[0], truth[0], 1e-5, 1e-6),
        "gradient": excess(first[1], truth[1], rtol * eps, atol * eps),
    }
    found += [
        f"{name} is {w:.3g} times as far off as allowed" for name, w in worst.items() if w > 1
    ]
    return found


def check_graph(loss: Loss) -> list[str]:
    logits, target = problem(64, 1000, torch.float32, 0.5)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = torch.autograd.grad(loss(logits, target), logits)[0]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.autograd.grad(loss(logits, target), logits)[0]
    captured.zero_()
    graph.replay()
    return [] if torch.equal(captured, expected) else ["a replayed step differs"]


def check(
    device: str = "cuda",
    loss: Loss = masked_cross_entropy,
    *,
    dtypes: Sequence[torch.dtype] = DTYPES,
    classes: Sequence[int] = CLASSES,
    tokens: int = 64,
    seed: int = 0,
) -> list[str]:
    """Everything that is wrong, a line each."""
    torch.manual_seed(seed)
    found = []

    def note(name: str, call: Callable[[], list[str]]) -> None:
        try:
            wrong = call()
        except Exception as error:
            wrong = [f"{type(error).__name__}: {error}"]
        found.extend(f"{name}: {line}" for line in wrong)

    for dtype, v, options in itertools.product(dtypes, classes, OPTIONS):
        name = f"{str(dtype).removeprefix('torch.')}, V = {v}, {options or 'mean'}"
        note(name, lambda case=(v, dtype, options): check_case(loss, device, tokens, *case))
    if device == "cuda":
        note("CUDA graph", lambda: check_graph(loss))
    return found
