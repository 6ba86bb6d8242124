# SPDX-License-Identifier: BSD-3-Clause
"""Faults that real inputs showed in the functions, each with its kind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import masked_loss
from masked_loss import cross_entropy, linear_cross_entropy, masked_cross_entropy, masked_reduce
from masked_loss._op import memory

LOGITS, TARGET = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
HIDDEN, WEIGHT = torch.zeros(2, 3, 4), torch.zeros(5, 4)


class Sub(Tensor):
    """As fastai's: everything is inherited."""


@pytest.mark.parametrize("argument", ["logits", "mask"])
def test_statistics_of_a_subclass(argument: str) -> None:
    given = {"logits": LOGITS, "target": TARGET, "mask": torch.ones(2, 3)}
    given[argument] = given[argument].as_subclass(Sub)
    loss, stats = masked_cross_entropy(**given, return_stats=True)
    assert isinstance(stats, masked_loss.LossStats)
    assert type(loss) is type(stats.tokens) is Sub
    assert stats.tokens == 6


def test_statistics_add_up() -> None:
    _, stats = masked_cross_entropy(LOGITS, TARGET, return_stats=True)
    for total in (stats + stats, sum([stats, stats])):
        assert isinstance(total, masked_loss.LossStats)
        assert [float(x) for x in total] == [2 * float(x) for x in stats]
    with pytest.raises(TypeError):
        stats + 1


@pytest.mark.parametrize("value", [2, 1, 0, "yes", None])
@pytest.mark.parametrize("name", ["shift", "inplace_backward", "return_stats"])
def test_a_bool_is_a_bool(name: str, value: Any) -> None:
    calls: list[Callable[..., Any]] = [lambda **k: masked_cross_entropy(LOGITS, TARGET, **k)]
    if name != "inplace_backward":
        calls.append(lambda **k: linear_cross_entropy(HIDDEN, WEIGHT, TARGET, **k))
    for call in calls:
        with pytest.raises(TypeError, match=f"{name} must be True or False, got {value!r}"):
            call(**{name: value})


HINTS: list[tuple[Callable[[], Any], str]] = [
    (lambda: cross_entropy(LOGITS, TARGET), "the classes are dimension 1 of input"),
    (lambda: cross_entropy(torch.zeros(4, 5), torch.zeros(4, 5).long()), r"target\.argmax\(1\)"),
    (
        lambda: masked_cross_entropy(LOGITS, TARGET, torch.ones(2, 3, 1)),
        r"got \[2, 3, 1\].*mask\.squeeze\(-1\)",
    ),
    (
        lambda: masked_cross_entropy(LOGITS.view(-1, 5), TARGET.view(-1), torch.ones(2, 3)),
        r"mask\.reshape\(\[6\]\)",
    ),
    (lambda: masked_cross_entropy(LOGITS, LOGITS.long()), r"target\.argmax\(-1\)"),
    (lambda: masked_cross_entropy(LOGITS, TARGET.view(-1)), r"target\.reshape\(\[2, 3\]\)"),
    (
        lambda: masked_reduce(torch.zeros(6), torch.ones(2, 3)),
        r"mask\.reshape\(\[6\]\)",
    ),
    (
        lambda: linear_cross_entropy(HIDDEN, WEIGHT, TARGET, torch.ones(2, 3, 1)),
        r"mask\.squeeze\(-1\)",
    ),
]


@pytest.mark.parametrize(("call", "hint"), HINTS, ids=range(len(HINTS)))
def test_known_mistakes_get_a_hint(call: Callable[[], Any], hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        call()


def test_errors_name_what_was_passed() -> None:
    input, target = torch.zeros(4, 5), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="cross_entropy: weight is not differentiable"):
        cross_entropy(input, target, weight=torch.ones(5, requires_grad=True))
    with pytest.raises(ValueError, match=r"cross_entropy: weight must have shape \[5\]"):
        cross_entropy(input, target, weight=torch.ones(4))
    with pytest.raises(TypeError, match=r"accumulation_dtype must be a torch.dtype, got 'float32'"):
        linear_cross_entropy(HIDDEN, WEIGHT, TARGET, accumulation_dtype="float32")  # type: ignore[call-overload]


def test_out_of_memory_is_pytorchs_error() -> None:
    """Which batch-size finders look for."""
    pool = memory.Pool(1, keeps=True)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        pool.empty((1 << 46,), torch.zeros(1))


def test_kept_memory_can_be_given_back() -> None:
    first = memory.logits_pool.empty((1 << 23,), torch.zeros(1))
    address = first.data_ptr()
    del first
    assert memory.logits_pool._block is not None
    masked_loss.empty_cache()
    assert memory.logits_pool._block is None
    assert address


@pytest.mark.parametrize(
    ("setting", "keeps"), [("false", False), ("0", False), ("1", True), ("maybe", None)]
)
def test_the_switch_for_kept_memory(setting: str, keeps: bool | None) -> None:
    code = "from masked_loss._op import memory; print(memory._KEEPS)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "MASKED_LOSS_KEEP_MEMORY": setting},
        capture_output=True,
        text=True,
    )
    if keeps is None:
        assert "MASKED_LOSS_KEEP_MEMORY must be 0 or 1, got 'maybe'" in run.stderr
    else:
        assert run.stdout.strip() == str(keeps), run.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork_while_the_memory_is_locked() -> None:
    """The lock is another thread's, which the child does not have."""
    with memory.logits_pool._lock:
        child = os.fork()
        if child == 0:
            free = memory.logits_pool._lock.acquire(timeout=2)
            os._exit(0 if free else 1)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
