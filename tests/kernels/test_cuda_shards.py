# SPDX-License-Identifier: BSD-3-Clause
"""Shards of the classes on the CUDA emulator, by ranks that are threads."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_as_accurate_as_eager
from log_prob_samples import check as check_log_probs
from samples import CASES, FEW_CASES, OPTIONS, Case
from shards import sharded, splits

from masked_loss import masked_cross_entropy, reference, token_log_probs

pytestmark = pytest.mark.usefixtures("emulator")


def check(case: Case, dtype: torch.dtype) -> None:
    ours = sharded(masked_cross_entropy, splits(case.classes or 0, f"{case}-{dtype}"))
    assert_as_accurate_as_eager(
        ours, reference.masked_cross_entropy, case, dtype, return_stats=True
    )


@pytest.mark.parametrize("case", CASES[::6], ids=str)
def test_every_option(case: Case) -> None:
    check(case, torch.float32)


@pytest.mark.parametrize("case", FEW_CASES[::3], ids=str)
def test_every_dtype(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.parametrize("classes", [1, 257, 40009])
def test_every_width(classes: int, dtype: torch.dtype) -> None:
    for name in ("plain", "everything"):
        check(Case(f"{classes}-{name}", (2, 2), classes, "odd", options=OPTIONS[name]), dtype)


@pytest.mark.parametrize("options", ["plain", "everything"])
@pytest.mark.parametrize("ids", [None, 5], ids=lambda k: f"{k}_ids")
def test_log_probs(ids: int | None, options: str, dtype: torch.dtype) -> None:
    results = 2 if options == "everything" else 1
    function = sharded(token_log_probs, splits(1025, f"{ids}{dtype}"), results)
    check_log_probs(1025, ids, options, dtype, function)
