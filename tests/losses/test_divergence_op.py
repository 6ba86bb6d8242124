# SPDX-License-Identifier: BSD-3-Clause
"""masked_divergence as an operator: its graphs, statistics, memory, errors and its module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from divergence_samples import KINDS, problem
from opchecks import opchecks
from threads import threads
from torch import Tensor

import masked_loss
from masked_loss import DivergenceStats, masked_divergence, reference


@pytest.mark.parametrize("upstream", [1.0, 0.25])
@pytest.mark.parametrize("kind", KINDS)
def test_in_place(kind: str, upstream: float, dtype: torch.dtype) -> None:
    student, teacher, mask, _ = problem(dtype)
    weight = mask.detach()
    loss = masked_divergence(student, teacher, weight, kind=kind)
    (expected,) = torch.autograd.grad(loss, student, torch.tensor(upstream).to(loss))
    own = student.detach().clone().requires_grad_()
    loss = masked_divergence(own, teacher, weight, kind=kind, inplace_backward=True)
    (gradient,) = torch.autograd.grad(loss, own, torch.tensor(upstream).to(loss))
    assert gradient.data_ptr() == own.data_ptr()
    torch.testing.assert_close(gradient, expected)


def test_statistics(dtype: torch.dtype, device: str) -> None:
    student, teacher, mask, _ = problem(dtype)
    with torch.no_grad():
        teacher[:2] = student[:2] + 0.1 * teacher[:2]
    args = (student.detach().to(device), teacher.to(device), mask.detach().to(device))
    loss, stats = masked_divergence(*args, return_stats=True)
    assert isinstance(stats, DivergenceStats)
    eps = torch.finfo(loss.dtype).eps
    wide = [x.double() for x in args]
    _, truth = reference.masked_divergence(*wide, return_stats=True)
    for name, ours, true in zip(stats._fields, stats, truth, strict=True):
        off = f"{name}: {ours} is not {true}"
        torch.testing.assert_close(ours.double(), true, rtol=8 * eps, atol=8 * eps, msg=off)
    assert torch.equal(loss, masked_divergence(*args))


def test_retained_graphs_and_second_calls() -> None:
    student, teacher, mask, _ = problem(torch.float32)
    loss = masked_divergence(student, teacher, mask.detach())
    first = torch.autograd.grad(loss, student, retain_graph=True)[0].clone()
    again = torch.autograd.grad(loss * 2, student)[0]
    torch.testing.assert_close(again, 2 * first)
    loss = masked_divergence(student, teacher, mask.detach())
    torch.testing.assert_close(torch.autograd.grad(2 * loss, student)[0], again)


def test_threads_do_not_matter() -> None:
    student, teacher, _, _ = problem(torch.float32, 5000)
    found = []
    for number in (1, 2):
        with threads(number):
            loss = masked_divergence(student, teacher, kind="jsd")
            found.append((loss.detach(), torch.autograd.grad(loss, student)[0].clone()))
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    student, teacher, mask, _ = problem(torch.float64, 9)
    weight = mask.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda y, w: masked_divergence(y, teacher, w.where(mask != 0, 0), kind=kind, beta=0.3),
        (student, weight),
    )


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_compiled(reduction: str, stats: bool) -> None:
    student, teacher, mask, _ = problem(torch.float32)

    def loss(y: Tensor, t: Tensor, w: Tensor) -> Any:
        return masked_divergence(
            y, t, w, kind="jsd", temperature=2.0, reduction=reduction, return_stats=stats
        )

    found = []
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        result = call(student, teacher, mask)
        value = result[0] if stats else result
        found.append([value.detach(), *torch.autograd.grad(value.sum(), (student, mask))])
        if stats:
            found[-1] += list(result[1])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(eager, compiled)


@opchecks(
    "masked_divergence", "masked_divergence_stats", "masked_divergence_forward",
    "masked_divergence_backward", "divergence_weigh", "divergence_rows",
)  # fmt: skip
@pytest.mark.parametrize("reduction", ["none", "mean", "sequence_mean"])
def test_opcheck(reduction: str) -> None:
    ops = torch.ops.masked_loss
    student, teacher, mask, _ = problem(torch.float32, 9)
    bounds = torch.tensor([0, 4, 5, 11])
    more = {"reduction": reduction, "kind": "jsd", "shift": True, "temperatures": torch.ones(3, 4)}
    more["cu_seqlens"] = bounds
    for name in ("masked_divergence", "masked_divergence_stats"):
        torch.library.opcheck(getattr(ops, name).default, (student, teacher, mask), more)
    y, w = student.detach(), mask.detach()
    kind = {"kind": "jsd", "beta": 0.3, "teacher_temperature": 2.0, "teacher_softcap": 9.0}
    kind["shift"] = True
    forward = (y, teacher, w, None, bounds, None, None, reduction, True)
    loss, _, tokens, groups = ops.masked_divergence_forward(*forward, **kind)
    backward = (torch.ones_like(loss), y, teacher, None, None, tokens, groups)
    rows = (tokens, y, teacher, None, None, groups, None, torch.empty_like(y), True, False)
    for name, args, options in (
        ("masked_divergence_forward", forward, kind),
        ("masked_divergence_backward", backward, kind),
        ("divergence_weigh", (y, w, None, bounds, reduction, True, True), {}),
        ("divergence_rows", rows, kind),
    ):
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        if name != "divergence_weigh":  # which leaves most of its table to divergence_rows
            checks += ("test_aot_dispatch_dynamic",)
        torch.library.opcheck(getattr(ops, name).default, args, options, test_utils=checks)


def test_memory_is_one_gradient() -> None:
    """Between forward and backward nothing of the size of the logits is kept but their gradient."""
    student, teacher, _, _ = problem(torch.float32, 4000)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        masked_divergence(student, teacher, reduction="none")
    new = {t.data_ptr(): t for t in saved}
    for given in (student, teacher):
        new.pop(given.data_ptr(), None)
    assert sum(t.nbytes for t in new.values()) <= 12 * (28 + 48)


# Each: what is wrong, the arguments that differ from good ones, the error, what its text has.
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"logits": torch.zeros(2, 3, 5).long()}, TypeError, "logits must be float64, .*, got int64"),
    ({"teacher_logits": [1.0]}, TypeError, "teacher_logits must be a tensor, got list"),
    ({"teacher_logits": torch.zeros(2, 3, 6)}, ValueError, r"teacher_logits .*\[2, 3, 5\], got"),
    ({"teacher_logits": torch.zeros(2, 3, 5).requires_grad_()}, ValueError, "not differentiable"),
    ({"mask": torch.ones(3)}, ValueError, r"mask must have shape \[2, 3\], got \[3\]"),
    ({"kind": "kl"}, ValueError, "kind must be one of forward_kl, .*, got .kl."),
    ({"kind": "jsd", "beta": 0.0}, ValueError, "beta must be above 0 .*forward_kl.*reverse_kl"),
    ({"kind": "jsd", "beta": 1.0}, ValueError, "beta must be above 0 .*forward_kl.*reverse_kl"),
    ({"kind": "skew_forward_kl", "beta": 1.0}, ValueError, "beta must be at least 0 and below 1"),
    ({"temperature": 0.0}, ValueError, "temperature must be .*, got 0"),
    ({"temperature": "hot"}, TypeError, "temperature must be a number or a tensor, got str"),
    ({"temperature": torch.ones(4)}, ValueError, r"temperature must .*\[2, 3\], got \[4\]"),
    ({"teacher_temperature": -1.0}, ValueError, "teacher_temperature must be .*, got -1"),
    ({"softcap": 0.0}, ValueError, "softcap must be greater than 0 and finite, got 0"),
    ({"teacher_softcap": -1.0}, ValueError, "softcap must be greater than 0 and finite, got -1"),
    ({"reduction": "avg"}, ValueError, "reduction must be .*, got .avg."),
]


@pytest.mark.parametrize(("wrong", "error", "text"), BAD, ids=lambda x: str(x)[:30])
def test_errors(wrong: dict[str, Any], error: type[Exception], text: str) -> None:
    good = {"logits": torch.zeros(2, 3, 5), "teacher_logits": torch.zeros(2, 3, 5)}
    given = {**good, **wrong}
    with pytest.raises(error, match=f"masked_divergence: .*{text}") as expected:
        masked_divergence(**given)

    def with_tangents() -> None:
        more = {k: v for k, v in given.items() if k != "logits"}
        x = given["logits"]
        torch.func.jvp(lambda x: masked_divergence(x, **more), (x,), (torch.ones_like(x),))

    def on_meta() -> None:
        masked_divergence(
            **{k: x.to("meta") if isinstance(x, Tensor) else x for k, x in given.items()}
        )

    # Tensors that no kernel sees are checked elsewhere, with the same texts.
    for call in (with_tangents, on_meta) if given["logits"].is_floating_point() else (on_meta,):
        with pytest.raises(error) as raised:
            call()
        assert str(raised.value) == str(expected.value)


def test_module() -> None:
    student, teacher, mask, _ = problem(torch.float32)
    options = {"kind": "jsd", "beta": 0.3, "temperature": 2.0, "shift": True}
    module = masked_loss.MaskedDivergenceLoss(**options)
    expected = masked_divergence(student, teacher, mask, **options)
    assert torch.equal(module(student, teacher, mask), expected)
    assert "kind='jsd'" in repr(module)


@pytest.mark.parametrize("name", ["temperatures", "teacher_temperatures"])
def test_temperatures_of_the_operator(name: str) -> None:
    """One for each token: another number of them would be read beyond its end."""
    student, teacher = torch.randn(2, 4, 6, 5)
    operator = torch.ops.masked_loss.masked_divergence
    for wrong in (torch.tensor(2.0), torch.ones(24), torch.ones(6, 4)):
        with pytest.raises(RuntimeError, match=rf"{name} must have shape \[4, 6\]"):
            operator(student, teacher, **{name: wrong})
    with pytest.raises(RuntimeError, match=f"{name} must be float64, float32"):
        operator(student, teacher, **{name: torch.ones(4, 6, dtype=torch.long)})
