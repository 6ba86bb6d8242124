# SPDX-License-Identifier: BSD-3-Clause
"""Log-probabilities, entropy and divergences on the CPU, against what trainers write in PyTorch.

First the results are verified against fp64. Then all candidates take turns on one thread, in
processor time, nothing masked and the caches cold. The unit is C, our own cross entropy forward
("none") on the same logits; peak memory is measured in a process for each candidate.

    python benchmarks/losses.py                 everything, into benchmarks/results/losses_cpu.*
    python benchmarks/losses.py --part memory   one part; the others' results stay
    python benchmarks/losses.py --quick         tiny shapes, nothing is written: does it run?
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import timing
import torch
from losses_formulas import (
    CASES,
    FORWARD,
    MEASURES,
    QUICK,
    STEP,
    Case,
    call_of,
    cross_entropy,
    make,
    verify,
)
from losses_linear import LINEAR, QUICK_LINEAR, measure_linear
from losses_report import plot, report
from timing import in_process, interleave


def measure_times(cases: list[Case], rounds: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    found = {}
    for case in cases:
        verify(case)
        x = make(case)
        calls = {
            FORWARD: call_of(cross_entropy, x, False),
            STEP: call_of(cross_entropy, x, True),
        }
        for name, measure in MEASURES.items():
            calls[name] = call_of(measure.loss, x, measure.backward)
            for peer, (loss, _) in measure.peers.items():
                calls[f"{name}: {peer}"] = call_of(loss, x, measure.backward)
        found[case.name] = interleave(
            calls, rounds=rounds, warmup=1, before=timing.evict, clock=timing.processor
        )
    return found


def peak(name: str, peer: str, case: list[Any]) -> int:
    """Bytes that a step adds at its peak, gradient included, in a process of its own."""
    measure = MEASURES[name]
    loss = measure.peers[peer][0] if peer else measure.loss
    call_of(loss, make(Case(64, 64, case[2])), measure.backward)()
    return timing.peak_growth(call_of(loss, make(Case(*case)), measure.backward))


def measure_memory(cases: list[Case]) -> dict[str, Any]:
    names = ("log-probability, step", "with entropy, step", "forward KL, step", "JSD, step")
    return {
        case.name: {
            f"{name}: {peer or 'ours'}": in_process(peak, name, peer, list(case))
            for name in names
            for peer in ("", *MEASURES[name].peers)
        }
        for case in cases
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", nargs="*", default=["times", "memory", "linear"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    cases, linear = (QUICK, QUICK_LINEAR) if args.quick else (CASES, LINEAR)
    rounds = 2 if args.quick else args.rounds
    threads = torch.get_num_threads()
    results: dict[str, Any] = {"environment": timing.environment()}
    for part in args.part:
        torch.set_num_threads(threads)
        results[part] = {
            "times": lambda: measure_times(cases, rounds),
            "memory": lambda: measure_memory(cases),
            "linear": lambda: measure_linear(linear, rounds),
        }[part]()
    if args.quick:
        print(report(results))
        return
    path = timing.save("losses_cpu", results)
    results = json.loads(path.read_text())
    if "times" in args.part:
        plot(results["times"])
    path.with_suffix(".md").write_text(report(results))
    print(report(results))


if __name__ == "__main__":
    main()
