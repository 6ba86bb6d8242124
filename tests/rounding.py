# SPDX-License-Identifier: BSD-3-Clause
"""Numbers that a store of bfloat16 or float16 may round wrongly, and everything that stores them.

Each gradient here is known to the last bit before it is stored, so what is stored must be that
number, rounded to nearest even.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from masked_loss import masked_cross_entropy, masked_reduce

HALF_TYPES = [torch.bfloat16, torch.float16]


class Numbers(NamedTuple):
    exact: Tensor  # float32
    rounded: Tensor  # of a half type


def hard_numbers(dtype: torch.dtype) -> Numbers:
    """The tie between any two neighbours of ``dtype``, the numbers beside it, and the neighbours.

    Subnormal numbers are among them, and the largest, whose neighbour is infinity; both signs; NaN.
    What they round to follows from how they are made, and asks no other rounding.
    """
    infinity = int(torch.tensor(torch.inf, dtype=dtype).view(torch.int16))
    bits = torch.arange(infinity + 1, dtype=torch.int16)
    below, above = bits[:-1].view(dtype), bits[1:].view(dtype)
    even = torch.where(bits[:-1] % 2 == 0, bits[:-1], bits[1:]).view(dtype)
    step = above.double() - below.double()
    step[-1] = step[-2]  # to infinity: as if numbers went on
    ties = (below.double() + step / 2).float()
    nan = torch.tensor([torch.nan])
    exact = [above.float(), ties, _next_float(ties, -1), _next_float(ties, 1), nan]
    rounded = [above, even, below, above, nan.to(dtype)]
    return Numbers(
        torch.cat([*exact, *(-x for x in exact)]), torch.cat([*rounded, *(-x for x in rounded)])
    )


def of_float_products(numbers: Numbers, step: int = 1) -> Numbers:
    """Every ``step``-th, and no infinite product: CUDA multiplies a weight, which is up to 53 here,
    and an upstream gradient in float32."""
    exact, rounded = (x[::step] for x in numbers)
    fits = (exact * 53).isfinite() | exact.isnan()
    return Numbers(exact[fits], rounded[fits])


def _next_float(x: Tensor, step: int) -> Tensor:
    return (x.view(torch.int32) + step).view(torch.float32)


def stores(numbers: Numbers, device: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(what stores them, what was stored, what should have been)."""
    dtype = numbers.rounded.dtype
    v, rounded = numbers.exact.to(device), numbers.rounded.to(device)
    (n,) = v.shape
    target = torch.zeros(n, dtype=torch.int64, device=device)
    # Among equal logits each class's share is 1 / classes; a weight of `classes` makes it 1. 53:
    # pairs of vectors, one vector and a tail, whatever the width.
    for classes in (2, 53):
        weight = torch.full((n,), float(classes), device=device)
        for inplace in (False, True):
            leaf = torch.zeros(n, classes, dtype=dtype, device=device, requires_grad=True)
            logits = leaf * 1
            loss = masked_cross_entropy(
                logits, target, weight, reduction="none", inplace_backward=inplace
            )
            (gradient,) = torch.autograd.grad(loss, leaf, v)
            what = f"gradient of {classes} logits, inplace_backward={inplace}"
            yield what, gradient[:, 1:], rounded[:, None].expand(n, classes - 1)
            if classes == 2:  # 2 v (1/2 - 1)
                yield f"{what}, at the target", gradient[:, 0], -rounded
        # In the forward pass, where the weight must hold all of it. A weight of 0 masks.
        fits = (v * classes).isfinite() & (v != 0)
        logits = torch.zeros(int(fits.sum()), classes, dtype=dtype, device=device)
        logits.requires_grad_()
        masked_cross_entropy(logits, target[fits], v[fits] * classes, reduction="sum").backward()
        assert logits.grad is not None
        what = f"gradient of {classes} logits in the forward pass"
        yield what, logits.grad[:, 1:], rounded[fits][:, None].expand(-1, classes - 1)
    ones = torch.ones(n, device=device)
    values = ones.to(dtype).requires_grad_()
    (gradient,) = torch.autograd.grad(masked_reduce(values, ones, reduction="none"), values, v)
    yield "gradient of values", gradient, rounded
    mask = ones.to(dtype).requires_grad_()
    (gradient,) = torch.autograd.grad(masked_reduce(ones, mask, reduction="none"), mask, v)
    yield "gradient of a mask", gradient, rounded


def assert_rounds_to_nearest_even(numbers: Numbers, device: str = "cpu") -> None:
    for what, stored, expected in stores(numbers, device):
        assert stored.dtype == expected.dtype
        same = stored.view(torch.int16) == expected.view(torch.int16)
        wrong = ~(same | (stored.isnan() & expected.isnan()))
        if wrong.any():
            i = int(wrong.nonzero()[0][0])
            raise AssertionError(
                f"{what}: {int(wrong.sum())} of {wrong.numel()} are not rounded to nearest even, "
                f"{stored[i].tolist()} instead of {expected[i].tolist()} for one"
            )
