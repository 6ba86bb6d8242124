# SPDX-License-Identifier: BSD-3-Clause
"""linear_cross_entropy is masked_cross_entropy of F.linear, without the logits."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate_as_eager
from linear_samples import (
    CLASSES,
    SHAPE,
    WIDTH,
    assert_accurate,
    assert_close,
    concrete,
    evaluate,
    problem,
    roundings_on,
)
from samples import CASES, REDUCTIONS, Case
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db

import masked_loss
from masked_loss import linear_cross_entropy, masked_cross_entropy, reference


@pytest.mark.parametrize("case", [c for c in CASES if "inplace" not in c.name], ids=str)
def test_every_case(case: Case, dtype: torch.dtype, device: str) -> None:
    """hidden states that are the logits: every option, mask, layout and shape, and statistics."""

    def linear(logits: Tensor, *args: Any, **options: Any) -> Any:
        head = torch.eye(logits.shape[-1], dtype=logits.dtype, device=logits.device)
        return linear_cross_entropy(logits, head, *args, chunk_tokens=4, **options)

    assert_as_accurate_as_eager(
        linear,
        reference.masked_cross_entropy,
        case,
        dtype,
        device,
        roundings=roundings_on(device),
        return_stats=True,
    )


@pytest.mark.parametrize("chunk_tokens", [None, 4])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_gradients_of_the_head(
    name: str, reduction: str, chunk_tokens: int | None, dtype: torch.dtype, device: str
) -> None:
    options = concrete(name, reduction, dtype, device)

    def make() -> dict[str, Tensor]:
        tensors = problem(*SHAPE, dtype=dtype, device=device)
        tensors["target"][0, 1] = options.get("ignore_index", -100)
        return tensors

    assert_accurate(make, chunk_tokens=chunk_tokens, **options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_empty_batches(shape: tuple[int, ...], reduction: str, dtype: torch.dtype) -> None:
    make = partial(problem, *shape, dtype=dtype)
    for name in ("plain", "everything"):
        assert_accurate(make, **concrete(name, reduction, dtype, shape=shape))


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
    constant = [on_meta[name].detach() for name in ("hidden", "weight", "target", "mask")]
    operator = torch.ops.masked_loss.linear_cross_entropy_stats
    loss, stats = operator(*constant, reduction=reduction)[:2]
    assert (loss.shape, loss.dtype) == (expected["loss"].shape, expected["loss"].dtype)
    assert (stats.shape, stats.dtype, stats.is_meta) == ((4,), torch.float64, True)


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


def opinfo_samples() -> Iterator[Any]:
    (info,) = (
        op
        for op in op_db
        if op.name == "nn.functional.linear_cross_entropy" and not op.variant_test_name
    )
    yield from info.sample_inputs("cpu", torch.float64, requires_grad=True)


@pytest.mark.skipif(
    not hasattr(F, "linear_cross_entropy"), reason="this torch has no linear_cross_entropy"
)
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


# What else is wrong, test_errors.py finds out of masked_cross_entropy, and that this says the same.
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
    "chunk_tokens": ({"chunk_tokens": 0}, ValueError, "chunk_tokens must be at least 1, got 0"),
    "accumulation_dtype": (
        {"accumulation_dtype": torch.float16},
        ValueError,
        "accumulation_dtype must be torch.float32 or that of weight",
    ),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(name: str, masked: bool) -> None:
    """Who, what was expected, what came; also where no token would be computed."""
    bad, error, message = BAD_CALLS[name]
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
