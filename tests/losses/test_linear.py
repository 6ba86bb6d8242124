# SPDX-License-Identifier: BSD-3-Clause
"""linear_cross_entropy is masked_cross_entropy of F.linear, without the logits.

The truth is the specification in float64. The baseline is what a model does without this function:
F.linear in its own dtype, then the specification in float32.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import DRAWS, Errors, accumulation_dtype, compare
from samples import BAD_OPTIONS, OPTIONS, REDUCTIONS
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._python_dispatch import TorchDispatchMode

import masked_loss
from masked_loss import linear_cross_entropy, masked_cross_entropy, reference
from masked_loss._op import linear_chunks

OPTION_NAMES = [name for name in OPTIONS if name != "inplace"]
ROUNDINGS = 4
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


def concrete(name: str, reduction: str, dtype: torch.dtype, device: str = "cpu") -> dict[str, Any]:
    """The options that OPTIONS names, as arguments of a call."""
    options = {"reduction": reduction, **OPTIONS[name]}
    wide = accumulation_dtype(dtype)
    if "normalizer" in options and reduction == "none":
        del options["normalizer"]
    if options.get("class_weight") is True:
        random = torch.Generator().manual_seed(3)
        options["class_weight"] = (0.5 + torch.rand(CLASSES, generator=random)).to(device, wide)
    if options.get("normalizer") == "tensor":
        options["normalizer"] = torch.tensor(6.5, dtype=wide, device=device)
    if options.get("temperature") == "each":
        random = torch.Generator().manual_seed(4)
        options["temperature"] = (0.5 + torch.rand(SHAPE, generator=random)).to(device, wide)
    return options


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
) -> dict[str, Tensor]:
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


def assert_accurate(make: Callable[[], dict[str, Tensor]], **options: Any) -> None:
    """No further from the truth than the baseline, and a few roundings: chunks add up differently.

    A result of few elements is sometimes right by luck, and the baseline's then sets no measure:
    where one draw of the numbers fails, the worst of DRAWS counts, for both sides.
    """
    keywords = ("chunk_tokens", "accumulation_dtype")
    plain = {name: value for name, value in options.items() if name not in keywords}
    wide = {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in plain.items()
    }
    worst: dict[str, Errors] = {}
    for draw in range(DRAWS):
        torch.manual_seed(draw)
        tensors = make()
        dtype = tensors["hidden"].dtype
        ours = evaluate(linear_cross_entropy, tensors, **options)
        baseline = evaluate(specification, tensors, **plain)
        truth = evaluate(specification, double(tensors), **wide)
        assert ours.keys() == truth.keys()
        for name in truth:
            if name not in LEAVES:
                expected = accumulation_dtype(dtype) if name == "loss" else torch.float64
                assert ours[name].dtype == expected, name
            errors = compare(ours[name], baseline[name], truth[name], dtype, name, ROUNDINGS)
            worst[name] = Errors(*map(max, zip(errors, worst.get(name, errors), strict=True)))
        failed = {n: e for n, e in worst.items() if not e.ours <= e.eager + e.rounding}
        if not failed:
            return
    raise AssertionError(failed)


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], **tolerance: Any) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance
        )


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# Numbers


@pytest.mark.parametrize("chunk_tokens", [None, 4])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", OPTION_NAMES)
def test_every_option(
    name: str, reduction: str, chunk_tokens: int | None, dtype: torch.dtype, device: str
) -> None:
    options = concrete(name, reduction, dtype, device)

    def make() -> dict[str, Tensor]:
        tensors = problem(*SHAPE, dtype=dtype, device=device)
        tensors["target"][0, 1] = options.get("ignore_index", -100)
        return tensors

    assert_accurate(make, chunk_tokens=chunk_tokens, **options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ["z_loss", "everything"])
def test_statistics(name: str, reduction: str, dtype: torch.dtype, device: str) -> None:
    options = concrete(name, reduction, dtype, device)
    if dtype in (torch.bfloat16, torch.float16):
        options.pop("softcap", None)  # its logits, rounded, tie: the argmax is no single class
    make = partial(problem, *SHAPE, dtype=dtype, device=device)
    assert_accurate(make, chunk_tokens=3, return_stats=True, **options)


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

    assert_accurate(make, chunk_tokens=8)


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


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(reduction: str) -> None:
    tensors = problem(*SHAPE, dtype=torch.float64)
    mask = tensors["mask"].detach()
    mask = mask.where(mask != 0, 0.5).requires_grad_()
    options = concrete("everything", reduction, torch.float64)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
        return linear_cross_entropy(
            hidden, weight, tensors["target"], mask, bias=bias, chunk_tokens=4, **options
        )

    inputs = tensors["hidden"], tensors["weight"], tensors["bias"], mask
    torch.autograd.gradcheck(loss, inputs, check_batched_grad=False)


@pytest.mark.parametrize("kind", ["bool", "int64", "bfloat16", "float64"])
def test_every_kind_of_mask(kind: str) -> None:
    def make() -> dict[str, Tensor]:
        tensors = problem(*SHAPE, requires=("hidden", "weight"))
        tensors["mask"] = (3 * tensors["mask"]).to(getattr(torch, kind))
        assert tensors["mask"].count_nonzero() > 2
        return tensors

    assert_accurate(make)


@pytest.mark.parametrize("name", ["everything", "plain"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (13,), (2, 3, 4), (4, 1), (0,), (2, 0)])
def test_shapes(shape: tuple[int, ...], name: str) -> None:
    if not shape and name == "everything":
        pytest.skip("shift needs a time dimension")

    def make() -> dict[str, Tensor]:
        tensors = problem(*shape, dtype=torch.float64)
        if not shape:
            tensors["mask"] = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        return tensors

    for reduction in ("none", "mean") if not shape else REDUCTIONS:
        options = concrete(name, reduction, torch.float64)
        assert_accurate(make, **options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_hidden_states_without_width(
    bias: bool, reduction: str, dtype: torch.dtype, device: str
) -> None:
    def make() -> dict[str, Tensor]:
        tensors = problem(*SHAPE, width=0, dtype=dtype, device=device)
        return tensors if bias else {n: x for n, x in tensors.items() if n != "bias"}

    assert_accurate(make, reduction=reduction, chunk_tokens=4)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_meta_device(reduction: str, dtype: torch.dtype) -> None:
    """Shapes and types, of gradients too, as where there are numbers."""
    tensors = problem(*SHAPE, dtype=dtype)
    expected = evaluate(linear_cross_entropy, tensors, reduction=reduction)
    on_meta = {
        name: x.detach().to("meta").requires_grad_(x.requires_grad) for name, x in tensors.items()
    }
    got = evaluate(linear_cross_entropy, on_meta, reduction=reduction)
    for name, x in expected.items():
        assert (got[name].shape, got[name].dtype, got[name].is_meta) == (x.shape, x.dtype, True)


def test_int32_targets() -> None:
    tensors = problem(*SHAPE)
    expected = evaluate(linear_cross_entropy, tensors)
    tensors["target"] = tensors["target"].int()
    assert_close(evaluate(linear_cross_entropy, tensors), expected)


def sample_layout(layout: str) -> Tensor:
    if layout == "transposed batch":
        return torch.randn(5, 3, WIDTH).transpose(0, 1)
    if layout == "padded":
        return torch.randn(3, 5, WIDTH + 3)[..., :WIDTH]
    if layout == "no rows":  # the token dimensions cannot be seen as one
        return torch.randn(3, 7, WIDTH)[:, :5].transpose(0, 1)[:, :3].transpose(0, 1)
    if layout == "channels first":
        return torch.randn(3, WIDTH, 5).transpose(1, 2)
    if layout == "expanded":
        return torch.randn(5, WIDTH).expand(3, 5, WIDTH)
    raise ValueError(layout)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(
    "layout", ["transposed batch", "padded", "no rows", "channels first", "expanded"]
)
def test_hidden_that_is_not_contiguous(layout: str, masked: bool) -> None:
    def make() -> dict[str, Tensor]:
        tensors = problem(*SHAPE)
        tensors["hidden"] = sample_layout(layout).requires_grad_()
        if not masked:
            del tensors["mask"]
        return tensors

    assert_accurate(make, chunk_tokens=4, z_loss=0.1)


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
        tensors = problem(300, width=64, classes=40_000, requires=("hidden", "weight"))
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


# Masked tokens


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_masked_hidden_states_are_never_read(reduction: str, poison: float, device: str) -> None:
    tensors = problem(4, 7, device=device)
    tensors["target"][0, 2] = -100
    masked = (tensors["mask"] == 0) | (tensors["target"] == -100)
    expected = evaluate(linear_cross_entropy, tensors, reduction=reduction, z_loss=0.1)
    with torch.no_grad():
        tensors["hidden"][masked] = poison
    result = evaluate(linear_cross_entropy, tensors, reduction=reduction, z_loss=0.1)
    for name in expected:
        assert torch.equal(result[name], expected[name]), name
    assert (result["hidden"][masked] == 0).all()
    assert (result["mask"][masked] == 0).all()


def test_active_nan_is_not_hidden() -> None:
    tensors = problem(*SHAPE)
    active = (tensors["mask"] != 0).nonzero()[0]
    with torch.no_grad():
        tensors["hidden"][tuple(active)] = float("nan")
    result = evaluate(linear_cross_entropy, tensors)
    assert result["loss"].isnan()
    assert result["weight"].isnan().any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("how", ["mask", "ignore_index"])
def test_every_token_masked(reduction: str, how: str, dtype: torch.dtype, device: str) -> None:
    tensors = problem(*SHAPE, dtype=dtype, device=device)
    with torch.no_grad():
        tensors["hidden"].fill_(float("nan"))
        if how == "mask":
            tensors["mask"].zero_()
        else:
            tensors["target"].fill_(-100)
    result = evaluate(
        linear_cross_entropy, tensors, reduction=reduction, return_stats=True, z_loss=0.1
    )
    for name, value in result.items():
        assert (value == 0).all(), name


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
    result = evaluate(linear_cross_entropy, tensors, **options)
    eps = torch.finfo(dtype).eps
    for name in packed:
        scale = max(1.0, packed[name].abs().max().item())
        torch.testing.assert_close(result[name], packed[name], rtol=8 * eps, atol=8 * eps * scale)


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


# Autograd


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("frozen", range(15))
def test_frozen_and_trainable(frozen: int, reduction: str, dtype: torch.dtype) -> None:
    requires = tuple(name for i, name in enumerate(LEAVES) if not frozen >> i & 1)
    torch.manual_seed(7)
    everything = problem(*SHAPE, dtype=dtype)
    expected = evaluate(linear_cross_entropy, everything, reduction=reduction, chunk_tokens=4)
    torch.manual_seed(7)
    tensors = problem(*SHAPE, dtype=dtype, requires=requires)
    result = evaluate(linear_cross_entropy, tensors, reduction=reduction, chunk_tokens=4)
    assert set(result) == {"loss", *requires}
    for name in result:
        assert torch.equal(result[name], expected[name]), name


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


def test_no_grad() -> None:
    tensors = problem(*SHAPE)
    args = tensors["hidden"], tensors["weight"], tensors["target"], tensors["mask"]
    expected = linear_cross_entropy(*args)
    assert expected.requires_grad
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            loss = linear_cross_entropy(*args)
        assert not loss.requires_grad
        assert torch.equal(loss, expected.detach())


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_retain_graph(reduction: str, dtype: torch.dtype, device: str) -> None:
    """A second backward gives the same gradient, whatever the first one's upstream was."""
    tensors = problem(*SHAPE, dtype=dtype, device=device)
    leaves = [tensors[name] for name in LEAVES]
    loss = linear_cross_entropy(
        tensors["hidden"], tensors["weight"], tensors["target"], tensors["mask"],
        bias=tensors["bias"], reduction=reduction, chunk_tokens=4,
    ).sum()  # fmt: skip
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    torch.autograd.grad(3 * loss, leaves, retain_graph=True)
    first[0].zero_()
    second = torch.autograd.grad(loss, leaves)
    for a, b, c in zip(first[1:], second[1:], kept[1:], strict=True):
        assert torch.equal(a, c), "a later backward changed a gradient that was given out"
        assert torch.equal(b, c)
    assert torch.equal(second[0], kept[0])
    with pytest.raises(RuntimeError, match=r"second time|retain_graph"):
        torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_func_grad_and_vmap(reduction: str) -> None:
    tensors = problem(4, *SHAPE)
    options = {"reduction": reduction, "chunk_tokens": 4, "z_loss": 0.1}

    def loss(hidden: Tensor, weight: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, target, mask, **options).sum()

    args = [tensors[name].detach() for name in ("hidden", "weight", "target", "mask")]
    per_sample = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, None, 0, 0))
    hidden, weight = per_sample(*args)
    losses = torch.func.vmap(loss, in_dims=(0, None, 0, 0))(*args)
    for i in range(4):
        one = {
            "hidden": args[0][i].clone().requires_grad_(),
            "weight": args[1].clone().requires_grad_(),
            "target": args[2][i],
            "mask": args[3][i],
        }
        value = loss(*one.values())
        gradients = torch.autograd.grad(value, (one["hidden"], one["weight"]))
        torch.testing.assert_close(losses[i], value.detach())
        torch.testing.assert_close((hidden[i], weight[i]), gradients)


def test_weight_shared_with_the_embedding() -> None:
    """One parameter, two uses: its gradient is the sum of both."""
    ids = torch.randint(CLASSES, (4, 7))
    table = torch.randn(CLASSES, WIDTH, requires_grad=True)
    mix = torch.randn(WIDTH, WIDTH)

    def step(function: Callable[..., Tensor]) -> Tensor:
        table.grad = None
        hidden = torch.tanh(F.embedding(ids, table) @ mix)
        function(hidden, table, ids, ids > 2, shift=True).backward()
        assert table.grad is not None
        return table.grad

    torch.testing.assert_close(step(linear_cross_entropy), step(specification))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_hidden_is_not_kept(reduction: str) -> None:
    """By a loss whose gradients are there, not at all; by "none", until backward."""
    tensors = problem(*SHAPE)
    hidden = 2 * tensors["hidden"]  # keeps nothing of its result
    loss = linear_cross_entropy(hidden, tensors["weight"], tensors["target"], reduction=reduction)
    kept = weakref.ref(hidden)
    del hidden
    assert (kept() is not None) == (reduction == "none")
    loss.sum().backward()
    assert kept() is None


def test_weight_may_change_before_backward() -> None:
    """The gradient of a scalar loss exists already. "none" needs the weight again, and says so."""
    tensors = problem(*SHAPE)
    args = tensors["hidden"], tensors["weight"], tensors["target"]
    (expected,) = torch.autograd.grad(linear_cross_entropy(*args), tensors["hidden"])
    loss, losses = linear_cross_entropy(*args), linear_cross_entropy(*args, reduction="none")
    with torch.no_grad():
        tensors["weight"].mul_(2)
    assert torch.equal(torch.autograd.grad(loss, tensors["hidden"])[0], expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("through", ["function", "operator"])
def test_autocast(dtype: torch.dtype, reduction: str, through: str) -> None:
    """hidden, weight and bias as F.linear casts them; nothing else is cast."""
    tensors = problem(*SHAPE)
    low = {
        name: x.detach().to(dtype).requires_grad_() if name in LEAVES[:3] else x
        for name, x in tensors.items()
    }
    expected = evaluate(linear_cross_entropy, low, reduction=reduction, chunk_tokens=4)
    operator = torch.ops.masked_loss.linear_cross_entropy
    function = linear_cross_entropy if through == "function" else operator

    def under_autocast(*args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return function(*args, **kwargs)

    result = evaluate(under_autocast, tensors, reduction=reduction, chunk_tokens=4)
    for name in LEAVES[:3]:
        assert result[name].dtype == torch.float32
        expected[name] = expected[name].float()
    assert_close(result, expected, rtol=0, atol=0)
    double_tensors = double(tensors)
    with torch.autocast("cpu", dtype=dtype):
        assert evaluate(linear_cross_entropy, double_tensors)["loss"].dtype == torch.float64


# torch.compile


def assert_compiles(
    function: Callable[..., Any], samples: list[dict[str, Tensor]], backend: str, **options: Any
) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    torch._dynamo.utils.counters.clear()
    for tensors in samples:
        ours = evaluate(compiled, tensors, **options)
        assert_close(ours, evaluate(function, tensors, **options))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    ("name", "reduction"),
    [("everything", reduction) for reduction in REDUCTIONS] + [("normalizer_tensor", "mean")],
)
def test_compile(name: str, reduction: str, dtype: torch.dtype) -> None:
    options = concrete(name, reduction, dtype)
    samples = [problem(3, 5, dtype=dtype), problem(4, 6, dtype=dtype)]
    assert_compiles(linear_cross_entropy, samples, "aot_eager", **options)


def test_compile_with_statistics_and_frozen_weight() -> None:
    def both(*args: Any, **kwargs: Any) -> Tensor:
        loss, stats = linear_cross_entropy(*args, return_stats=True, **kwargs)
        return loss + 0 * stats.entropy

    samples = [
        problem(3, 5, requires=("hidden", "mask")),
        problem(4, 6, requires=("hidden", "mask")),
    ]
    assert_compiles(both, samples, "aot_eager", chunk_tokens=4)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_inductor(reduction: str) -> None:
    """In the middle of a model, under autocast inside the graph."""

    def model(hidden: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = torch.tanh(F.linear(hidden, torch.eye(WIDTH)))
            return 2 * linear_cross_entropy(x, weight, *args, **kwargs)

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="inductor")
    tensors = problem(*SHAPE)
    ours = evaluate(compiled, tensors, reduction=reduction)
    assert_close(ours, evaluate(model, tensors, reduction=reduction), rtol=2e-2, atol=2e-2)


def test_one_node_in_the_graph() -> None:
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Any]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    tensors = problem(*SHAPE)
    args = tensors["hidden"], tensors["weight"], tensors["target"]
    torch.compile(linear_cross_entropy, fullgraph=True, backend=keep)(*args)
    called = [n for n in graphs[0].graph.nodes if n.op == "call_function"]
    assert [str(node.target) for node in called] == ["masked_loss.linear_cross_entropy.default"]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ["plain", "everything"])
@pytest.mark.parametrize("operator", ["linear_cross_entropy", "linear_cross_entropy_stats"])
def test_opcheck(operator: str, name: str, reduction: str) -> None:
    tensors = problem(*SHAPE)
    args = tensors["hidden"], tensors["weight"], tensors["target"], tensors["mask"]
    options = {**concrete(name, reduction, torch.float32), "bias": tensors["bias"]}
    torch.library.opcheck(getattr(torch.ops.masked_loss, operator).default, args, options)


@pytest.mark.parametrize("chunk_tokens", [None, 4])
@pytest.mark.parametrize("needs", [[True] * 3, [False, True, False], [True, False, True]])
def test_opcheck_of_the_halves(
    needs: list[bool], chunk_tokens: int | None, dtype: torch.dtype
) -> None:
    """Their fakes know every type and stride: that of a weight gradient depends on the chunks."""
    tensors = problem(*SHAPE, dtype=dtype, requires=())
    hidden, weight, bias, mask = (tensors[name] for name in LEAVES)
    target = tensors["target"]
    each = 0.5 + torch.rand(SHAPE)
    inputs = (hidden, weight, bias, target, mask, None, None, torch.tensor([0, 4, 9]), each)
    how = {"chunk_tokens": chunk_tokens, "accumulation_dtype": None, "pack": True}
    how |= {"label_smoothing": 0.1, "z_loss": 0.1, "shift": True}
    forward = torch.ops.masked_loss.linear_cross_entropy_forward.default
    backward = torch.ops.masked_loss.linear_cross_entropy_backward.default
    tests = ("test_schema", "test_faketensor")
    values = how | {"stats": True, "needs": [False] * 3, "reduction": "none"}
    _, _, tokens, groups, *_ = forward(*inputs, **values)
    scalar = how | {"stats": True, "needs": needs, "reduction": "mean"}
    torch.library.opcheck(forward, inputs, scalar, test_utils=tests)
    dloss = torch.rand(SHAPE, dtype=tokens.dtype)
    saved = (dloss, hidden, weight, bias, target, tokens, groups, None, each)
    upstream = how | {"needs": needs, "reduction": "none"}
    torch.library.opcheck(backward, saved, upstream, test_utils=tests)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_opcheck_of_the_kernels(reduction: str) -> None:
    tensors = problem(*SHAPE, requires=())
    target, mask = tensors["target"], tensors["mask"]
    ops, tests = torch.ops.masked_loss, ("test_schema", "test_faketensor")
    classes = tensors["weight"].shape[0]
    options = {"reduction": reduction, "label_smoothing": 0.1, "z_loss": 0.1}
    weigh = (target, mask, None, None, None, classes, False, True)
    torch.library.opcheck(ops.weigh.default, weigh, options, test_utils=tests)
    tokens, groups = ops.weigh(*weigh, **options)
    tokens[1:].zero_()
    logits, index = torch.randn(target.numel(), classes), target.reshape(-1)
    chunk = (logits, index, tokens, groups, None, 0.5 + torch.rand(index.shape))
    how = {"dloss": None, "forward": True, "gradient": True, **options}
    torch.library.opcheck(ops.rows.default, chunk, how, test_utils=tests)
    torch.library.opcheck(ops.reduce.default, (tokens, groups, target, True), options)


# Others


def opinfo_samples() -> Iterator[Any]:
    (info,) = (
        op
        for op in op_db
        if op.name == "nn.functional.linear_cross_entropy" and not op.variant_test_name
    )
    yield from info.sample_inputs("cpu", torch.float64, requires_grad=True)


def test_samples_of_pytorch() -> None:
    """PyTorch's own, where they are class indices and two-dimensional weights."""
    compared = 0
    for sample in opinfo_samples():
        weight, target = sample.args
        if target.is_floating_point() or weight.dim() != 2 or sample.input.dim() > 2:
            continue
        theirs = dict(sample.kwargs)
        ours = {
            "bias": theirs.get("linear_bias"),
            "class_weight": theirs.get("weight"),
            "reduction": theirs.get("reduction", "mean"),
            "ignore_index": theirs.get("ignore_index", -100),
        }
        if ours["class_weight"] is not None:
            ours["class_weight"] = ours["class_weight"].detach()
        expected = F.linear_cross_entropy(sample.input, weight, target, **theirs)
        loss = linear_cross_entropy(sample.input, weight, target, **ours)
        if (target == ours["ignore_index"]).all() and ours["reduction"] == "mean":
            continue
        torch.testing.assert_close(loss, expected)
        leaves = [x for x in (sample.input, weight, ours["bias"]) if x is not None]
        torch.testing.assert_close(
            torch.autograd.grad(loss.sum(), leaves), torch.autograd.grad(expected.sum(), leaves)
        )
        compared += 1
    assert compared >= 20


def test_equals_masked_cross_entropy_of_linear(dtype: torch.dtype, device: str) -> None:
    """The same bits, where the products are the same."""
    tensors = problem(16, width=32, classes=300, dtype=dtype, device=device)
    del tensors["bias"]
    for reduction in REDUCTIONS:
        loss = linear_cross_entropy(
            tensors["hidden"], tensors["weight"], tensors["target"], reduction=reduction
        )
        logits = F.linear(tensors["hidden"], tensors["weight"])
        expected = masked_cross_entropy(logits, tensors["target"], reduction=reduction)
        assert torch.equal(loss, expected)


def test_module() -> None:
    class_weight = torch.rand(CLASSES)
    options = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0, "shift": True}
    module = masked_loss.LinearCrossEntropyLoss(
        class_weight=class_weight, chunk_tokens=2, return_stats=True, **options
    )
    tensors = problem(*SHAPE)
    expected = evaluate(
        linear_cross_entropy, tensors, class_weight=class_weight, chunk_tokens=2,
        return_stats=True, normalizer=3, **options,
    )  # fmt: skip
    assert_close(evaluate(module, tensors, normalizer=3), expected, rtol=0, atol=0)
    assert module.state_dict().keys() == {"class_weight"}
    assert "shift=True" in repr(module)


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


def test_torch_function() -> None:
    """A tensor subclass takes the whole call, by name."""
    calls = []

    class Watching(torch.Tensor):
        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is linear_cross_entropy:
                calls.append((len(args), set(kwargs)))
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))

    tensors = problem(*SHAPE, requires=())
    hidden = tensors["hidden"].as_subclass(Watching)
    loss = linear_cross_entropy(hidden, tensors["weight"], tensors["target"], shift=True)
    plain = linear_cross_entropy(
        tensors["hidden"], tensors["weight"], tensors["target"], shift=True
    )
    torch.testing.assert_close(torch.Tensor(loss), plain)
    assert len(calls) == 1
    assert {"bias", "shift", "chunk_tokens", "accumulation_dtype"} <= calls[0][1]


BAD_CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "hidden": ({"hidden": 3}, TypeError, "hidden must be a tensor, got int"),
    "hidden dtype": (
        {"hidden": torch.ones(3, 5, 6, dtype=torch.int64)},
        TypeError,
        "hidden must be float64, float32, bfloat16 or float16, got int64",
    ),
    "hidden shape": (
        {"hidden": torch.tensor(1.0)},
        ValueError,
        r"hidden must have shape \[..., D\], got \[\]",
    ),
    "weight shape": (
        {"weight": torch.ones(9, 5)},
        ValueError,
        r"weight must have shape \[V, 6\], got \[9, 5\]",
    ),
    "weight dtype": (
        {"weight": torch.ones(9, 6, dtype=torch.bfloat16)},
        TypeError,
        "weight must be float32 like hidden, got bfloat16",
    ),
    "no classes": ({"weight": torch.ones(0, 6)}, ValueError, "weight must have at least one class"),
    "bias": ({"bias": torch.ones(8)}, ValueError, r"bias must have shape \[9\], got \[8\]"),
    "target shape": (
        {"target": torch.zeros(3, 4, dtype=torch.int64)},
        ValueError,
        r"target must have shape \[3, 5\], got \[3, 4\]",
    ),
    "target dtype": (
        {"target": torch.zeros(3, 5)},
        TypeError,
        "target must be int64 or int32 class indices, got float32",
    ),
    "target range": (
        {"target": torch.full((3, 5), 12)},
        IndexError,
        r"target\[0, 0\] is 12, expected 0 <= target < 9 \(or ignore_index -100\)",
    ),
    "mask shape": (
        {"mask": torch.ones(3)},
        ValueError,
        r"mask must have shape \[3, 5\], got \[3\]",
    ),
    "reduction": ({"reduction": "max"}, ValueError, 'reduction must be "none", .* got "max"'),
    "normalizer": (
        {"reduction": "none", "normalizer": 3},
        ValueError,
        'normalizer goes with a reduction, got reduction="none"',
    ),
    "class_weight": (
        {"class_weight": torch.ones(8)},
        ValueError,
        r"class_weight must have shape \[9\], got \[8\]",
    ),
    "class_weight grad": (
        {"class_weight": torch.ones(9, requires_grad=True)},
        ValueError,
        "class_weight is not differentiable",
    ),
    "chunk_tokens": ({"chunk_tokens": 0}, ValueError, "chunk_tokens must be at least 1, got 0"),
    "accumulation_dtype": (
        {"accumulation_dtype": torch.float16},
        ValueError,
        "accumulation_dtype must be torch.float32 or that of weight",
    ),
    **{
        f"{option} = {value}": ({option: value}, error, re.escape(text))
        for option, value, error, text in BAD_OPTIONS
    },
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(name: str, masked: bool) -> None:
    """Who, what was expected, what came; also where no token would be computed."""
    bad, error, message = BAD_CALLS[name]
    if masked and name == "target range":
        return  # nobody reads a masked target
    tensors = problem(*SHAPE, requires=("hidden", "weight"))
    if masked:
        tensors["mask"] = torch.zeros(SHAPE)
    else:
        del tensors["mask"]
    with pytest.raises(error, match=f"^linear_cross_entropy: {message}"):
        linear_cross_entropy(**{**tensors, **bad})


def test_shift_of_a_scalar() -> None:
    tensors = problem(requires=())
    with pytest.raises(ValueError, match="shift needs a time dimension"):
        linear_cross_entropy(tensors["hidden"], tensors["weight"], tensors["target"], shift=True)


MEMORY = """
import torch, masked_loss

def peak():
    with open("/proc/self/status") as status:
        fields = dict(line.split(":", 1) for line in status)
    return int(fields["VmHWM"].split()[0]) << 10

def step(tokens, width, classes):
    hidden = torch.randn(tokens, width).to(torch.{dtype}).requires_grad_()
    weight = torch.randn(classes, width).to(torch.{dtype}).requires_grad_()
    target = torch.randint(classes, (tokens,))
    mask = torch.rand(tokens) < {share}
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    before = peak()
    loss = masked_loss.linear_cross_entropy(hidden, weight, target, mask, reduction="{reduction}")
    loss.sum().backward()
    return peak() - before - hidden.grad.nbytes - weight.grad.nbytes

torch.set_num_threads(2)
step(64, 16, 64)
print(step{shape} / 2**20)
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
    "bfloat16": ("bfloat16", (2048, 64, 32_000), CHUNK + SUMS + 16),
    "float16": ("float16", (1040, 64, 32_000), CHUNK + SUMS + 16),
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize(("reduction", "share"), [("mean", 0.5), ("none", 2.0)])
@pytest.mark.parametrize("case", PEAKS)
def test_peak_memory(case: str, reduction: str, share: float) -> None:
    """One chunk and what the products work in, above the arguments and their gradients."""
    dtype, shape, most = PEAKS[case]
    script = MEMORY.format(dtype=dtype, shape=shape, reduction=reduction, share=share)
    peaks: list[float] = []
    # What a step needs is the least that it was seen to take: on a machine that is busy otherwise,
    # threads that start late get heaps of their own, which only ever adds.
    while len(peaks) < 4 and (not peaks or min(peaks) > most):
        run = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "MALLOC_ARENA_MAX": "1"},
        )
        assert run.returncode == 0, run.stderr
        peaks.append(float(run.stdout))
    assert min(peaks) <= most, peaks


def test_a_gradient_is_scaled_by_one_launch() -> None:
    """Elsewhere than on a CPU, whose caches want it in pieces: here 500 of them."""
    calls: list[str] = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            calls.append(func.name())
            return func(*args, **(kwargs or {}))

    with Count():
        gradient = torch.empty(128256, 4096, device="meta")
        factor = torch.empty((), device="meta")
        linear_chunks.scaled_by(gradient, factor, torch.bfloat16, reuse=True)
    launches = [name for name in calls if "empty" not in name and "slice" not in name]
    assert launches == ["aten::mul.out"]
