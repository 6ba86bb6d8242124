# SPDX-License-Identifier: BSD-3-Clause
"""The tables that operators hand each other have the same fields in C++ and in Python."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from masked_loss._op import tables
from masked_loss.stats import LossStats

ROOT = Path(__file__).parents[2]
FIELDS = {
    "TokenField": tables.TOKEN_FIELDS,
    "GroupField": tables.GROUP_FIELDS,
    "LogProbField": tables.LOG_PROB_FIELDS,
    "DivergenceField": tables.DIVERGENCE_FIELDS,
    "StatField": tables.STATISTICS,
}
SAVED = {"TokenField": tables.SAVED, "DivergenceField": tables.DIVERGENCE_SAVED}


def enumerators(name: str) -> list[str]:
    """In csrc/kernels/args.h, up to kCount: kScaleLoss as scale_loss."""
    source = re.sub(r"//.*", "", (ROOT / "csrc/kernels/args.h").read_text())
    (body,) = re.findall(rf"struct {name} {{\s*enum : int64_t {{(.*?)}};", source, re.DOTALL)
    names = [field.split("=")[0].strip() for field in body.split(",")]
    assert names[-1] == "kCount"
    return [re.sub(r"(?<=.)([A-Z])", r"_\1", n.removeprefix("k")).lower() for n in names[:-1]]


@pytest.mark.parametrize("name", FIELDS)
def test_fields(name: str) -> None:
    found = enumerators(name)
    if name in SAVED:
        count = len(SAVED[name])
        assert found[count] == "saved"  # a mark, and no field of its own
        del found[count]
    assert found == list(FIELDS[name])


def test_statistics_are_those_of_loss_stats() -> None:
    assert LossStats._fields == tables.STATISTICS
