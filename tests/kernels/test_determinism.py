# SPDX-License-Identifier: BSD-3-Clause
"""The same bits from run to run and for any number of threads, and every output written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from accuracy import Results, accumulation_dtype, run
from samples import CASES, REDUCE_CASES, REDUCTIONS, Case, Sample
from threads import threads
from torch import Tensor

from masked_loss import cross_entropy, masked_cross_entropy, masked_reduce, token_log_probs

OPTIONS: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 0.01}

# Work is shared out between threads by rows, and within rows where these are few and long.
SHAPES = {
    "one very long row": (1, 300_001),
    "few long rows": (3, 100_003),
    "rows of a vocabulary": (64, 6_400),
    "many short rows": (20_000, 37),
    "many tiny rows": (100_000, 2),
}


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh memory is full of NaN: what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_same_bits(a: Results, b: Results, what: str) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), f"{what}: {name}"


def problem(shape: tuple[int, int], dtype: torch.dtype, device: str) -> list[Tensor]:
    rows, classes = shape
    torch.manual_seed(0)
    logits = (3 * torch.randn(rows, classes, device=device)).to(dtype).requires_grad_()
    target = torch.randint(classes, (rows,), device=device)
    mask = torch.rand(rows, device=device) * (torch.rand(rows, device=device) < 0.8)
    mask[0] = 1
    return [logits, target, mask.requires_grad_()]


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_any_number_of_threads(shape: tuple[int, int], reduction: str, kind: str) -> None:
    tensors = problem(shape, getattr(torch, kind), "cpu")
    results = []
    for number in (1, 2, 3, 4):
        sample = Sample(*tensors, {"reduction": reduction, **OPTIONS})
        with threads(number):
            results.append(run(masked_cross_entropy, sample, return_stats=True))
    for number, result in zip((2, 3, 4), results[1:], strict=True):
        assert_same_bits(results[0], result, f"{number} threads")


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_any_number_of_threads_in_masked_reduce(reduction: str) -> None:
    values = torch.randn(300, 1001, requires_grad=True)
    mask = torch.rand(300, 1001, requires_grad=True)
    results = []
    for number in (1, 2, 3, 4):
        with threads(number):
            sample = Sample(values, None, mask, {"reduction": reduction})
            results.append(run(masked_reduce, sample))
    for result in results[1:]:
        assert_same_bits(results[0], result, "masked_reduce")


def test_any_number_of_threads_with_probabilities() -> None:
    for rows, classes in ((3, 50_000), (5_000, 37)):
        input = torch.randn(rows, classes, requires_grad=True)
        target = torch.rand(rows, classes)
        results = []
        for number in (1, 2, 3, 4):
            with threads(number):
                loss = cross_entropy(input, target)
                results.append((loss, *torch.autograd.grad(loss, input)))
        for loss, gradient in results[1:]:
            assert torch.equal(loss, results[0][0])
            assert torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_run_to_run(shape: tuple[int, int], reduction: str, device: str) -> None:
    tensors = problem(shape, torch.float32, device)
    sample = Sample(*tensors, {"reduction": reduction, **OPTIONS})
    first = run(masked_cross_entropy, sample, return_stats=True)
    for _ in range(2):
        again = run(masked_cross_entropy, sample, return_stats=True)
        assert_same_bits(first, again, "another run")


@pytest.mark.parametrize("shape", [(3, 100_003), (2_000, 37)], ids=str)
def test_where_the_rows_lie_does_not_matter(shape: tuple[int, int]) -> None:
    """The same bits from aligned rows, and from rows that begin at any odd address."""
    rows, classes = shape
    logits, target, mask = problem(shape, torch.float32, "cpu")
    first = None
    for offset in range(5):
        base = torch.zeros(rows, classes + 5)
        view = base[:, offset : offset + classes]
        view.copy_(logits.detach())
        sample = Sample(view.requires_grad_(), target, mask, OPTIONS)
        result = run(masked_cross_entropy, sample, return_stats=True)
        first = first or result
        assert_same_bits(first, result, f"offset {offset}")


@pytest.mark.parametrize("cols", [2003, 2048])
@pytest.mark.parametrize("function", [masked_cross_entropy, token_log_probs])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}], ids=["plain", "softcap"])
def test_how_many_rows_there_are_does_not_matter(
    options: dict[str, Any], function: Callable[..., Tensor], cols: int, dtype: torch.dtype
) -> None:
    """A gradient of more than 4 MiB is written around the caches, by lines of 64 bytes."""
    rows = (5 << 20) // (cols * dtype.itemsize)
    logits, target, mask = problem((rows, cols), dtype, "cpu")
    mask = mask.detach() != 0
    upstream = torch.randn(rows).to(accumulation_dtype(dtype))
    more = {"reduction": "none"} if function is masked_cross_entropy else {}

    def gradient(part: slice, inplace: bool) -> Tensor:
        leaf = logits.detach()[part].clone().requires_grad_()
        how = {"inplace_backward": inplace, **options, **more}
        loss = function(leaf * 1, target[part], mask[part], **how)
        return torch.autograd.grad(loss, leaf, upstream[part])[0]

    few = torch.cat([gradient(slice(i, i + 100), False) for i in range(0, rows, 100)])
    for inplace in (False, True):
        assert torch.equal(gradient(slice(None), inplace), few)


@pytest.mark.parametrize("function", [masked_cross_entropy, token_log_probs])
def test_in_place_around_segments(function: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """The derivative at a target is computed before the segment with it is overwritten."""
    logits = torch.randn(6, 40_000).to(dtype)
    target = torch.tensor([0, 16_383, 16_384, 16_385, 32_768, 39_999])
    found = []
    for inplace in (False, True):
        leaf = logits.clone().requires_grad_()
        loss = function(leaf * 1, target, inplace_backward=inplace).sum()
        found.append(torch.autograd.grad(loss, leaf, torch.tensor(0.3).to(loss))[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("case", [*CASES, *REDUCE_CASES], ids=str)
def test_every_output_is_written(case: Case, device: str) -> None:
    function = masked_reduce if case.classes is None else masked_cross_entropy
    for dtype in (torch.float32, torch.float16):
        expected = run(function, case.sample(dtype, device))
        with poisoned_memory():
            result = run(function, case.sample(dtype, device))
        assert_same_bits(expected, result, str(case))
        assert all(tensor.isfinite().all() for tensor in result.values())
