# SPDX-License-Identifier: BSD-3-Clause
"""tests/rank_cases.py: what happens to a rank fails the tests of its number, whichever are run."""

from __future__ import annotations

import os
from multiprocessing.util import Finalize

import pytest
import torch.distributed as dist
from rank_cases import ENDS, Case, errors_of, needs_gloo, report

pytestmark = needs_gloo


def passes(rank: int, ranks: int) -> None:
    """But the last of three ranks, which has nothing else to do, does not end as it should."""
    dist.barrier()
    if rank == 2:
        Finalize(None, os._exit, args=(7,), exitpriority=1)


def fails(rank: int, ranks: int) -> None:
    """On one of two ranks, for which the other waits."""
    assert (rank, ranks) != (1, 2)
    dist.barrier()


CASES: dict[str, Case] = {f.__name__: f for f in (passes, fails)}


def test_no_failure_of_a_rank_is_lost() -> None:
    errors = errors_of(__name__, (3, 2))
    assert errors[3] == {ENDS: "rank 2: exit 7"}
    assert errors[2]
    for found in errors.values():
        for case in (*CASES, ENDS):
            with pytest.raises(pytest.fail.Exception, match="rank"):
                report(case, found)
    for case in (*CASES, ENDS):
        report(case, {})
