# SPDX-License-Identifier: BSD-3-Clause
"""From results/cpu.json to the tables and plots: ``python benchmarks/cpu_report.py``.

README.md says how to read them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import timing
from timing import Times, markdown, milliseconds

PEERS = ("eager", "compiled")
ITEM_SIZE = {"fp32": 4, "bf16": 2}
MASKED = 0.1

# What is aimed at: how many times faster than eager and compiled PyTorch, by type and shape.
FORWARD, STEP, HUGE, INPLACE = "forward", "step", "step, huge pages", "step, in place"
FIRST = "step, first"
FLAT, BF16 = "16384 x 6400 fp32", "1024 x 32000 bf16"
TARGETS: dict[tuple[str, str], float] = {
    (FORWARD, "eager"): 5, (FORWARD, "compiled"): 1.3,
    (STEP, "eager"): 6, (STEP, "compiled"): 4,
    (HUGE, "eager"): 2.5, (HUGE, "compiled"): 1.6,
    (INPLACE, "eager"): 8, (INPLACE, "compiled"): 5,
}  # fmt: skip
TARGETS_OF_CASE: dict[tuple[str, str, str], float] = {
    (FLAT, FORWARD, "eager"): 3,
    (BF16, FORWARD, "eager"): 6, (BF16, FORWARD, "compiled"): 1.8,
    (BF16, STEP, "eager"): 5,
    (BF16, HUGE, "compiled"): 2.2,
    (BF16, INPLACE, "eager"): 7, (BF16, INPLACE, "compiled"): 6,
}  # fmt: skip
READ_SHARE, HALF_LIMIT, AVX2_SHARE = 0.80, 0.60, 0.70
SLACK = 1 << 20

Part = Mapping[str, Any]


def target_of(case: str, measure: str, peer: str) -> float | None:
    case = case.removesuffix(DISTURBED)
    return TARGETS_OF_CASE.get((case, measure, peer), TARGETS.get((measure, peer)))


def judged(text: str, reached: bool) -> str:
    """Bold where it falls short."""
    return text if reached else f"**{text}**"


def size_of(case: str) -> int:
    rows, _, cols, dtype, *_ = case.split()
    return int(rows) * int(cols) * ITEM_SIZE[dtype]


def bytes_moved(case: str, measure: str, masked: float = MASKED) -> float:
    """Active rows are read once; a gradient is written once, zeros for masked rows included."""
    size = size_of(case)
    return size * (1 - masked) + (0 if measure.startswith(FORWARD) else size)


def seconds(part: Part, case: str) -> dict[str, Times]:
    return {name: Times(values) for name, values in part[case]["seconds"].items()}


def speed_up(times: dict[str, Times], measure: str, peer: str) -> float | None:
    """The peer's time over ours, round by round. In place, the peer is the ordinary step."""
    theirs = times.get(f"{STEP if measure in (INPLACE, FIRST) else measure}: {peer}")
    return None if theirs is None else times[f"{measure}: ours"].ratio(theirs)


def rows_of(part: Part, share_of_target: float = 1.0) -> Iterator[list[str]]:
    for case in part:
        times = seconds(part, case)
        measures = [m for m in (FORWARD, STEP, FIRST, HUGE, INPLACE) if f"{m}: ours" in times]
        for measure in measures:
            ours = times[f"{measure}: ours"]
            rate = bytes_moved(case, measure) / ours.median
            share = rate / part[case]["limit"]["copy"]
            if measure == FORWARD:  # of what reading these very logits takes
                reads = [times[f"{FORWARD}: read"], times[f"{FORWARD}: read far"]]
                share = (1 - MASKED) * min(map(ours.ratio, reads))
            aimed_read = measure == FORWARD and " fp32" in case and share_of_target == 1
            row = [case, measure, milliseconds(ours.median), f"{rate / 1e9:.1f}"]
            row.append(judged(f"{share:.0%}", not aimed_read or share >= READ_SHARE))
            for peer in PEERS:
                ratio, aim = speed_up(times, measure, peer), target_of(case, measure, peer)
                if ratio is None:
                    row.append("crashes")
                elif aim is None:
                    row.append(f"{ratio:.1f}")
                else:
                    aim *= share_of_target
                    row.append(judged(f"{ratio:.1f}", ratio >= aim) + f" ({aim:.3g})")
            yield row


MEASURED = ("case", "measure", "ours", "GB/s", "of limit", "vs eager", "vs compiled")


def steady(results: Part) -> Part:
    """``results`` with the names of those cases marked that were measured on a disturbed machine.

    Memory gave less than 70 % of what it usually gave: others used it too.
    """
    parts = {p: r for p, r in results.items() if "limit" in next(iter(r.values()), {})}
    usual = median(c["limit"]["read"] for r in parts.values() for c in r.values())
    marked = {
        part: {
            name + (DISTURBED if case["limit"]["read"] < STEADY * usual else ""): case
            for name, case in cases.items()
        }
        for part, cases in parts.items()
    }
    return {**results, **marked}


DISTURBED, STEADY = " (disturbed)", 0.7


def half_table(part: Part) -> str:
    def rows() -> Iterator[list[str]]:
        for case in part:
            times = seconds(part, case)
            row = [case]
            for measure in (FORWARD, STEP, INPLACE):
                none, half = (times[f"{measure}: masked {share}"] for share in (0.0, 0.5))
                ratio = none.ratio(half)
                moved = bytes_moved(case, measure, 0.5) / bytes_moved(case, measure, 0.0)
                row.append(judged(f"{ratio:.2f}", ratio <= HALF_LIMIT) + f" (bytes: {moved:.2f})")
            yield row

    return markdown(("half masked / none masked", FORWARD, STEP, INPLACE), rows())


def small_table(part: Part) -> str:
    def rows() -> Iterator[list[str]]:
        for case in part:
            times = seconds(part, case)
            for measure in (FORWARD, STEP):
                row = [case, measure, milliseconds(times[f"{measure}: ours"].median)]
                for peer in PEERS:
                    ratio = speed_up(times, measure, peer)
                    assert ratio is not None
                    aimed = measure == STEP and peer == "eager" and not case.startswith("4 ")
                    row.append(judged(f"{ratio:.2f}", not aimed or ratio >= 1))
                yield row

    return markdown(("case", "measure", "ours", "vs eager", "vs compiled"), rows())


def memory_table(part: Part) -> str:
    def rows() -> Iterator[list[str]]:
        for case, peaks in part.items():
            row = [case, f"{size_of(case) / 2**20:.1f}"]
            for name, peak in peaks.items():
                limit = {"ours": size_of(case), "ours, in place": 0}.get(name, peak) + SLACK
                row.append(judged(f"{peak / 2**20:.1f}", peak <= limit))
            yield row

    return markdown(("MiB", "logits", "ours", "ours, in place", "eager", "compiled"), rows())


def accuracy_table(part: Part) -> str:
    names = list(next(iter(part.values())))
    rows = ([case, *(f"{part[case][name]:.1e}" for name in names)] for case in part)
    return markdown(("largest error", *names), rows)


def limits(part: Part) -> str:
    """What memory gave while each case was measured."""
    found = [
        " / ".join(f"{part[case]['limit'][name] / 1e9:.1f}" for case in part)
        for name in ("read", "copy")
    ]
    return f"Limits by case: {found[0]} GB/s read, {found[1]} GB/s copy (read + write)"


def tables(results: Part) -> str:
    """Everything that ``results`` has, as Markdown."""
    results = steady(results)
    blocks = []
    if "main" in results:
        e = next(iter(results["main"].values()))["environment"]
        blocks.append(
            f"{e['cpu']}, {e['cores']} cores, {e['instruction set']}, {e['threads']} threads, "
            f"{e['last level cache'] >> 20} MiB last level cache; PyTorch {e['torch']}, Python "
            f"{e['python']}. 10 % of the tokens masked; caches cold. In brackets what is aimed at, "
            "in bold what falls short of it."
        )
    titles = {
        "main": ("Times", 1.0),
        "huge pages": ("With `THP_MEM_ALLOC_ENABLE=1`", 1.0),
        "avx2": ("With `ATEN_CPU_CAPABILITY=avx2`", AVX2_SHARE),
        "avx2, huge pages": ("With both", AVX2_SHARE),
    }
    for name, (title, share) in titles.items():
        if name in results:
            part = results[name]
            table = markdown(MEASURED, rows_of(part, share))
            blocks.append(f"### {title}\n\n{limits(part)}.\n\n{table}")
    if "main" in results:
        blocks.append(f"### The share masked\n\n{half_table(results['main'])}")
    if "small" in results:
        blocks.append(
            f"### Small inputs, processor time on one thread\n\n{small_table(results['small'])}"
        )
    if "memory" in results:
        blocks.append(
            f"### Peak memory of a step, beside the logits\n\n{memory_table(results['memory'])}"
        )
    if "verify" in results:
        blocks.append(f"### Accuracy\n\n{accuracy_table(results['verify'])}")
    return "\n\n".join(blocks) + "\n"


# Plots


def plot(results: Part, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = steady(results)
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9})
    figure = plt.figure(figsize=(11, 8.5), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.9))
    _plot_speed_up(results, above)
    usual = median(case["limit"]["read"] for case in results["main"].values())
    _plot_growth(results["growth"], below, usual)
    figure.savefig(path, dpi=110)
    plt.close(figure)


COLOURS = {"ours": "#b3412a", "eager": "#8a8f98", "compiled": "#3b6ea5"}


def _plot_speed_up(results: Part, figure: Any) -> None:
    figure.suptitle("How many times faster than the stock idiom", fontweight="bold")
    sources = {FORWARD: "main", STEP: "main", HUGE: "huge pages", INPLACE: "main"}
    axes = figure.subplots(1, len(results["main"]), sharey=True)
    for axis, case in zip(axes, results["main"], strict=True):
        for i, peer in enumerate(PEERS):
            ratios = []
            for m, part in sources.items():
                # Nothing is drawn where the part was disturbed.
                known = case in results[part]
                ratios.append(speed_up(seconds(results[part], case), m, peer) if known else None)
            places = [j + (i - 0.5) * 0.38 for j in range(len(ratios))]
            heights = [r or 0.0 for r in ratios]
            bars = axis.bar(places, heights, 0.36, color=COLOURS[peer], label=f"vs {peer}")
            axis.bar_label(bars, [f"{r:.1f}" if r else "" for r in heights], fontsize=7)
        axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axis.set_title(case, fontsize=9)
        axis.set_xticks(range(len(sources)), [m.replace(", ", ",\n") for m in sources])
    axes[0].legend(frameon=False)


def _plot_growth(growth: Part, figure: Any, usual: float) -> None:
    note = DISTURBED if growth["limit"]["read"] < STEADY * usual else ""
    figure.suptitle(f"How the cost grows (fp32){note}", fontweight="bold")
    titles = {
        "tokens": "tokens, V = 32000",
        "vocabulary": "V, 1024 tokens",
        "share masked": "share masked, 1024 x 32000",
        "threads": "threads, 1024 x 32000",
    }
    for axis, (name, title) in zip(figure.subplots(2, 2).flat, titles.items(), strict=True):
        points = {float(x): times for x, times in growth[name].items()}
        for measure, style in ((FORWARD, "--"), (STEP, "-")):
            for who in ("ours", "eager"):
                y = [Times(times[f"{measure}: {who}"]).median * 1e3 for times in points.values()]
                label = f"{who}, {measure}"
                axis.plot(list(points), y, style, color=COLOURS[who], marker=".", label=label)
        if name in ("tokens", "vocabulary"):
            axis.set_xscale("log", base=2)
            axis.set_xticks(list(points), [f"{x:g}" for x in points])
        elif name == "threads":
            axis.set_xticks(list(points))
        axis.set_yscale("log")
        axis.set_xlabel(title)
        axis.set_ylabel("ms")
        axis.grid(alpha=0.25, which="major")
    figure.axes[0].legend(frameon=False, fontsize=7)


def load() -> Part:
    path = timing.RESULTS / "cpu.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write() -> None:
    """results/cpu.md and cpu.png from cpu.json, and the table in README.md."""
    results = load()
    text = tables(results)
    (timing.RESULTS / "cpu.md").write_text(text)
    if {"main", "huge pages", "growth"} <= results.keys():
        plot(results, timing.RESULTS / "cpu.png")
    readme = timing.HERE / "README.md"
    marked = re.compile(r"(<!-- cpu: begin -->\n).*(<!-- cpu: end -->)", re.DOTALL)
    readme.write_text(marked.sub(lambda m: m[1] + text + m[2], readme.read_text()))


if __name__ == "__main__":
    write()
