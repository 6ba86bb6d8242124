# SPDX-License-Identifier: BSD-3-Clause
"""linear_cross_entropy beside masked_cross_entropy of F.linear: the numbers, and how exact.

The truth is the specification in float64. The baseline is what a model does without this function:
F.linear in its own dtype, then the specification in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import samples
import torch
import torch.nn.functional as F
from accuracy import Results, accumulation_dtype, assert_no_worse
from samples import OPTIONS
from torch import Tensor

from masked_loss import linear_cross_entropy, reference

LEAVES = ("hidden", "weight", "bias", "mask")
SHAPE, WIDTH, CLASSES = (3, 5), 6, 9


def problem(
    *shape: int,
    width: int = WIDTH,
    classes: int = CLASSES,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    requires: tuple[str, ...] = LEAVES,
) -> dict[str, Tensor]:
    wide = accumulation_dtype(dtype)
    tensors = {
        "hidden": torch.randn(*shape, width).to(device, dtype),
        "weight": torch.randn(classes, width).to(device, dtype),
        "bias": torch.randn(classes).to(device, dtype),
        "mask": ((0.1 + torch.rand(shape)) * (torch.rand(shape) < 0.7)).to(device, wide),
    }
    for name in requires:
        tensors[name].requires_grad_()
    tensors["target"] = torch.randint(classes, shape, device=device)
    return tensors


def concrete(
    name: str,
    reduction: str,
    dtype: torch.dtype,
    device: str = "cpu",
    shape: tuple[int, ...] = SHAPE,
) -> dict[str, Any]:
    """The options that OPTIONS names, as arguments of a call."""
    options = samples.concrete(OPTIONS[name], shape, CLASSES, dtype, device)
    if reduction == "none":
        options.pop("normalizer", None)
    return {"reduction": reduction, **options}


def specification(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    **options: Any,
) -> Any:
    logits = F.linear(hidden, weight, bias)
    wide = accumulation_dtype(logits.dtype)
    return reference.masked_cross_entropy(logits.to(wide), target, mask, **options)


def evaluate(
    function: Callable[..., Any],
    tensors: dict[str, Tensor],
    upstream: Tensor | None = None,
    **options: Any,
) -> Results:
    """The loss, the statistics if there are any, and the gradients of what requires one."""
    out = function(
        tensors["hidden"], tensors["weight"], tensors["target"], tensors.get("mask"),
        bias=tensors.get("bias"), **options,
    )  # fmt: skip
    loss, stats = out if isinstance(out, tuple) else (out, ())
    names = ("tokens", "correct", "entropy", "z_loss")
    results = {"loss": loss.detach(), **dict(zip(names, stats, strict=False))}
    leaves = {name: x for name, x in tensors.items() if x.requires_grad}
    if leaves:
        if upstream is None:
            random = torch.Generator().manual_seed(1)
            upstream = torch.randn(loss.shape, generator=random)
        gradients = torch.autograd.grad(loss, list(leaves.values()), upstream.to(loss))
        results.update(zip(leaves, gradients, strict=True))
    return results


def double(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for name, x in tensors.items()
    }


def roundings_on(device: str | torch.device) -> int:
    """On CUDA the products are of half numbers: what goes into one is rounded, and once more what
    the upstream gradient makes of it."""
    return 2 if torch.device(device).type == "cuda" else 1


def assert_accurate(
    make: Callable[[], dict[str, Tensor]], *, roundings: float | None = None, **options: Any
) -> None:
    """No further from the truth than the baseline, and some roundings."""
    keywords = ("chunk_tokens", "accumulation_dtype")
    plain = {name: value for name, value in options.items() if name not in keywords}
    wide = {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in plain.items()
    }

    def results(draw: int) -> tuple[Results, Results, Results]:
        torch.manual_seed(draw)
        tensors = make()
        ours = evaluate(linear_cross_entropy, tensors, **options)
        for name in ours.keys() - set(LEAVES):
            expected = accumulation_dtype(dtype) if name == "loss" else torch.float64
            assert ours[name].dtype == expected, name
        baseline = evaluate(specification, tensors, **plain)
        return ours, baseline, evaluate(specification, double(tensors), **wide)

    hidden = make()["hidden"]
    dtype = hidden.dtype
    assert_no_worse(results, dtype, "linear", roundings or roundings_on(hidden.device))


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], **tolerance: Any) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance
        )
