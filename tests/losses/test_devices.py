# SPDX-License-Identifier: BSD-3-Clause
"""Every tensor argument of every operator must be on the device of the others.

A tensor on ``meta`` beside real ones sends a call to the fake kernel, whose results are
uninitialised memory. Seen here: a loss of 88848, then 2e-14, then 0.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import masked_loss

OPS = torch.ops.masked_loss
NAMES = sorted(
    name.removeprefix("masked_loss::")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("masked_loss::")
)

TENSORS = {
    "logits": torch.randn(2, 3, 5),
    "teacher_logits": torch.randn(2, 3, 5),
    "dlogits": torch.zeros(2, 3, 5),
    "temperatures": torch.ones(2, 3),
    "teacher_temperatures": torch.ones(2, 3),
    "target": torch.ones(2, 3, dtype=torch.long),
    "mask": torch.ones(2, 3),
    "normalizer": torch.tensor(2.0),
    "class_weight": torch.ones(5),
    "cu_seqlens": torch.tensor([0, 2, 6]),
    "dloss": torch.tensor(1.0),
    "dlog_probs": torch.ones(2, 3),
    "dentropy": torch.ones(2, 3),
    "values": torch.randn(2, 3),
    "hidden": torch.randn(2, 3, 4),
    "weight": torch.randn(5, 4),
    "bias": torch.randn(5),
    "teacher_hidden": torch.randn(2, 3, 4),
    "teacher_weight": torch.randn(5, 4),
    "teacher_bias": torch.randn(5),
    "weights": torch.ones(6),
    "bounds": torch.tensor([0, 5]),
    "scaled": torch.zeros(3, 4, dtype=torch.bfloat16),
    "gradient": torch.randn(3, 4),
    "factor": torch.tensor(2.0),
}
NUMBERS = {
    "reduction": "mean",
    "ignore_index": -100,
    "label_smoothing": 0.1,
    "z_loss": 0.01,
    "softcap": 5.0,
    "classes": 5,
    "kind": "forward_kl",
    "beta": 0.5,
    "temperature": 1.0,
    "teacher_temperature": 1.0,
    "needs": [True] * 3,
    "who": "a loss",
    "vocab_group": "",
    "bounds": [0, 5],
    "first": 0,
}
FLAGS = {"forward", "gradient"}


def arguments(name: str) -> dict[str, Any]:
    """A call of an operator that is right, with every tensor that it takes."""
    schema = getattr(OPS, name).default._schema
    names = [argument.name for argument in schema.arguments]
    if "tokens" in names:
        forward = OPS.cross_entropy_forward
        logits, target = TENSORS["logits"], TENSORS["target"]
        tables = {"mask": None, "normalizer": None, "class_weight": None, "cu_seqlens": None}
        tables |= {"temperatures": None}
        _, _, tokens, groups = forward(logits, target, **tables, stats=False)
    if {"teacher_logits", "teacher_hidden"} & set(names):
        tokens, groups = OPS.divergence_weigh(
            TENSORS["logits"], None, None, None, "mean", False, False
        )
        tokens[1:] = 0
    if "dlog_probs" in names:
        forward = OPS.token_log_probs_forward
        *_, tokens = forward(TENSORS["logits"], target, None, None, None, entropy=True)
    call: dict[str, Any] = {}
    for argument in schema.arguments:
        kind = str(argument.type)
        if argument.name in ("tokens", "groups"):
            call[argument.name] = {"tokens": tokens, "groups": groups}[argument.name]
        elif argument.name == "parts":
            numbers = 5 if "label_smoothing" in names else 3
            call[argument.name] = torch.ones(1, numbers, 6)
        elif "Tensor" in kind:
            call[argument.name] = TENSORS[argument.name].clone()
        elif argument.name in NUMBERS:
            call[argument.name] = NUMBERS[argument.name]
        else:
            call[argument.name] = argument.name in FLAGS if kind == "bool" else None
    return call


def outcome(call: Callable[[], Any]) -> str:
    try:
        call()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return "no error"


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_of_every_operator(name: str) -> None:
    """One on meta beside real ones; and real ones, one at a time, beside meta."""
    op = getattr(OPS, name).default
    good = arguments(name)
    tensors = [key for key, x in good.items() if isinstance(x, Tensor)]
    assert outcome(lambda: op(**good)) == "no error"
    on_meta = {key: good[key].to("meta") for key in tensors}
    assert outcome(lambda: op(**good | on_meta)) == "no error"
    for key in tensors if len(tensors) > 1 else []:
        for call, odd, rest in (
            (good | {key: on_meta[key]}, "meta", "cpu"),
            (good | on_meta | {key: good[key]}, "cpu", "meta"),
        ):
            got = outcome(lambda call=call: op(**call))  # type: ignore[misc]
            assert got.startswith("ValueError: "), (key, got)
            assert "must be on the device of" in got, (key, got)
            assert re.search(rf"\b{key}\b", got), (key, got)
            assert odd in got, (key, got)
            assert rest in got, (key, got)


# What the functions take, by their own names.
ARGUMENTS = TENSORS | {
    "temperature": TENSORS["temperatures"],
    "teacher_temperature": TENSORS["temperatures"],
    "log_probs": TENSORS["logits"].log_softmax(-1),
    "teacher_log_probs": TENSORS["teacher_logits"].log_softmax(-1),
    "input": TENSORS["logits"].movedim(-1, 1),
}
FUNCTIONS = {
    "masked_cross_entropy": ("logits", "target", "class_weight", "normalizer", "temperature"),
    "linear_cross_entropy": (
        "hidden", "weight", "bias", "target", "class_weight", "normalizer", "temperature",
    ),
    "token_log_probs": ("logits", "target", "temperature"),
    "linear_token_log_probs": ("hidden", "weight", "bias", "target", "temperature"),
    "masked_divergence": (
        "logits", "teacher_logits", "normalizer", "temperature", "teacher_temperature",
    ),
    "linear_divergence": (
        "hidden", "weight", "bias", "teacher_hidden", "teacher_weight", "teacher_bias",
        "normalizer", "temperature", "teacher_temperature",
    ),
    "topk_divergence": ("log_probs", "teacher_log_probs", "normalizer"),
    "masked_reduce": ("values", "normalizer"),
    "masked_moments": ("values",),
    "masked_whiten": ("values",),
    "global_normalizer": ("target",),
}  # fmt: skip
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Tensor]]] = {
    name: (
        getattr(masked_loss, name),
        {key: ARGUMENTS[key] for key in (*keys, "mask", "cu_seqlens")},
    )
    for name, keys in FUNCTIONS.items()
}
CALLS["masked_mean"] = (masked_loss.masked_mean, {k: TENSORS[k] for k in ("values", "mask")})
CALLS["masked_reduce, dim"] = (
    partial(masked_loss.masked_reduce, dim=-1),
    {key: TENSORS[key] for key in ("values", "mask", "normalizer")},
)
CALLS["cross_entropy"] = (
    masked_loss.cross_entropy,
    {key: ARGUMENTS[key] for key in ("input", "target", "mask")}
    | {"weight": TENSORS["class_weight"]},
)


@pytest.mark.parametrize("requires_grad", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", CALLS)
def test_every_tensor_of_every_function(name: str, requires_grad: bool) -> None:
    """In words of the function's own."""
    function, given = CALLS[name]
    first = next(iter(given))
    if requires_grad and given[first].is_floating_point():
        given = given | {first: given[first].clone().requires_grad_()}
    function(**given)
    on_meta = {key: x.detach().to("meta") for key, x in given.items()}
    function(**on_meta)
    for key in given:
        for call in (given | {key: on_meta[key]}, on_meta | {key: given[key]}):
            with pytest.raises(ValueError, match="must be on the device") as error:
                function(**call)
            who, text = str(error.value).split(": ")
            said, _, _ = text.partition(" ")
            assert who == name.partition(",")[0]
            assert said in given, (key, text)
            assert key == first or said == key, (key, text)
            assert all(device in text for device in ("cpu", "meta")), (key, text)
