# SPDX-License-Identifier: BSD-3-Clause
"""Cases that several ranks do together, in real process groups (gloo), spawned once for all."""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import wait

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Case = Callable[[int, int], None]
"""Of its rank and the number of ranks."""
ENDS = "every rank ends"

needs_gloo = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"
)


def _do(rank: int, numbers: Sequence[int], module: str, folder: str) -> None:
    """One rank's part: what it raised is left in a file."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    cases: dict[str, Case] = importlib.import_module(module).CASES
    errors: dict[int, dict[str, str]] = {}
    for ranks in numbers:
        if rank >= ranks:
            continue
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(os.path.join(folder, f"store{ranks}"), ranks),
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=150),
        )
        errors[ranks] = {}
        for name, case in cases.items():
            try:
                case(rank, ranks)
            except BaseException:
                errors[ranks][name] = f"rank {rank}: {traceback.format_exc()}"
                break  # the other ranks may wait: what follows would not mean anything
        torch.save(errors, os.path.join(folder, f"errors{rank}"))
        if errors[ranks]:
            sys.exit(1)
        dist.barrier()
        dist.destroy_process_group()


def errors_of(module: str, numbers: Sequence[int]) -> dict[int, dict[str, str]]:
    """By the number of ranks: the cases among the module's CASES that failed."""
    found: dict[int, dict[str, str]] = {ranks: {} for ranks in numbers}
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_do, args=(rank, numbers, module, folder), daemon=True)
            for rank in range(max(numbers))
        ]
        for process in processes:
            process.start()
        running, end = list(processes), time.monotonic() + 180
        while running and (left := end - time.monotonic()) > 0:
            wait([process.sentinel for process in running], left)
            running = [process for process in running if process.is_alive()]
            if any(process.exitcode for process in processes):
                end = min(end, time.monotonic() + 5)  # the others may wait for the one that failed
        for rank, process in enumerate(processes):
            path = os.path.join(folder, f"errors{rank}")
            reported = torch.load(path) if os.path.exists(path) else {}
            for ranks in numbers:
                for name, error in reported.get(ranks, {}).items():
                    found[ranks][name] = found[ranks].get(name, "") + error
            *_, last = (ranks for ranks in numbers if rank < ranks)
            for ranks in numbers:
                unended = ranks not in reported or (ranks == last and process.exitcode != 0)
                if rank < ranks and unended:
                    found[ranks][ENDS] = f"rank {rank}: exit {process.exitcode}"
            process.kill()
    return found


def report(case: str, errors: dict[str, str]) -> None:
    """As a test of its own. With one case that failed the others do too, of which nobody knows
    whether all ranks did them: to skip them would pass, where the one is not among the tests."""
    if errors:
        pytest.fail(errors.get(case, f"not done by all ranks: {', '.join(errors)} failed"))
