# SPDX-License-Identifier: BSD-3-Clause
"""Losses of a vocabulary that is shared out to ranks, against the specification of all of it.

Here the ranks are threads (shards.py); test_sharded_ranks.py has processes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from accuracy import assert_as_accurate_as_eager
from log_prob_samples import OPTIONS as SCORING
from log_prob_samples import check as check_log_probs
from opchecks import opchecks
from samples import CASES, FEW_CASES, OPTIONS, Case
from shards import sharded, splits

from masked_loss import masked_cross_entropy, reference, token_log_probs


def check(case: Case, dtype: torch.dtype, **more: object) -> None:
    bounds = splits(case.classes or 0, f"{case}-{dtype}-{more}")
    ours = sharded(masked_cross_entropy, bounds)
    assert_as_accurate_as_eager(ours, reference.masked_cross_entropy, case, dtype, **more)


@pytest.mark.parametrize("case", CASES[::2], ids=str)
def test_every_option(case: Case) -> None:
    check(case, torch.float32, return_stats=True)


def test_a_smoothing_of_one_is_not_none() -> None:
    check(Case("ones", options={"label_smoothing": 1.0, "z_loss": 1.0}), torch.float32)


@pytest.mark.parametrize("case", FEW_CASES[::2], ids=str)
def test_every_dtype(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype)


# Prime; around vectors and segments of a row.
@pytest.mark.parametrize("classes", [1, 2, 7, 31, 257, 40009])
@pytest.mark.parametrize("options", ["plain", "everything"])
def test_every_width(classes: int, options: str, dtype: torch.dtype) -> None:
    case = Case(f"{classes}-{options}", (2, 2), classes, "odd", options=OPTIONS[options])
    check(case, dtype, return_stats=True)


@pytest.mark.parametrize("options", SCORING)
@pytest.mark.parametrize("ids", [None, 5], ids=lambda k: f"{k}_ids")
@pytest.mark.parametrize("classes", [1, 257])
def test_log_probs(classes: int, ids: int | None, options: str) -> None:
    check_scores(classes, ids, options, torch.float32)


@pytest.mark.parametrize("ids", [None, 5], ids=lambda k: f"{k}_ids")
def test_log_probs_of_every_dtype(ids: int | None, dtype: torch.dtype) -> None:
    check_scores(16411, ids, "everything", dtype)


def check_scores(classes: int, ids: int | None, options: str, dtype: torch.dtype) -> None:
    bounds = splits(classes, f"{classes}-{ids}-{options}-{dtype}")
    results = 2 if "return_entropy" in SCORING[options] else 1
    function = sharded(token_log_probs, bounds, results)
    check_log_probs(classes, ids, options, dtype, function)


BOUNDS = ([0, 3], [0, 0, 3], [0, 1, 2, 3], [0, 1, 1, 3, 3])


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
def test_ties_infinities_and_nan(bounds: list[int]) -> None:
    """The first of equal logits is right; a NaN is never; nor is -inf, but in the first column."""
    inf, nan = torch.inf, torch.nan
    values = torch.tensor([1.0, 2.0, -inf, inf, nan])
    logits = torch.cartesian_prod(values, values, values)
    rows = len(logits)
    logits, target = logits.repeat(3, 1), torch.arange(3).repeat_interleave(rows)
    function = sharded(masked_cross_entropy, bounds)
    for reduction in ("none", "sum"):
        ours, stats = function(logits, target, reduction=reduction, return_stats=True)
        expected, others = masked_cross_entropy(
            logits, target, reduction=reduction, return_stats=True
        )
        torch.testing.assert_close(ours, expected, equal_nan=True)
        assert stats.correct == others.correct
    log_probs = sharded(token_log_probs, bounds)(logits, target)
    torch.testing.assert_close(log_probs, token_log_probs(logits, target), equal_nan=True)
    for k in range(len(target)):
        _, stats = function(logits[k], target[k], return_stats=True)
        _, others = masked_cross_entropy(logits[k], target[k], return_stats=True)
        assert stats.correct == others.correct, (logits[k], target[k])


OPS = torch.ops.masked_loss


def test_more_than_one_derivative_is_refused() -> None:
    logits, target = torch.randn(3, 5, requires_grad=True), torch.tensor([0, 4, 2])

    def loss(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.masked_loss.sharded_cross_entropy(
            x, target, vocab_group="", bounds=[0, 5], reduction="sum"
        )

    (gradient,) = torch.autograd.grad(loss(logits), logits, create_graph=True)
    with pytest.raises(RuntimeError, match=r"masked_cross_entropy: .* first derivatives, in rev"):
        gradient.sum().backward()
    with pytest.raises(RuntimeError, match=r"masked_cross_entropy: .* first derivatives, in rev"):
        torch.func.jvp(loss, (logits.detach(),), (torch.ones_like(logits),))


def test_what_shards_tell_is_checked() -> None:
    """The kernels read it as numbers of the table's type, and as many as there should be."""
    target, tokens, groups = torch.tensor([0, 3, 1]), torch.rand(5, 3), torch.rand(1, 6)
    parts, bounds = torch.rand(2, 3, 3), torch.tensor([0, 2, 4])
    for wrong, error in (
        ({"parts": parts.half()}, "TypeError: .*: parts must be float64 or float32, got float16"),
        ({"parts": parts[:1]}, r"parts must have shape \[2, 3, 3\], got \[1, 3, 3\]"),
        ({"parts": parts.mT}, "parts must be contiguous"),
        ({"bounds": bounds.int()}, "TypeError: .*: bounds must be int64, got int32"),
        ({"bounds": bounds[:1]}, r"bounds must be a contiguous \[R \+ 1\], got shape \[1\]"),
    ):
        given = {"parts": parts, "bounds": bounds, **wrong}
        with pytest.raises(RuntimeError, match=error):
            OPS.cross_entropy_merge(
                target=target, tokens=tokens, groups=groups, class_weight=None, temperatures=None,
                **given,
            )  # fmt: skip


@pytest.mark.filterwarnings("error")
def test_vmap() -> None:
    logits, target = torch.randn(4, 3, 5, requires_grad=True), torch.randint(5, (4, 3))
    place: dict[str, Any] = {"vocab_group": "", "bounds": [0, 5]}
    for ours, other in (
        (OPS.sharded_cross_entropy, masked_cross_entropy),
        (OPS.sharded_token_log_probs, token_log_probs),
    ):
        results = torch.vmap(partial(ours, **place))(logits, target)
        expected = torch.stack([other(*each) for each in zip(logits, target, strict=True)])
        torch.testing.assert_close(results, expected)
        upstream = torch.rand_like(expected)
        gradients = (torch.autograd.grad(x, logits, upstream) for x in (results, expected))
        torch.testing.assert_close(*gradients)


TESTS = ("test_schema", "test_faketensor")
WHOLE: dict[str, Any] = {"vocab_group": "", "bounds": [0, 9]}


@opchecks(
    "sharded_cross_entropy", "sharded_cross_entropy_stats", "sharded_cross_entropy_forward",
    "cross_entropy_partial", "cross_entropy_merge",
    "cross_entropy_shard_backward", "cross_entropy_shard_backward_out",
)  # fmt: skip
def test_opcheck_of_cross_entropy() -> None:
    logits, target = torch.randn(2, 3, 9, requires_grad=True), torch.randint(9, (2, 3))
    how = {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0}
    for name in ("sharded_cross_entropy", "sharded_cross_entropy_stats"):
        torch.library.opcheck(getattr(OPS, name).default, (logits, target), WHOLE | how)
    inputs = (logits.detach(), target, None, None, torch.rand(9), None, None)
    forward = WHOLE | how | {"stats": True}
    torch.library.opcheck(OPS.sharded_cross_entropy_forward.default, inputs, forward)
    loss, _, tokens, groups = OPS.sharded_cross_entropy_forward(*inputs, **forward)
    saved = (target, tokens, groups, torch.rand(9), None)
    local, place = torch.randn(2, 3, 4), {"first": 2, "classes": 9}
    tell = OPS.cross_entropy_partial.default  # of ids in other shards nothing
    for more in (how, {}):
        torch.library.opcheck(tell, (local, *saved), place | more, test_utils=TESTS)
    parts, bounds = torch.rand(2, 7, 6), torch.tensor([0, 2, 9])
    merge = OPS.cross_entropy_merge.default
    torch.library.opcheck(merge, (parts, *saved, bounds), how, test_utils=TESTS)
    gradient = (torch.ones_like(loss), local, *saved)
    torch.library.opcheck(OPS.cross_entropy_shard_backward.default, gradient, place | how)
    into = OPS.cross_entropy_shard_backward_out.default
    torch.library.opcheck(into, (torch.empty_like(local), *gradient), place | how)


@opchecks(
    "sharded_token_log_probs", "sharded_token_log_probs_entropy", "sharded_token_log_probs_forward",
    "token_log_probs_partial", "token_log_probs_merge",
    "token_log_probs_shard_backward", "token_log_probs_shard_backward_out",
)  # fmt: skip
def test_opcheck_of_log_probs() -> None:
    logits, target = torch.randn(2, 3, 9, requires_grad=True), torch.randint(9, (2, 3, 2))
    how = {"softcap": 3.0}
    for name in ("sharded_token_log_probs", "sharded_token_log_probs_entropy"):
        torch.library.opcheck(getattr(OPS, name).default, (logits, target), WHOLE | how)
    inputs = (logits.detach(), target, None, None, None, True)
    torch.library.opcheck(OPS.sharded_token_log_probs_forward.default, inputs, WHOLE | how)
    *_, tokens = OPS.sharded_token_log_probs_forward(*inputs, **WHOLE, **how)
    local, place = torch.randn(2, 3, 4), {"first": 2, "classes": 9}
    tell = OPS.token_log_probs_partial.default
    for ids in (target, target[..., 0]):
        part = (local, ids, tokens, None, True)
        torch.library.opcheck(tell, part, place | how, test_utils=TESTS)
    merge = OPS.token_log_probs_merge.default
    args = (torch.rand(2, 5, 6), target, tokens, torch.tensor([0, 2, 9]), True)
    torch.library.opcheck(merge, args, how, test_utils=TESTS)
    gradient = (torch.rand(2, 3, 2), torch.rand(2, 3), local, target, tokens, None)
    torch.library.opcheck(OPS.token_log_probs_shard_backward.default, gradient, place | how)
    into = OPS.token_log_probs_shard_backward_out.default
    torch.library.opcheck(into, (torch.empty_like(local), *gradient), place | how)
