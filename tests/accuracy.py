# SPDX-License-Identifier: BSD-3-Clause
"""How exact is exact enough: as exact as eager PyTorch, and one rounding more.

The truth is the reference in float64. The eager baseline is the reference in the dtype that the
kernels compute in (float32 for half types), on the same numbers; it is stricter than
``F.cross_entropy``, which rounds its log-probabilities to half types.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from samples import Case, Sample
from torch import Tensor

Results = dict[str, Tensor]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def run(function: Callable[..., Any], sample: Sample, **more: Any) -> Results:
    """The loss, the gradients, and the statistics where ``return_stats=True`` asks for them."""
    out = sample.call(function, **more)
    loss, stats = out if isinstance(out, tuple) else (out, ())
    names = ("tokens", "correct", "entropy", "z_loss")
    results = {"loss": loss, **dict(zip(names, stats, strict=False))}
    if loss.requires_grad:
        random = torch.Generator().manual_seed(1)
        upstream = torch.randn(loss.shape, generator=random).to(loss)
        leaves = {
            "gradient of values": sample.values,
            "gradient of mask": sample.mask,
        }
        leaves = {name: x for name, x in leaves.items() if x is not None and x.requires_grad}
        gradients = torch.autograd.grad(loss, list(leaves.values()), upstream)
        results.update(zip(leaves, gradients, strict=True))
    return {name: result.detach() for name, result in results.items()}


def assert_as_accurate_as_eager(
    function: Callable[..., Any],
    reference: Callable[..., Any],
    case: Case,
    dtype: torch.dtype,
    device: str = "cpu",
    **more: Any,
) -> None:
    """|ours - truth| <= |eager - truth| + one rounding, for every result, at its worst element."""

    def eager(values: Tensor, *args: Any, **options: Any) -> Any:
        options.pop("inplace_backward", None)
        return reference(values.to(accumulation_dtype(values.dtype)), *args, **options)

    ours = run(function, case.sample(dtype, device), **more)
    baseline = run(eager, case.sample(dtype, device), **more)
    truth = run(eager, case.sample(dtype, device).double(), **more)
    assert ours.keys() == truth.keys()
    for name in truth:
        assert_close_as_eager(ours[name], baseline[name], truth[name], f"{case}: {name}")


def assert_close_as_eager(ours: Tensor, eager: Tensor, truth: Tensor, name: str) -> None:
    assert ours.shape == truth.shape, name
    assert ours.dtype == eager.dtype, name
    if truth.numel() == 0:
        return
    finite = truth.isfinite()
    torch.testing.assert_close(
        ours.double()[~finite], truth[~finite], equal_nan=True, rtol=0, atol=0, msg=name
    )
    truth = truth.where(finite, 0)
    info = torch.finfo(ours.dtype)
    rounding = info.eps * truth.abs().max() + info.tiny * info.eps
    if ours.dtype == torch.float64:  # The truth itself was rounded at every step.
        rounding = 64 * info.eps * truth.abs().max().clamp(min=1)

    def error(x: Tensor) -> Tensor:
        return (x.double().where(finite, 0) - truth).abs().max()

    assert error(ours) <= error(eager) + rounding, (
        f"{name}: off by {error(ours):.3e}, eager PyTorch by {error(eager):.3e}, "
        f"one rounding is {rounding:.3e}"
    )
