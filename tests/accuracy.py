# SPDX-License-Identifier: BSD-3-Clause
"""How exact is exact enough: as exact as eager PyTorch, and one rounding more.

The truth is the reference in float64. The eager baseline is the reference in the dtype that the
kernels compute in (float32 for half types), on the same numbers; it is stricter than
``F.cross_entropy``, which rounds its log-probabilities to half types.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from samples import Case, Sample
from torch import Tensor

Results = dict[str, Tensor]
DRAWS = 8


class Errors(NamedTuple):
    ours: float
    eager: float
    rounding: float


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
    *,
    roundings: float = 1,
    **more: Any,
) -> None:
    """As :func:`assert_no_worse`, of a case."""

    def eager(values: Tensor, *args: Any, **options: Any) -> Any:
        options.pop("inplace_backward", None)
        return reference(values.to(accumulation_dtype(values.dtype)), *args, **options)

    def results(draw: int) -> tuple[Results, Results, Results]:
        ours, baseline, truth = (case.sample(dtype, device, draw=draw) for _ in range(3))
        mine = run(function, ours, **more)
        return mine, run(eager, baseline, **more), run(eager, truth.double(), **more)

    assert_no_worse(results, dtype, str(case), roundings)


def assert_no_worse(
    results: Callable[[int], tuple[Results, Results, Results]],
    dtype: torch.dtype,
    what: str,
    roundings: float,
) -> None:
    """|ours - truth| <= |eager - truth| + some roundings, for every result, at its worst element.

    ``results(draw)`` gives ours, eager PyTorch's and the truth. A result of few elements is
    sometimes right by luck, and eager PyTorch's then sets no measure: where one draw of the numbers
    fails, the worst of DRAWS counts, for both sides.
    """
    worst: dict[str, Errors] = {}
    for draw in range(DRAWS):
        ours, baseline, truth = results(draw)
        assert ours.keys() == truth.keys()
        for name in truth:
            of_draw = (ours[name], baseline[name], truth[name])
            errors = compare(*of_draw, dtype, f"{what}: {name}", roundings)
            worst[name] = Errors(*map(max, zip(errors, worst.get(name, errors), strict=True)))
        failed = {name: e for name, e in worst.items() if not e.ours <= e.eager + e.rounding}
        if not failed:
            return
    raise AssertionError(
        "\n".join(
            f"{what}: {name} is off by {e.ours:.3e}, eager PyTorch's by {e.eager:.3e}, "
            f"{roundings} rounding is {e.rounding:.3e}"
            for name, e in failed.items()
        )
    )


def compare(
    ours: Tensor,
    eager: Tensor,
    truth: Tensor,
    dtype: torch.dtype,
    name: str,
    roundings: float = 1,
) -> Errors:
    """The worst elements' errors, and what ``roundings`` may add to ours.

    A half type is rounded to each element's own size, which is taken off before the worst element
    is looked for: judged by the largest one, a gradient's many small elements could all be lost.
    """
    assert ours.shape == truth.shape, name
    assert ours.dtype == eager.dtype, name
    if truth.numel() == 0:
        return Errors(0.0, 0.0, 0.0)
    finite = truth.isfinite()
    for who, x in (("ours", ours), ("eager PyTorch's", eager)):  # max() of Python forgets a NaN
        assert not (x.isnan() & finite).any(), f"{name}: {who} is NaN, the truth is not"
    torch.testing.assert_close(
        ours.double()[~finite], truth[~finite], equal_nan=True, rtol=0, atol=0, msg=name
    )
    truth = truth.where(finite, 0)
    size = truth.abs().max().item()
    info = torch.finfo(ours.dtype)
    # Even a float64 result is no better than what it was computed in.
    eps = max(info.eps, torch.finfo(accumulation_dtype(dtype)).eps)
    half = info.bits == 16
    own = roundings * eps / 2 * truth.abs() if half else torch.zeros(())
    rounding = 0 if half else roundings * eps * size
    rounding += info.eps * info.tiny  # the smallest number: a step between two of them
    rounding += 64 * torch.finfo(torch.float64).eps * max(size, 1)  # of the truth itself

    def error(x: Tensor) -> Tensor:
        return (x.double().where(finite, 0) - truth).abs()

    return Errors((error(ours) - own).max().item(), error(eager).max().item(), rounding)
