# SPDX-License-Identifier: BSD-3-Clause
"""From Nsight Compute's counters to a table: ``python benchmarks/gpu_counters.py ncu.csv``.

    ncu --set full --csv --page raw --log-file ncu.csv -k "regex:kernel" \
        python benchmarks/gpu_shapes.py

Each line is a launch. The stalls are the three that a warp spends most of its time in; issue is how
often a scheduler had something to issue, occupancy the warps that were there of those possible.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable

from timing import markdown, milliseconds

STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
UNITS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6}
UNITS |= {"Gbyte": 1e9, "nsecond": 1e-9, "usecond": 1e-6, "msecond": 1e-3, "second": 1.0}

Launch = dict[str, str]  # texts by column


def launches(lines: Iterable[str]) -> tuple[list[Launch], Launch]:
    """Every launch of a file that ncu wrote, and the units of the columns."""
    table = list(csv.reader(line for line in lines if line.startswith('"')))
    if len(table) < 2 or "Kernel Name" not in table[0]:
        raise ValueError("expected what `ncu --csv --page raw` writes, got no header of it")
    header, units, *rows = table
    return [dict(zip(header, row, strict=True)) for row in rows], dict(
        zip(header, units, strict=True)
    )


def number(launch: Launch, units: Launch, column: str) -> float:
    """In seconds, bytes, or as the column has it."""
    if column not in launch:
        raise ValueError(f"no column {column}: was `ncu --set full` asked for?")
    return float(launch[column].replace(",", "")) * UNITS.get(units[column], 1.0)


def plain(kernel: str) -> str:
    """Without namespaces and arguments."""
    return kernel.removeprefix("void ").replace("unnamed>::", "").split("(")[0]


def stalls(launch: Launch) -> list[tuple[str, float]]:
    """What warps wait for, by the share of their time."""
    before, after = STALL.split("{}")
    clocks = {
        column.removeprefix(before).removesuffix(after): float(text.replace(",", ""))
        for column, text in launch.items()
        if column.startswith(before) and column.endswith(after)
    }
    total = sum(clocks.values())
    waits = [(name, share / total) for name, share in clocks.items() if name != "selected"]
    return sorted(waits, key=lambda wait: -wait[1])


def table(lines: Iterable[str]) -> str:
    found, units = launches(lines)
    rows = []
    for launch in found:
        seconds, read, written, registers, reached, possible, issue, l2 = (
            number(launch, units, column)
            for column in (
                "gpu__time_duration.sum",
                "dram__bytes_read.sum",
                "dram__bytes_write.sum",
                "launch__registers_per_thread",
                "sm__warps_active.avg.pct_of_peak_sustained_active",
                "sm__maximum_warps_per_active_cycle_pct",
                "smsp__issue_active.avg.pct_of_peak_sustained_active",
                "lts__t_sector_hit_rate.pct",
            )
        )
        size = " x ".join(
            launch[name].strip("()").split(",")[0] for name in ("Grid Size", "Block Size")
        )
        row = [plain(launch["Kernel Name"]), size, milliseconds(seconds)]
        row += [f"{read / 1e6:.1f}", f"{written / 1e6:.1f}"]
        row += [f"{(read + written) / seconds / 1e12:.2f}", f"{registers:.0f}"]
        row += [f"{reached:.0f} of {possible:.0f}", f"{issue:.0f}", f"{l2:.0f}"]
        row += [", ".join(f"{name} {share:.0%}" for name, share in stalls(launch)[:3])]
        rows.append(row)
    header = ["kernel", "grid x block", "time", "MB read", "MB written", "TB/s", "registers"]
    return markdown([*header, "occupancy, %", "issue, %", "L2 hits, %", "stalls"], rows)


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        print(table(file))
