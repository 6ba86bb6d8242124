# SPDX-License-Identifier: BSD-3-Clause
"""Bad input: the type of the error, and a text that says who, what was expected and what came."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from samples import BAD_OPTIONS
from threads import threads

import masked_loss
from masked_loss import (
    cross_entropy,
    linear_cross_entropy,
    masked_cross_entropy,
    masked_mean,
    masked_reduce,
)

LOGITS = torch.zeros(4, 7, 10)
TARGET = torch.zeros(4, 7, dtype=torch.long)
MASK = torch.ones(4, 7)
LEARNED = {"target": torch.full((4, 7, 5), 0.2).requires_grad_()}  # class probabilities


def complain(error: type[Exception], *parts: str) -> Any:
    """Expects ``error``, whose text has these parts in this order."""
    return pytest.raises(error, match=".*".join(map(re.escape, parts)))


# Each: what is wrong, the arguments that differ from good ones, the error, parts of its text.
BAD: list[tuple[str, dict[str, Any], type[Exception], list[str]]] = [
    (
        "target too long",
        {"target": TARGET.new_zeros(4, 8)},
        ValueError,
        ["masked_cross_entropy: target must have shape [4, 7], got [4, 8]"],
    ),
    (
        "target flattened",
        {"target": TARGET.flatten()},
        ValueError,
        ["target must have shape [4, 7], got [28]"],
    ),
    (
        "target with classes",
        {"target": TARGET.new_zeros(4, 7, 10)},
        ValueError,
        ["target must have shape [4, 7], got [4, 7, 10]"],
    ),
    (
        "target of floats",
        {"target": TARGET.float()},
        TypeError,
        ["target must be int64 or int32", "got", "float32"],
    ),
    (
        "target of probabilities",
        {"target": torch.rand(4, 7, 10)},
        TypeError,
        ["target must be int64 or int32", "got", "float32"],
    ),
    (
        "target of bools",
        {"target": TARGET.bool()},
        TypeError,
        ["target must be int64 or int32", "got bool"],
    ),
    ("target of int16", {"target": TARGET.short()}, TypeError, ["target must be", "got int16"]),
    (
        "target is a list",
        {"target": [[1] * 7] * 4},
        TypeError,
        ["masked_cross_entropy: target must be a tensor, got list"],
    ),
    (
        "mask too long",
        {"mask": torch.ones(4, 8)},
        ValueError,
        ["masked_cross_entropy: mask must have shape [4, 7], got [4, 8]"],
    ),
    (
        "mask of one sequence",
        {"mask": torch.ones(7)},
        ValueError,
        ["mask must have shape [4, 7], got [7]"],
    ),
    (
        "mask with classes",
        {"mask": torch.ones(4, 7, 1)},
        ValueError,
        ["mask must have shape [4, 7], got [4, 7, 1]"],
    ),
    (
        "complex mask",
        {"mask": torch.ones(4, 7, dtype=torch.complex64)},
        TypeError,
        ["masked_cross_entropy: mask must be", "got complex64"],
    ),
    (
        "mask is a list",
        {"mask": [[1] * 7] * 4},
        TypeError,
        ["masked_cross_entropy: mask must be a tensor, got list"],
    ),
    (
        "mask is a number",
        {"mask": 1.0},
        TypeError,
        ["masked_cross_entropy: mask must be a tensor, got float"],
    ),
    (
        "logits of integers",
        {"logits": LOGITS.long()},
        TypeError,
        ["masked_cross_entropy: logits must be", "float32", "got int64"],
    ),
    (
        "complex logits",
        {"logits": LOGITS.to(torch.complex64)},
        TypeError,
        ["logits must be", "got complex64"],
    ),
    (
        "logits without dimensions",
        {"logits": torch.tensor(1.0), "target": torch.tensor(0), "mask": None},
        ValueError,
        ["masked_cross_entropy: logits must have shape [..., V], got []"],
    ),
    (
        "logits are a list",
        {"logits": [[0.0]]},
        TypeError,
        ["masked_cross_entropy: logits must be a tensor, got list"],
    ),
    (
        "unknown reduction",
        {"reduction": "average"},
        ValueError,
        ["masked_cross_entropy: reduction must be", "none", "sum", "mean", "got", "average"],
    ),
    ("reduction is None", {"reduction": None}, (TypeError, ValueError), ["reduction", "None"]),  # type: ignore[list-item]
    (
        "sequence_mean without time",
        {"logits": LOGITS[0, 0], "target": TARGET[0, 0], "mask": None}
        | {"reduction": "sequence_mean"},
        ValueError,
        ["masked_cross_entropy:", "sequence_mean"],
    ),
    (
        "normalizer with none",
        {"reduction": "none", "normalizer": 2.0},
        ValueError,
        ["masked_cross_entropy: normalizer", "none"],
    ),
    (
        "normalizer of many numbers",
        {"normalizer": torch.ones(3)},
        ValueError,
        ["masked_cross_entropy: normalizer", "0-dim", "[3]"],
    ),
    (
        "normalizer that requires grad",
        {"normalizer": torch.tensor(2.0, requires_grad=True)},
        ValueError,
        ["masked_cross_entropy: normalizer", "grad"],
    ),
    ("normalizer is a text", {"normalizer": "tokens"}, TypeError, ["normalizer", "str"]),
    (
        "class_weight too short",
        {"class_weight": torch.ones(9)},
        ValueError,
        ["masked_cross_entropy: class_weight must have shape [10], got [9]"],
    ),
    (
        "class_weight of integers",
        {"class_weight": torch.ones(10, dtype=torch.long)},
        TypeError,
        ["masked_cross_entropy: class_weight must be", "got int64"],
    ),
    (
        "class_weight that requires grad",
        {"class_weight": torch.ones(10, requires_grad=True)},
        ValueError,
        ["masked_cross_entropy: class_weight", "grad"],
    ),
    (
        "class_weight is a list",
        {"class_weight": [1.0] * 10},
        TypeError,
        ["masked_cross_entropy: class_weight must be a tensor, got list"],
    ),
    (
        "shift without time",
        {"logits": LOGITS[0, 0], "target": TARGET[0, 0], "mask": None, "shift": True},
        ValueError,
        ["masked_cross_entropy: shift"],
    ),
    (
        "logits on another device",
        {"logits": LOGITS.to("meta")},
        ValueError,
        ["cross_entropy:", "device"],
    ),
    (
        "target on another device",
        {"target": TARGET.to("meta")},
        ValueError,
        ["cross_entropy: target", "device"],
    ),
    (
        "mask on another device",
        {"mask": MASK.to("meta")},
        ValueError,
        ["cross_entropy: mask", "device"],
    ),
    *(
        (f"{option} = {value}", {option: value}, error, [f"masked_cross_entropy: {text}"])
        for option, value, error, text in BAD_OPTIONS
    ),
]


@pytest.mark.parametrize(
    ("arguments", "error", "parts"), [row[1:] for row in BAD], ids=[row[0] for row in BAD]
)
@pytest.mark.parametrize("requires_grad", [False, True], ids=["forward", "backward"])
def test_bad_arguments(
    requires_grad: bool, arguments: dict[str, Any], error: type[Exception], parts: list[str]
) -> None:
    good = {"logits": LOGITS.clone(), "target": TARGET, "mask": MASK}
    arguments = good | arguments
    logits = arguments["logits"]
    if requires_grad and isinstance(logits, torch.Tensor) and logits.is_floating_point():
        arguments["logits"] = logits.detach().clone().requires_grad_()
    args = [arguments.pop(name) for name in ("logits", "target", "mask")]
    with complain(error, *parts) as caught:
        masked_cross_entropy(*args, **arguments)
    # The prefix that carries the type across the C++ boundary is not for people.
    assert not re.match(r"(Value|Type|Index)Error", str(caught.value))


def to_meta(x: Any) -> Any:
    return x.to("meta") if isinstance(x, torch.Tensor) else x


def text_of(function: Any, arguments: dict[str, Any]) -> str:
    try:
        function(**arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_the_same_on_meta_tensors() -> None:
    """Where no kernel runs, the checks are those of masked_loss/_op/checks.py."""
    for name, wrong, _, _ in BAD:
        if "device" in name:
            continue
        arguments = {"logits": LOGITS, "target": TARGET, "mask": MASK} | wrong
        on_meta = {key: to_meta(x) for key, x in arguments.items()}
        expected = text_of(masked_cross_entropy, arguments)
        assert expected != "no error"
        assert text_of(masked_cross_entropy, on_meta) == expected, name


def test_the_same_of_the_linear_form_and_of_masked_reduce_on_meta_tensors() -> None:
    """What is wrong with what is left of the logits above."""
    hidden, weight = torch.zeros(4, 7, 3), torch.zeros(10, 3)
    for name, wrong, _, _ in BAD:
        if "device" in name:
            continue
        wrong = {key: x for key, x in wrong.items() if key != "logits"}
        linear = {"hidden": hidden, "weight": weight, "target": TARGET} | wrong
        cases: list[tuple[Any, dict[str, Any]]] = [(linear_cross_entropy, linear)]
        if wrong and not wrong.get("shift"):
            same = text_of(masked_cross_entropy, {"logits": LOGITS, "target": TARGET} | wrong)
            assert text_of(linear_cross_entropy, linear) == same.replace("masked_", "linear_"), name
        if not wrong.keys() - {"mask", "reduction", "normalizer"}:
            cases.append((masked_reduce, {"values": torch.zeros(4, 7), "mask": MASK} | wrong))
        if wrong.get("shift"):
            wrong |= {"hidden": hidden[0, 0], "mask": None}
            cases.append((linear_cross_entropy, cases[0][1] | wrong))
        for function, arguments in cases:
            on_meta = {key: to_meta(x) for key, x in arguments.items()}
            assert text_of(function, on_meta) == text_of(function, arguments), name


def test_unknown_argument() -> None:
    with complain(TypeError, "ignore_indx"):
        masked_cross_entropy(LOGITS, TARGET, ignore_indx=0)


def test_options_come_by_name_only() -> None:
    with pytest.raises(TypeError, match="positional"):
        masked_cross_entropy(LOGITS, TARGET, MASK, "sum")


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("requires_grad", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("value", [10, -1, -101, 2**31, -(2**40)])
@pytest.mark.parametrize(
    ("shape", "place", "text"),
    [
        ((), (), "target is"),
        ((4,), (3,), "target[3] is"),
        ((4, 7), (1, 3), "target[1, 3] is"),
        ((2, 3, 4), (1, 0, 2), "target[1, 0, 2] is"),
    ],
    ids=str,
)
def test_target_out_of_range(
    shape: tuple[int, ...],
    place: tuple[int, ...],
    text: str,
    value: int,
    requires_grad: bool,
    reduction: str,
) -> None:
    """The position, the value, the number of classes."""
    logits = torch.zeros(*shape, 10, requires_grad=requires_grad)
    target = torch.zeros(shape, dtype=torch.long)
    target[place] = value
    expected = f"masked_cross_entropy: {text} {value}, expected 0 <= target < 10"
    with complain(IndexError, expected, "ignore_index -100"):
        masked_cross_entropy(logits, target, reduction=reduction)


def test_the_first_target_out_of_range_is_named() -> None:
    """Whatever the number of threads."""
    target = torch.zeros(1000, dtype=torch.long)
    target[[17, 400, 999]] = torch.tensor([50, 60, 70])
    for number in (1, 2, 4):
        with threads(number), complain(IndexError, "target[17] is 50"):
            masked_cross_entropy(torch.zeros(1000, 50), target)


def test_target_out_of_range_where_it_does_not_matter() -> None:
    target = torch.tensor([3, 12, -5, 40])
    mask = torch.tensor([1, 0, 0, 0])
    assert masked_cross_entropy(torch.zeros(4, 10), target, mask).isfinite()
    assert masked_cross_entropy(torch.zeros(1, 10), target[3:], ignore_index=40) == 0


def test_target_out_of_range_with_shift() -> None:
    target = torch.zeros(2, 5, dtype=torch.long)
    target[:, 0] = 99  # the first token is scored by nothing
    masked_cross_entropy(torch.zeros(2, 5, 10), target, shift=True)
    target[1, 4] = 99
    with complain(IndexError, "target[1, 4] is 99"):
        masked_cross_entropy(torch.zeros(2, 5, 10), target, shift=True)


def test_target_out_of_range_with_int32() -> None:
    with complain(IndexError, "target[1] is -7"):
        masked_cross_entropy(torch.zeros(2, 10), torch.tensor([1, -7], dtype=torch.int32))


def test_no_classes() -> None:
    """Without a token there is nothing to complain about."""
    with complain(ValueError, "logits must have at least one class", "[2, 0]"):
        masked_cross_entropy(torch.zeros(2, 0), torch.zeros(2, dtype=torch.long))
    assert masked_cross_entropy(torch.zeros(0, 0), torch.zeros(0, dtype=torch.long)) == 0


def test_an_error_leaves_nothing_behind() -> None:
    logits = torch.randn(2, 10)
    with complain(IndexError, "target[0] is 10"):
        masked_cross_entropy(logits, torch.tensor([10, 1]))
    loss = masked_cross_entropy(logits, torch.tensor([3, 1]))
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([3, 1]))
    torch.testing.assert_close(loss, expected)


def test_operator_has_the_same_text() -> None:
    """torch.ops raises RuntimeError, whose text is the same."""
    operator = torch.ops.masked_loss.cross_entropy
    with complain(RuntimeError, "cross_entropy: target must have shape [4, 7], got [4, 8]"):
        operator(LOGITS, TARGET.new_zeros(4, 8))
    with complain((RuntimeError, IndexError), "target[0, 0] is 10, expected 0 <= target < 10"):  # type: ignore[arg-type]
        operator(LOGITS, TARGET + 10)
    with complain(RuntimeError, "masked_reduce: mask must have shape [4, 7], got [4, 8]"):
        torch.ops.masked_loss.masked_reduce(MASK, torch.ones(4, 8))


@pytest.mark.parametrize("name", ["class_weight", "temperatures", "normalizer"])
def test_operators_take_no_constant_that_requires_grad(name: str) -> None:
    """They have no gradient for it, as the functions say."""
    operator = torch.ops.masked_loss.cross_entropy
    shape = {"class_weight": (10,), "temperatures": (4, 7), "normalizer": ()}[name]
    constant = torch.ones(shape, dtype=torch.float64 if name == "normalizer" else torch.float32)

    def loss(x: torch.Tensor, logits: torch.Tensor = LOGITS) -> torch.Tensor:
        return operator(logits, TARGET, **{name: x})

    assert loss(constant.requires_grad_().detach(), LOGITS.clone().requires_grad_()).requires_grad
    with torch.no_grad():
        assert not loss(constant).requires_grad
    text = f"cross_entropy: {name} is not differentiable, got one that requires grad"
    with complain(ValueError, text):
        loss(constant)
    with complain(ValueError, text):
        torch.func.grad(loss)(constant.detach())


NUMBERS: list[tuple[Callable[..., Any], tuple[torch.Tensor, ...], str]] = [
    (masked_cross_entropy, (LOGITS, TARGET), "softcap"),
    (masked_cross_entropy, (LOGITS, TARGET), "z_loss"),
    (cross_entropy, (LOGITS.mT, TARGET), "label_smoothing"),
    (linear_cross_entropy, (LOGITS, torch.eye(10), TARGET), "softcap"),
    (masked_loss.token_log_probs, (LOGITS, TARGET), "softcap"),
    (masked_loss.masked_divergence, (LOGITS, LOGITS), "teacher_softcap"),
    (masked_loss.topk_divergence, (LOGITS, LOGITS), "beta"),
]


@pytest.mark.parametrize(
    ("function", "tensors", "name"), NUMBERS, ids=[f"{f.__name__}-{n}" for f, _, n in NUMBERS]
)
def test_numbers_are_constants(
    function: Callable[..., Any], tensors: tuple[torch.Tensor, ...], name: str
) -> None:
    """One that is learned would get no gradient, and nobody would tell."""
    number = torch.nn.Parameter(torch.tensor(0.5))
    assert torch.equal(function(*tensors, **{name: number.data}), function(*tensors, **{name: 0.5}))
    with complain(ValueError, f"{function.__name__}: {name} is not differentiable"):
        function(*tensors, **{name: number})


def test_operators_take_no_teacher_that_requires_grad() -> None:
    for name in ("masked_divergence", "masked_divergence_stats"):
        with complain(ValueError, f"{name}: teacher_logits is not differentiable"):
            getattr(torch.ops.masked_loss, name)(LOGITS, LOGITS.clone().requires_grad_())


@pytest.mark.parametrize(
    ("arguments", "error", "parts"),
    [
        (
            {"target": torch.zeros(4, 6, dtype=torch.long)},
            ValueError,
            ["cross_entropy: target must have shape [4, 5]", "got [4, 6]"],
        ),
        (
            {"target": torch.zeros(5, 5, dtype=torch.long)},
            ValueError,
            ["cross_entropy: target must have shape [4, 5]", "got [5, 5]"],
        ),
        ({"target": torch.zeros(4, 7, 6)}, ValueError, ["[4, 7, 5]", "got [4, 7, 6]"]),
        ({"target": torch.zeros(4, 5, dtype=torch.short)}, TypeError, ["target", "int16"]),
        ({"input": torch.zeros(4, 7, 5).long()}, TypeError, ["cross_entropy: input", "int64"]),
        ({"input": torch.tensor(0.0), "target": torch.tensor(0)}, ValueError, ["input", "[]"]),
        ({"weight": torch.ones(6)}, ValueError, ["cross_entropy: weight", "[7]", "got [6]"]),
        ({"weight": torch.ones(7).long()}, TypeError, ["cross_entropy: weight", "int64"]),
        ({"mask": torch.ones(4, 6)}, ValueError, ["cross_entropy: mask", "[4, 5]", "got [4, 6]"]),
        ({"reduction": "sequence_mean"}, ValueError, ["cross_entropy: reduction", "sequence_mean"]),
        ({"reduction": "average"}, ValueError, ["cross_entropy: reduction", "average"]),
        ({"label_smoothing": 2.0}, ValueError, ["cross_entropy: label_smoothing", "2"]),
        (
            {"target": torch.zeros(4, 7, 5), "ignore_index": 2},
            ValueError,
            ["cross_entropy: ignore_index needs class indices", "got class probabilities"],
        ),
        ({**LEARNED, "mask": torch.ones(4, 1)}, ValueError, ["mask", "[4, 5]", "got [4, 1]"]),
        ({**LEARNED, "weight": torch.ones(1)}, ValueError, ["weight", "[7]", "got [1]"]),
        ({**LEARNED, "label_smoothing": -1.0}, ValueError, ["label_smoothing", "-1"]),
        ({**LEARNED, "mask": [1.0]}, TypeError, ["mask must be a tensor, got list"]),
        (
            {"target": torch.full((4, 5), 7)},
            IndexError,
            ["cross_entropy: target[0, 0] is 7, expected 0 <= target < 7"],
        ),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_bad_arguments_of_the_dropin(
    arguments: dict[str, Any], error: type[Exception], parts: list[str]
) -> None:
    good = {"input": torch.zeros(4, 7, 5), "target": torch.zeros(4, 5, dtype=torch.long)}
    with complain(error, *parts) as caught:
        cross_entropy(**(good | arguments))
    assert str(caught.value).startswith("cross_entropy:")


@pytest.mark.parametrize(
    ("arguments", "error", "parts"),
    [
        ({"mask": torch.ones(4, 8)}, ValueError, ["mask must have shape [4, 7], got [4, 8]"]),
        ({"mask": torch.ones(())}, ValueError, ["mask must have shape [4, 7], got []"]),
        ({"mask": MASK.to(torch.complex64)}, TypeError, ["mask must be", "complex64"]),
        ({"mask": [1.0]}, TypeError, ["mask must be a tensor, got list"]),
        ({"mask": MASK.to(torch.float8_e5m2), "dim": -1}, TypeError, ["mask must be", "float8"]),
        ({"normalizer": torch.tensor(1j)}, TypeError, ["normalizer must be real", "complex64"]),
        ({"values": MASK.long()}, TypeError, ["values must be", "int64"]),
        ({"values": 1.0}, TypeError, ["values must be a tensor, got float"]),
        ({"reduction": "average"}, ValueError, ["reduction must be", "average"]),
        ({"reduction": "none", "normalizer": 3}, ValueError, ["normalizer", "none"]),
        ({"normalizer": torch.ones(2)}, ValueError, ["normalizer", "0-dim", "[2]"]),
        (
            {"normalizer": torch.tensor(1.0, requires_grad=True)},
            ValueError,
            ["normalizer", "grad"],
        ),
        (
            {"values": torch.tensor(1.0), "mask": None, "reduction": "sequence_mean"},
            ValueError,
            ["sequence_mean"],
        ),
        ({"values": torch.tensor(1.0)}, masked_loss.ReducedLossError, ["none"]),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_bad_arguments_of_masked_reduce(
    arguments: dict[str, Any], error: type[Exception], parts: list[str]
) -> None:
    arguments = {"values": torch.zeros(4, 7), "mask": MASK} | arguments
    values, mask = arguments.pop("values"), arguments.pop("mask")
    with complain(error, "masked_reduce:", *parts):
        masked_reduce(values, mask, **arguments)


def test_bad_arguments_of_masked_mean() -> None:
    with complain(ValueError, "masked_mean: mask must have shape [4], got [5]"):
        masked_mean(torch.zeros(4), torch.ones(5))
    with complain(masked_loss.ReducedLossError, "masked_mean:", "none"):
        masked_mean(torch.tensor(1.0), torch.ones(5))
