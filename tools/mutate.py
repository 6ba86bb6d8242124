# SPDX-License-Identifier: BSD-3-Clause
"""Changes the formulas, one operator or number at a time, and lists what no test notices.

    python tools/mutate.py                       all of them
    python tools/mutate.py --only math --share 4 every fourth, of the files with this in their name
    python tools/mutate.py --list                what would be changed

All mutants of the kernels are in one library, built once, and any number of them can be switched
on (mutants.inl.h). The tests are collected once. A process is forked for each mutant, which runs
the tests that apply, for --seconds of processor time, and stops at the first that fails. What was
not noticed by then is switched on with others, and all tests run: what a group fails is tried on
each of it. A mutant that no test notices is a missing test, or equal to the original:
mutants_equal.txt says why for those that were looked into.
"""

from __future__ import annotations

import argparse
import faulthandler
import mmap
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from mutants import CAPABILITY, TARGETS, Mutant, explained, mutants
from mutants_library import TREE, build, built, switch_on

# The tests, in a process for each mutant or group of mutants

TIME_OUT, UNDECIDED = "time out", "undecided"
SECONDS_OF_A_TEST = 20
FORK = multiprocessing.get_context("fork")


class Run(NamedTuple):
    verdict: str  # "" where all tests passed
    test: str  # the last one
    seconds: float  # of processor time


class Tests:
    """A plugin of pytest: once the tests are collected, calls ``instead`` instead of them."""

    def __init__(self, instead: Callable[[], None]) -> None:
        self.instead = instead

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.session = session
        self.instead()
        return True

    def of(self, file: str) -> list[pytest.Item]:
        """Those that must notice a change of this file, where TARGETS has them first."""
        files = dict.fromkeys(TARGETS[file])
        order = {str(TREE / name): i for i, name in enumerate(files)}
        found = [item for item in self.session.items if str(item.path) in order]
        return sorted(found, key=lambda item: order[str(item.path)])

    def run(self, mutants: list[Mutant], tests: list[pytest.Item], seconds: float = 1e9) -> Run:
        """In a process of its own, which begins no test after so many seconds."""
        at = mmap.mmap(-1, 8)  # which test
        child = os.fork()
        if child == 0:
            code = 1
            try:
                self._run_here(mutants, tests, seconds, at)
                code = 0
            finally:
                os._exit(code)
        status, used = wait_for(child)
        test = int.from_bytes(at[:], "little")
        code = os.waitstatus_to_exitcode(status)
        verdict = {0: "", 1: "noticed", -signal.SIGXCPU: TIME_OUT, -signal.SIGKILL: TIME_OUT}
        passed = UNDECIDED if test + 1 < len(tests) else ""
        return Run(
            passed if code == 0 else verdict.get(code, f"exit code {code}"),
            tests[test].nodeid,
            used,
        )

    def _run_here(
        self, mutants: list[Mutant], tests: list[pytest.Item], seconds: float, at: mmap.mmap
    ) -> None:
        """Raises where a test fails."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        faulthandler.disable()  # its trace would be long
        switch_on(mutants)
        for i, (item, next_one) in enumerate(zip(tests, [*tests[1:], None], strict=True)):
            used = time.process_time()
            if used > seconds:
                return
            at[:] = i.to_bytes(8, "little")
            end = int(used) + SECONDS_OF_A_TEST
            resource.setrlimit(resource.RLIMIT_CPU, (end, resource.RLIM_INFINITY))
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=next_one)
            if self.session.testsfailed:
                raise AssertionError


def wait_for(child: int) -> tuple[int, float]:
    """Its status, and the processor time it took. Ends it where it waits for what does not come."""
    before, idle = [""], 0
    while idle < 60 / 0.02:  # not by the clock: both may be stopped, or come last
        pid, status, usage = os.wait4(child, os.WNOHANG)
        if pid:
            return status, usage.ru_utime + usage.ru_stime
        taken = Path(f"/proc/{child}/stat").read_text().rsplit(")")[1].split()[11:13]
        idle = idle + 1 if taken == before else 0
        before = taken
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    return status, usage.ru_utime + usage.ru_stime


# The campaign

GROUP = 40
tests: Tests  # the workers' too, which are forked


class Verdict(NamedTuple):
    mutant: Mutant
    run: Run


def campaign(
    capability: str, chosen: list[Mutant], equal: set[Mutant], seconds: float, jobs: int
) -> list[Verdict]:
    """Of the kernels of one instruction set, which a process chooses once."""
    os.environ["ATEN_CPU_CAPABILITY"] = capability
    os.chdir(TREE)
    sys.path.insert(0, str(TREE))
    found: list[Verdict] = []

    def instead() -> None:
        import torch

        if torch.ops.masked_loss.cpu_capability() != capability:
            sys.exit(f"mutate.py: this machine has no {capability}")
        check_original(chosen)
        with ProcessPoolExecutor(jobs, FORK) as pool:
            unknown = [m for m in chosen if m not in equal]
            alone = map(Verdict, unknown, pool.map(partial(run_alone, seconds), unknown))
            found.extend(reported(alone))
            left = [v.mutant for v in found if v.run.verdict == UNDECIDED]
            left += [m for m in chosen if m in equal]
            found[:] = [v for v in found if v.run.verdict != UNDECIDED]
            for verdicts in pool.map(run_together, groups_of(left)):
                found.extend(reported(verdicts))

    global tests
    tests = Tests(instead)
    files = dict.fromkeys(file for m in chosen for file in TARGETS[m.file])
    options = ["-qq", "--capture=no", "-pno:cacheprovider", "-ofaulthandler_timeout=0"]
    pytest.main([*options, "-mnot slow", *files], plugins=[tests])
    return found


def check_original(chosen: list[Mutant]) -> None:
    for file in {tuple(TARGETS[m.file]): m.file for m in chosen}.values():
        run = tests.run([], tests.of(file))
        print(f"the original, {len(tests.of(file))} tests: {run}", flush=True)
        if run.verdict:
            sys.exit(1)


def run_alone(seconds: float, m: Mutant) -> Run:
    return tests.run([m], tests.of(m.file), seconds)


def groups_of(left: list[Mutant]) -> Iterator[list[Mutant]]:
    """Of the same tests, and of neighbours in different ones, which might make good each other."""
    same: dict[tuple[str, ...], list[Mutant]] = {}
    for m in left:
        same.setdefault(tuple(TARGETS[m.file]), []).append(m)
    for of in same.values():
        count = -(-len(of) // GROUP)
        yield from (of[i::count] for i in range(count))


def run_together(group: list[Mutant]) -> list[Verdict]:
    """Once more where some were noticed: they may have made good what others did."""
    verdicts = found_in(group, tests.of(group[0].file))
    left = [v.mutant for v in verdicts if not v.run.verdict]
    if not left or len(left) == len(group):
        return verdicts
    return [v for v in verdicts if v.run.verdict] + run_together(left)


def found_in(group: list[Mutant], of: list[pytest.Item]) -> list[Verdict]:
    """Where a test fails, it is run with each alone, and those that pass go on from there."""
    if not group:
        return []
    run = tests.run(group, of)
    if not run.verdict or len(group) == 1:
        return [Verdict(m, run) for m in group]
    left = of[[item.nodeid for item in of].index(run.test) :]
    alone = [Verdict(m, tests.run([m], left[:1])) for m in group]
    noticed = [v for v in alone if v.run.verdict]
    if noticed:
        return noticed + found_in([v.mutant for v in alone if not v.run.verdict], left)
    return found_in(group[::2], left) + found_in(group[1::2], left)


def reported(verdicts: Iterable[Verdict]) -> Iterator[Verdict]:
    for v in verdicts:
        m, run = v
        what = run.verdict or "SURVIVED"
        print(f"{what} ({run.test}, {run.seconds:.0f} s): {m.number} {m}", flush=True)
        yield v


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="files whose name contains this")
    parser.add_argument("--share", type=int, default=1, help="every n-th mutant")
    parser.add_argument("--number", type=int, nargs="*", help="these mutants")
    parser.add_argument("--seconds", type=float, default=10, help="for the tests of one mutant")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--keep", action="store_true", help="the library of the last run")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    everything = mutants()
    equal = explained(everything)
    chosen = [m for m in everything if args.only in m.file]
    chosen = [m for m in chosen[:: args.share] if not args.number or m.number in args.number]
    if args.list:
        print(*(f"{m.number} {m}" for m in chosen), f"{len(chosen)} mutants", sep="\n")
        return
    if not args.keep:
        build(everything)
    there = built()
    chosen = [m for m in chosen if m.number in there or m.file.endswith(".py")]
    os.environ["OMP_NUM_THREADS"] = "1"
    found: list[Verdict] = []
    for capability in ("avx2", "default"):
        if of := [m for m in chosen if CAPABILITY.get(m.file, "avx2") == capability]:
            with ProcessPoolExecutor(1, FORK) as process:
                found += process.submit(
                    campaign, capability, of, set(equal), args.seconds, args.jobs
                ).result()
    summarize(found, equal)


def summarize(found: list[Verdict], equal: dict[Mutant, str]) -> None:
    survivors = {(m.file, m.changed(m.text)) for m, run in found if not run.verdict}
    counts: dict[str, Counter[str]] = {}
    wrong = False
    for m, run in found:
        why = equal.get(m, "")
        verdict = run.verdict or ("equal" if why else "SURVIVED")
        counts.setdefault(m.file, Counter())[verdict] += 1
        if verdict == "SURVIVED":
            wrong = True
            print(f"SURVIVED: {m.number} {m}")
        elif run.verdict and why and (m.file, m.changed(m.text)) not in survivors:
            wrong = True  # no other line with this text is meant
            print(f"{run.verdict}, though {why}: {m}")
    for file, of_file in counts.items():
        print(f"{file}: {dict(of_file)}")
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
