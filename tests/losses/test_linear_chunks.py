# SPDX-License-Identifier: BSD-3-Clause
"""How linear_cross_entropy computes: chunks, packed tokens, half types, memory, threads."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from linear_samples import (
    CLASSES,
    SHAPE,
    WIDTH,
    assert_accurate,
    concrete,
    double,
    evaluate,
    problem,
    specification,
)
from opchecks import opchecks
from samples import REDUCTIONS
from threads import threads
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import masked_loss
from masked_loss import linear_cross_entropy
from masked_loss._op import linear_chunks
from masked_loss._op.linear_chunks import Head, Source, run_chunks
from masked_loss.options import Chunking


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("chunk_tokens", [1, 2, 7, 15, 100, None])
def test_chunks_do_not_change_the_result(
    chunk_tokens: int | None, reduction: str, dtype: torch.dtype
) -> None:
    tensors = problem(*SHAPE, dtype=dtype)
    options = concrete("everything", reduction, dtype)
    whole = evaluate(linear_cross_entropy, tensors, chunk_tokens=1000, **options)
    parts = evaluate(linear_cross_entropy, tensors, chunk_tokens=chunk_tokens, **options)
    eps = torch.finfo(dtype).eps
    for name in whole:
        atol = 8 * eps * max(1.0, whole[name].abs().max().item())
        torch.testing.assert_close(parts[name], whole[name], rtol=8 * eps, atol=atol)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_over_many_chunks(dtype: torch.dtype) -> None:
    """A sum over 64 chunks is as close to the truth as one product that accumulates in float32."""

    def make() -> dict[str, Tensor]:
        tensors = problem(512, width=64, classes=200, dtype=dtype)
        with torch.no_grad():
            tensors["weight"] *= 0.125
        return tensors

    # A product of 8 rows rounds some float16 logits otherwise than one of 512: the mask's gradient.
    assert_accurate(make, chunk_tokens=8, roundings=3 if dtype == torch.float16 else None)


def test_accumulation_dtype() -> None:
    """bfloat16 sums lose the later of many equal terms; float32 ones do not."""
    ones = torch.ones(2048, 1, dtype=torch.bfloat16)
    tensors = {
        "hidden": ones,
        "weight": torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True),
        "target": torch.zeros(2048, dtype=torch.int64),
    }
    options = {"reduction": "sum", "chunk_tokens": 1, "upstream": torch.tensor(1.0)}
    exact = evaluate(linear_cross_entropy, tensors, **options)
    low = evaluate(linear_cross_entropy, tensors, accumulation_dtype=torch.bfloat16, **options)
    expected = torch.tensor([[-1024.0], [1024.0]], dtype=torch.bfloat16)
    assert torch.equal(exact["weight"], expected)
    assert low["weight"].dtype == torch.bfloat16
    assert (low["weight"].abs() < 0.5 * expected.abs()).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("scale", [1.0, 65536.0, 2.0**-10, 0.3, 0.0])
def test_float16_gradients_do_not_underflow(scale: float, reduction: str) -> None:
    """A mean over many tokens has logits gradients below the smallest float16."""
    tensors = problem(
        2, 2048, width=8, classes=64, dtype=torch.float16, requires=("hidden", "weight", "bias")
    )
    del tensors["mask"]
    shape = (2, 2048) if reduction == "none" else ()
    upstream = torch.full(shape, scale / 2048 if reduction == "none" else scale)
    if reduction == "sum":
        upstream /= 4096
    ours = evaluate(linear_cross_entropy, tensors, upstream, reduction=reduction)
    truth = evaluate(specification, double(tensors), upstream.double(), reduction=reduction)
    for name in ("weight", "bias", "hidden"):
        expected = truth[name].to(torch.float16).double()  # what float16 can hold of it
        bound = 3e-3 * truth[name].abs().max() + 2**-24
        assert (ours[name].double() - expected).abs().max() <= bound, name


def test_float16_weight_gradient_beyond_its_partial_sums() -> None:
    """Sums of a chunk exceed the largest float16, the mean does not."""
    tensors = {
        "hidden": torch.full((4096, 2), 200.0, dtype=torch.float16),
        "weight": torch.zeros(2, 2, dtype=torch.float16, requires_grad=True),
        "target": torch.zeros(4096, dtype=torch.int64),
    }
    result = evaluate(linear_cross_entropy, tensors, torch.tensor(1.0))
    assert torch.equal(result["weight"], torch.tensor([[-100.0] * 2, [100.0] * 2]).half())


@pytest.mark.parametrize("chunk_tokens", [2, None])
def test_weight_that_is_not_contiguous(chunk_tokens: int | None, dtype: torch.dtype) -> None:
    def transposed() -> dict[str, Tensor]:
        weight = torch.randn(WIDTH, CLASSES).to(dtype).t().requires_grad_()
        return {**problem(*SHAPE, dtype=dtype), "weight": weight}

    def expanded() -> dict[str, Tensor]:
        weight = torch.randn(CLASSES, 1).to(dtype).expand(CLASSES, WIDTH).requires_grad_()
        return {**problem(*SHAPE, dtype=dtype), "weight": weight}

    assert_accurate(transposed, chunk_tokens=chunk_tokens)
    assert_accurate(expanded, chunk_tokens=chunk_tokens)


def test_large_enough_for_pages_of_their_own() -> None:
    """Tensors that are allocated apart, and the second step that uses their memory again."""

    def make() -> dict[str, Tensor]:
        tensors = problem(300, width=64, classes=20_000, requires=("hidden", "weight"))
        with torch.no_grad():
            tensors["weight"] *= 0.125
        return tensors

    tensors = make()
    first = evaluate(linear_cross_entropy, tensors, torch.tensor(1.0))
    kept = {name: x.clone() for name, x in first.items()}
    assert_accurate(make)
    evaluate(linear_cross_entropy, tensors, torch.tensor(-3.0))
    for name in first:
        assert torch.equal(first[name], kept[name]), "a later step changed a gradient"


def test_masked_tokens_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    mm = torch.mm

    def count(a: Tensor, b: Tensor, **kwargs: Any) -> Tensor:
        rows.append(a.shape[0] if a.shape[1] == WIDTH else None)
        return mm(a, b, **kwargs)

    monkeypatch.setattr(torch, "mm", count)
    tensors = problem(8, 16, requires=("hidden", "weight"))
    del tensors["bias"]
    evaluate(linear_cross_entropy, tensors)
    products = [n for n in rows if n is not None]
    assert sum(products) == tensors["mask"].count_nonzero()
    assert len(rows) == 3


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_without_packing(
    reduction: str, shift: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the number of active tokens must not be asked for, all are computed: same result."""
    tensors = problem(4, 7, dtype=dtype)
    masked = tensors["mask"] == 0
    options = {"reduction": reduction, "shift": shift, "chunk_tokens": 5, "z_loss": 0.1}
    packed = evaluate(linear_cross_entropy, tensors, **options)
    with torch.no_grad():
        if shift:  # row t scores token t + 1, the last one nothing
            masked = torch.cat([masked[:, 1:], torch.ones(4, 1, dtype=torch.bool)], dim=1)
        tensors["hidden"][masked] = float("nan")
    # As under graph capture on CUDA.
    monkeypatch.setattr(masked_loss._op.linear_chunks, "_may_wait", lambda x, pack: False)
    monkeypatch.setattr(torch.Tensor, "nonzero", None)
    eps = torch.finfo(dtype).eps
    rows = tensors["hidden"].detach()
    for hidden in (rows, rows.transpose(0, 1).contiguous().transpose(0, 1)):  # with and without
        result = evaluate(
            linear_cross_entropy, {**tensors, "hidden": hidden.requires_grad_()}, **options
        )
        for name in packed:
            bound = 8 * eps * max(1.0, packed[name].abs().max().item())
            torch.testing.assert_close(result[name], packed[name], rtol=8 * eps, atol=bound)


@pytest.mark.parametrize("sequences", [1, 2, 3])
def test_tokens_know_their_sequence(sequences: int) -> None:
    """Whose share of the mean is in the table of groups: that of all, or a row for each token."""

    def make() -> dict[str, Tensor]:
        return problem(sequences, 5)

    assert_accurate(make, reduction="sequence_mean", chunk_tokens=2)


@pytest.mark.cuda
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_host_waits_once(reduction: str, dtype: torch.dtype) -> None:
    """For the number of active tokens; "none", whose backward packs again, twice."""
    tensors = problem(4, 7, dtype=dtype, device="cuda")
    upstream = torch.ones((4, 7) if reduction == "none" else (), device="cuda")
    evaluate(linear_cross_entropy, tensors, upstream, reduction=reduction)  # makes cuBLAS's handle
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            evaluate(linear_cross_entropy, tensors, upstream, reduction=reduction, chunk_tokens=5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in said if "synchronizing CUDA operation" in str(w.message)]
    assert len(waits) == (2 if reduction == "none" else 1)


@pytest.mark.parametrize(
    ("requires", "products"),
    [((), 1), (("hidden",), 2), (("weight",), 2), (("hidden", "weight"), 3), (("mask",), 1)],
)
def test_gradients_nobody_asked_for_are_not_computed(
    requires: tuple[str, ...], products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **kw: (calls.append(1), mm(*args, **kw))[1])
    tensors = problem(*SHAPE, requires=requires)
    del tensors["bias"]
    evaluate(linear_cross_entropy, tensors)
    assert len(calls) == products
    if requires:
        with torch.no_grad():
            linear_cross_entropy(tensors["hidden"], tensors["weight"], tensors["target"])
        assert len(calls) == products + 1


@pytest.mark.parametrize("chunk_tokens", [None, 16])
def test_number_of_threads(
    chunk_tokens: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bits do not depend on it, where those of PyTorch's products do not."""

    def serial(product: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with threads(1):
                return product(*args, **kwargs)

        return call

    for owner, name in ((torch, "mm"), (torch, "addmm"), (torch.Tensor, "addmm_")):
        monkeypatch.setattr(owner, name, serial(getattr(owner, name)))
    tensors = problem(64, width=16, classes=3000, dtype=dtype)
    with threads(1):
        expected = evaluate(linear_cross_entropy, tensors, chunk_tokens=chunk_tokens)
    for number in (2, 3):
        with threads(number):
            result = evaluate(linear_cross_entropy, tensors, chunk_tokens=chunk_tokens)
        for name in expected:
            assert torch.equal(result[name], expected[name]), name


MEMORY = """
import ctypes
import torch, masked_loss

trim = ctypes.CDLL(None).malloc_trim

def peak():
    with open("/proc/self/status") as status:
        fields = dict(line.split(":", 1) for line in status)
    return int(fields["VmHWM"].split()[0]) << 10

def step(tokens, width, classes, reduction, share):
    masked_loss.empty_cache()
    trim(0)  # memory that is used again would count as nothing
    hidden = torch.randn(tokens, width).to(torch.{dtype}).requires_grad_()
    weight = torch.randn(classes, width).to(torch.{dtype}).requires_grad_()
    target = torch.randint(classes, (tokens,))
    mask = torch.rand(tokens) < share
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    before = peak()
    loss = masked_loss.linear_cross_entropy(hidden, weight, target, mask, reduction=reduction)
    loss.sum().backward()
    return peak() - before - hidden.grad.nbytes - weight.grad.nbytes

torch.set_num_threads(2)
step(64, 16, 64, "mean", 2)
for reduction, share in (("mean", 0.99), ("none", 2)):
    print(step(*{shape}, reduction, share) / 2**20)
"""
CHUNK = 64  # MiB
SUMS = 4 * 64 * 32_000 / 2**20  # in float32, of a half-precision weight's gradient
# Of one chunk they are torch's, where the processor has no bf16 instructions.
SUMS_OF_ONE = 4 * 64 * 65_536 / 2**20
PEAKS = {
    "float32": ("float32", (1024, 512, 32_000), CHUNK),
    "float32, many classes": ("float32", (2000, 16, 100_000), CHUNK),
    "float32, many tokens": ("float32", (20_000, 16, 10_000), CHUNK),
    "bfloat16, one chunk": ("bfloat16", (512, 64, 65_536), CHUNK + SUMS_OF_ONE + 4),
    "bfloat16": ("bfloat16", (1040, 64, 32_000), CHUNK + SUMS + 16),
    "float16": ("float16", (1040, 64, 32_000), CHUNK + SUMS + 16),
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("case", PEAKS)
def test_peak_memory(case: str) -> None:
    """One chunk and what the products work in, above the arguments and their gradients.

    Of a mean over nearly all tokens, and of the losses of all: two chunks of the half types.
    """
    dtype, shape, most = PEAKS[case]
    least = [float("inf")] * 2
    # What a step needs is the least that it was seen to take: on a machine that is busy otherwise,
    # threads that start late get heaps of their own, which only ever adds.
    for _ in range(4):
        run = subprocess.run(
            [sys.executable, "-c", MEMORY.format(dtype=dtype, shape=shape)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "MALLOC_ARENA_MAX": "1"},
        )
        assert run.returncode == 0, run.stderr
        least = [min(pair) for pair in zip(least, map(float, run.stdout.split()), strict=True)]
        if max(least) <= most:
            break
    assert max(least) <= most, least


class Device(TorchDispatchMode):
    """Counts what is launched for tensors on meta, and the bytes that are allocated for them."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[str] = []
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name().removeprefix("aten::")
        if "empty" in name or name == "new_zeros":
            self.bytes += result.numel() * result.element_size()
        elif not func.is_view:
            self.launches.append(name)
        return result


def step_on_device(
    tokens: int, chunking: Chunking, dtype: torch.dtype = torch.bfloat16, frozen: bool = False
) -> Device:
    """Gradients from a head of 128256 classes and width 4096, scaled and in their final type."""
    with Device() as device:
        hidden, weight = (
            torch.empty(n, 4096, dtype=dtype, device="meta") for n in (tokens, 128_256)
        )
        weights, factor = torch.empty(tokens, device="meta"), torch.empty((), device="meta")
        device.bytes = 0
        source = Source(Head(hidden, weight, None), weights, False, chunking)
        needs = [True, not frozen, False]
        gradients = run_chunks(source, tokens, chunking, needs, lambda y, *_: y, dtype)
        for gradient in gradients[: 1 if frozen else 2]:
            linear_chunks.scaled_by(gradient, factor, dtype, reuse=True)
    return device


CHUNKS_ON_A_DEVICE: dict[str, tuple[int, int, Chunking, dict[str, Any]]] = {
    # tokens, chunks
    "as many bytes as sums": (8192, 1, Chunking(pack=False), {}),
    "asked for sums": (8192, 1, Chunking(None, torch.float32, pack=False), {}),
    "more bytes than sums": (8193, 5, Chunking(pack=False), {}),
    "asked for chunks": (8192, 2, Chunking(4096, pack=False), {}),
    "asked for no sums": (8192, 5, Chunking(None, torch.bfloat16, pack=False), {}),
    "frozen weight": (8192, 5, Chunking(pack=False), {"frozen": True}),
    "float16": (8192, 5, Chunking(pack=False), {"dtype": torch.float16}),
}


@pytest.mark.parametrize("case", CHUNKS_ON_A_DEVICE)
def test_one_chunk_where_the_sums_of_several_would_take_its_memory(case: str) -> None:
    """Elsewhere than on a CPU: 8192 tokens' bfloat16 logits take what V * 4096 float32 sums do."""
    tokens, chunks, chunking, of_step = CHUNKS_ON_A_DEVICE[case]
    device = step_on_device(tokens, chunking, **of_step)
    products = [name for name in device.launches if "mm" in name]
    assert len(products) == chunks * (2 if "frozen" in of_step else 3)
    if chunks == 1:
        assert products == ["mm.out"] * 3
        results, sums = 2 * (128_256 + tokens) * 4096, 4 * 128_256 * 4096
        gathered = 2 * tokens * 4096  # nobody knows here which tokens count
        assert device.bytes <= results + sums + gathered


def test_sums_of_several_chunks_are_float32() -> None:
    """Logits wider than their weight, as those of divergences, fill chunks sooner."""
    weight = torch.empty(1 << 16, 2, dtype=torch.bfloat16)
    for logits, most in ((torch.bfloat16, 512), (torch.float32, 256)):
        for tokens, dtype in ((most, torch.bfloat16), (most + 1, torch.float32)):
            assert linear_chunks.dweight_dtype(logits, weight, tokens, Chunking()) == dtype


def test_a_gradient_is_scaled_by_one_launch() -> None:
    """Elsewhere than on a CPU, whose caches want it in pieces: here 500 of them."""
    with Device() as device:
        gradient = torch.empty(128256, 4096, device="meta")
        factor = torch.empty((), device="meta")
        linear_chunks.scaled_by(gradient, factor, torch.bfloat16, reuse=True)
        linear_chunks.scaled_by(gradient, factor, torch.float32, reuse=True)
    assert device.launches == ["masked_loss::scale"] * 2


@opchecks("scale")
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_opcheck_of_scaling(half: torch.dtype) -> None:
    gradient, factor = torch.randn(3, 5), torch.tensor(0.3)
    torch.library.opcheck(
        torch.ops.masked_loss.scale.default, (gradient.to(half), gradient, factor)
    )
