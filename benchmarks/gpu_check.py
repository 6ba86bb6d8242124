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


def allowed(dtype: torch.dtype) -> tuple[float, float]:
    """What a gradient may be off: of each element, and of the largest."""
    eps = torch.finfo(dtype).eps
    if dtype == torch.float64:
        # The truth is hardly better itself: eager PyTorch's sums over the classes have up to one
        # rounding for each of them.
        return 50_000 * eps, 5_000 * eps
    if dtype == torch.float32:
        return 16 * eps, 2 * eps
    # Each element is rounded, and small ones, which are nearly all, count as such.
    return eps, 1e-5


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
    worst = {
        "loss": excess(first[0], truth[0], 1e-5, 1e-6),
        "gradient": excess(first[1], truth[1], *allowed(dtype)),
    }
    found += [
        f"{name} is {w:.3g} times as far off as allowed" for name, w in worst.items() if w > 1
    ]
    return found


def linear_truth(hidden: Tensor, weight: Tensor, target: Tensor) -> list[Tensor]:
    """linear_cross_entropy and its gradients, computed in float64, some rows at a time."""
    wide = weight.detach().double()
    loss, of_hidden, of_weight = 0.0, [], torch.zeros_like(wide)
    for h, t in zip(hidden.detach().double().split(512), target.split(512), strict=True):
        logits = (h @ wide.t()).requires_grad_()
        part = reference.masked_cross_entropy(logits, t, reduction="sum") / len(target)
        (gradient,) = torch.autograd.grad(part, logits)
        loss += part.item()
        of_hidden.append(gradient @ wide)
        of_weight.addmm_(gradient.t(), h)
    # Kept as float32, which is exact enough for half types.
    return [torch.tensor(loss), torch.cat(of_hidden).float(), of_weight.float()]


def linear_complaint(found: Sequence[Tensor], truth: Sequence[Tensor], most: float) -> str | None:
    """Of the loss and the gradients of a head, each measured by its norm."""
    for what, ours, exact in zip(("loss", "dhidden", "dweight"), found, truth, strict=True):
        off = ((ours.float() - exact.to(ours.device)).norm() / exact.norm()).item()
        if not off <= most:
            return f"its {what} is {off:.2g} off, at most {most:g} is expected"
    return None


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
