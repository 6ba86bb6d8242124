# SPDX-License-Identifier: BSD-3-Clause
"""From what losses.py measured to results/losses_cpu.md and its plot."""

from __future__ import annotations

from typing import Any

import timing
from losses_formulas import DTYPES, FORWARD, MEASURES, STEP
from losses_linear import LINEAR_MEASURES
from timing import Times, markdown, milliseconds


def judged(text: str, reached: bool) -> str:
    """Bold where it falls short."""
    return text if reached else f"**{text}**"


def rows_of(case: str, seconds: dict[str, list[float]]) -> list[list[str]]:
    times = {name: Times(values) for name, values in seconds.items()}
    unit, step = times[FORWARD], times[STEP]
    rows = [[case, "cross entropy forward: C", milliseconds(unit.median), "1", "", ""]]
    rows.append([case, STEP, milliseconds(step.median), f"{1 / step.ratio(unit):.2f}", "", ""])
    for name, measure in MEASURES.items():
        limit = Times(
            measure.forwards * c + measure.steps * s for c, s in zip(unit, step, strict=True)
        )
        in_units = 1 / times[name].ratio(unit)
        allowed = in_units * times[name].ratio(limit)
        row = [case, name, milliseconds(times[name].median)]
        row += [judged(f"{in_units:.2f}", in_units <= allowed), f"{allowed:.2f}"]
        peers = []
        for peer, (_, aims) in measure.peers.items():
            ratio = times[name].ratio(times[f"{name}: {peer}"])
            aim = aims.get(case.split()[-1])
            text = judged(f"{ratio:.1f}", aim is None or ratio >= aim)
            peers.append(f"{peer} {text}" + (f" ({aim:g})" if aim else ""))
        rows.append([*row, ", ".join(peers)])
    return rows


def linear_rows(case: str, seconds: dict[str, list[float]]) -> list[list[str]]:
    times = {name: Times(values) for name, values in seconds.items()}
    rows = []
    for name, (_, floor, _) in LINEAR_MEASURES.items():
        ratio = 1 / times[name].ratio(times[floor])
        row = [case, name, milliseconds(times[floor].median), milliseconds(times[name].median)]
        rows.append([*row, judged(f"{ratio:.2f}", ratio <= 1.2)])
    return rows


def report(results: dict[str, Any]) -> str:
    text = [
        "# Log-probabilities, entropy and divergences on the CPU",
        "`python benchmarks/losses.py`. "
        + ", ".join(f"{key}: {value}" for key, value in results["environment"].items() if value),
    ]
    if "times" in results:
        header = ("case", "what", "ours", "in C", "at most", "times as fast as (at least)")
        rows = [row for case in results["times"].items() for row in rows_of(*case)]
        text += [
            "## Time",
            "Processor time on one thread, nothing masked, caches cold. C is our cross entropy "
            'forward, `reduction="none"`; a step is forward and backward. Bold falls short.',
            markdown(header, rows),
        ]
    if "memory" in results:
        text += ["## Peak memory of a step", "MiB beyond the inputs, the gradient included."]
        for case, peaks in results["memory"].items():
            rows, cols, dtype = case.replace(" x", "").split()
            size = int(rows) * int(cols) * DTYPES[dtype].itemsize
            text.append(f"{case}: the logits have {size / 2**20:.1f}.")
            lines = [[name, f"{peak / 2**20:.1f}"] for name, peak in peaks.items()]
            text.append(markdown(("what", "MiB"), lines))
    if "linear" in results:
        rows = [row for case in results["linear"].items() for row in linear_rows(*case)]
        text += [
            "## From hidden states",
            "A step, all threads, against its four products (of the divergence: student's and "
            "teacher's logits, and two gradients); at most 1.2.",
            markdown(("case", "what", "products", "ours", "ours / products"), rows),
        ]
    return "\n\n".join(text) + "\n"


def plot(times: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9})
    figure, axes = plt.subplots(1, len(times), figsize=(12, 4.2), layout="constrained", sharey=True)
    figure.suptitle("Steps: how many times as long as our cross entropy forward")
    shown = [name for name, measure in MEASURES.items() if measure.backward and measure.peers]
    colours = ["#8a8f98", "#3b6ea5"]
    for axis, (case, seconds) in zip(axes, times.items(), strict=True):
        unit = Times(seconds[FORWARD])
        for i, name in enumerate(shown):
            candidates = {"ours": name, **{p: f"{name}: {p}" for p in MEASURES[name].peers}}
            for j, (who, key) in enumerate(candidates.items()):
                height = 1 / Times(seconds[key]).ratio(unit)
                place = i + 0.28 * (j - (len(candidates) - 1) / 2)
                colour = "#b3412a" if who == "ours" else colours[j - 1]
                bar = axis.bar([place], [height], 0.26, color=colour)
                axis.bar_label(bar, [f"{height:.1f}\n{who}"], fontsize=6)
        axis.set_title(case, fontsize=9)
        axis.set_yscale("log")
        labels = [name.removesuffix(", step") for name in shown]
        axis.set_xticks(range(len(shown)), labels, fontsize=8)
    figure.savefig(timing.RESULTS / "losses_cpu.png", dpi=120)
