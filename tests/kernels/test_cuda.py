# SPDX-License-Identifier: BSD-3-Clause
"""What only a GPU can show: streams, captured graphs, the host that does not wait, asserts.

The values are the other tests' business: those with a `device` run on the GPU too, where there is
one. Of those without, the ones of kernels that nothing else calls are repeated at the end.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import log_prob_samples
import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate_as_eager
from samples import CASES, FEW_CASES, Case
from shards import sharded, splits
from torch import Tensor
from torch.utils._pytree import tree_map

from masked_loss import linear_cross_entropy, masked_cross_entropy, reference, token_log_probs

pytestmark = pytest.mark.cuda

N, D, V = 64, 32, 5000


def inputs(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator("cuda").manual_seed(seed)
    hidden = torch.randn(N, D, device="cuda", generator=random)
    target = torch.randint(V, (N,), device="cuda", generator=random)
    mask = torch.randint(2, (N,), device="cuda", generator=random)
    return hidden, target, mask


def of_logits(hidden: Tensor, weight: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    return masked_cross_entropy(F.linear(hidden, weight), target, mask)


LOSSES = pytest.mark.parametrize(
    "loss", [of_logits, linear_cross_entropy], ids=["logits", "linear"]
)


@LOSSES
def test_a_captured_step_computes_what_it_is_given(loss: Callable[..., Tensor]):
    weight = torch.randn(V, D, device="cuda", requires_grad=True)

    def step(hidden: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        value = loss(hidden, weight, *rest)
        return value, *torch.autograd.grad(value, weight)

    static = inputs(0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*static)
    for seed in (1, 2):
        for old, new in zip(static, inputs(seed), strict=True):
            old.copy_(new)
        graph.replay()
        for ours, truth in zip(captured, step(*static), strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-6)


@pytest.fixture
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "sequence_mean"])
def test_the_host_does_not_wait(reduction: str, waiting_is_an_error: None):
    logits = torch.randn(4, 8, V, device="cuda", requires_grad=True)
    target = torch.zeros(4, 8, dtype=torch.int64, device="cuda")
    loss, _ = masked_cross_entropy(
        logits, target, target == 0, reduction=reduction, return_stats=True
    )
    (2 * loss).sum().backward()


def test_kernels_run_in_the_current_stream():
    logits = torch.full((256, V), float("nan"), device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)
        logits.zero_()
        loss = masked_cross_entropy(logits, torch.zeros(256, dtype=torch.int64, device="cuda"))
    torch.cuda.synchronize()
    torch.testing.assert_close(loss, torch.tensor(float(V), device="cuda").log())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_kernels_run_on_the_tensors_device():
    logits = torch.zeros(4, V, device="cuda:1", requires_grad=True)
    loss = masked_cross_entropy(logits, torch.zeros(4, dtype=torch.int64, device="cuda:1"))
    loss.backward()
    assert loss.device == logits.device
    torch.testing.assert_close(loss.cpu(), torch.tensor(float(V)).log())


def test_a_step_takes_one_gradient_of_memory():
    logits = torch.zeros(1024, V, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    target = torch.zeros(1024, dtype=torch.int64, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    masked_cross_entropy(logits, target).backward()
    assert torch.cuda.max_memory_allocated() - before <= logits.nbytes + (1 << 20)


def run_alone(code: str) -> subprocess.CompletedProcess[str]:
    """In a process that has not used the device before, and may lose it."""
    lines = ["import ctypes, os, torch, masked_loss", *textwrap.dedent(code).splitlines()]
    return subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)


def test_a_capture_may_come_first():
    """The kernels are loaded while the stream is captured, some with much shared memory, or in
    clusters."""
    result = run_alone("""
        logits = torch.zeros(400, 60_000, device="cuda", requires_grad=True)
        target = torch.zeros(400, dtype=torch.int64, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = masked_loss.masked_cross_entropy(logits, target)
            (gradient,) = torch.autograd.grad(loss, logits)
        graph.replay()
        torch.testing.assert_close(loss.exp().item(), 60_000.0, rtol=1e-5, atol=0)
        assert gradient[:, 0].sum().item() < -0.99
    """)
    assert result.returncode == 0, result.stderr


def test_a_target_out_of_range_stops_the_kernel():
    """What the device prints goes to C's stdout, whose buffer a process that aborts would lose."""
    result = run_alone("""
        logits = torch.zeros(5, 10, device="cuda")
        target = torch.tensor([0, 1, 2, 12, 4], device="cuda")
        try:
            masked_loss.masked_cross_entropy(logits, target)
            torch.cuda.synchronize()
        except RuntimeError:
            ctypes.CDLL(None).fflush(None)
            os._exit(3)
    """)
    assert result.returncode == 3, result.stderr
    said = result.stdout + result.stderr
    assert "target of token 3 is 12, expected 0 <= target < 10" in said or "Assertion" in said


@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
@pytest.mark.parametrize(
    ("dtype", "classes"), [(torch.float32, 60_001), (torch.bfloat16, 110_001)], ids=str
)
def test_rows_that_a_cluster_shares(dtype: torch.dtype, classes: int, inplace: bool):
    """Too many to be cut into parts otherwise, and too long for a block's shared memory."""
    logits = (3 * torch.randn(300, classes, device="cuda")).to(dtype).requires_grad_()
    target = torch.randint(classes, (300,), device="cuda")
    mask = torch.rand(300, device="cuda") < 0.7
    loss = masked_cross_entropy(logits * 1, target, mask, inplace_backward=inplace)
    (gradient,) = torch.autograd.grad(loss, logits)
    exact = logits.detach().double().requires_grad_()
    truth = reference.masked_cross_entropy(exact, target, mask)
    (expected,) = torch.autograd.grad(truth, exact)
    torch.testing.assert_close(loss.double(), truth.detach(), rtol=1e-6, atol=0)
    rtol = max(torch.finfo(dtype).eps, 16 * torch.finfo(torch.float32).eps)
    largest = expected.abs().max().item()
    torch.testing.assert_close(gradient.double(), expected, rtol=rtol, atol=1e-7 * largest)


def on_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of the same tensors, there, and its results brought back."""

    def moved(device: str) -> Callable[[Any], Any]:
        return lambda x: x.to(device) if isinstance(x, Tensor) else x

    def call(*args: Any, **options: Any) -> Any:
        results = function(*tree_map(moved("cuda"), args), **tree_map(moved("cuda"), options))
        return tree_map(moved("cpu"), results)

    return call


@pytest.mark.parametrize("options", log_prob_samples.OPTIONS)
@pytest.mark.parametrize("ids", [None, 1, 5, 300], ids=lambda k: f"{k}_ids")
@pytest.mark.parametrize("classes", [1, 33, 1025, 40_000])
def test_log_probs(classes: int, ids: int | None, options: str, dtype: torch.dtype):
    log_prob_samples.check(classes, ids, options, dtype, on_gpu(token_log_probs))


@pytest.mark.parametrize("case", CASES[::6], ids=str)
def test_every_option_of_shards(case: Case):
    check_shards(case, torch.float32)


@pytest.mark.parametrize("case", FEW_CASES[::3], ids=str)
def test_every_dtype_of_shards(case: Case, dtype: torch.dtype):
    check_shards(case, dtype)


def check_shards(case: Case, dtype: torch.dtype) -> None:
    """By ranks that are threads, on one GPU."""
    ours = sharded(on_gpu(masked_cross_entropy), splits(case.classes or 0, f"{case}-{dtype}"))
    assert_as_accurate_as_eager(
        ours, reference.masked_cross_entropy, case, dtype, return_stats=True
    )


@pytest.mark.parametrize("options", ["plain", "everything"])
@pytest.mark.parametrize("ids", [None, 5], ids=lambda k: f"{k}_ids")
def test_log_probs_of_shards(ids: int | None, options: str, dtype: torch.dtype):
    results = 2 if options == "everything" else 1
    function = sharded(on_gpu(token_log_probs), splits(1025, f"{ids}{dtype}"), results)
    log_prob_samples.check(1025, ids, options, dtype, function)
