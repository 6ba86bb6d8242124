# SPDX-License-Identifier: BSD-3-Clause
"""From results/gpu.json to its tables and its plot: ``python benchmarks/gpu_report.py``.

They go to results/gpu.md and gpu.png, and between the marks in README.md, where it says how to read
them; a few lines of them go to the README of the project, in English and in Chinese.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timing
from timing import markdown, milliseconds

OURS, PRODUCTS = "ours", "three products"
ROW_KERNELS = r"(rows|forward|values|divergence)\w*_kernel"

Row = Mapping[str, Any]
Rows = Sequence[Row]


def row_kernel(row: Row) -> float | None:
    """Device seconds of the kernels that work on rows of logits; None if they were not told."""
    return sum(t for name, t in row["kernels"].items() if re.search(ROW_KERNELS, name)) or None


def share(limits: Mapping[str, float], row: Row, seconds: float | None) -> float | None:
    """Of the speed that the GPU reads and copies with."""
    limit = row["bytes read"] / limits["read"] + row["bytes copied"] / limits["copy"]
    return limit / seconds if seconds else None


def percent(part: float | None) -> str:
    return "-" if part is None else f"{part:.0%}"


def peers(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["candidate"] for row in rows if row["candidate"] != OURS))


class Times:
    """Seconds by everything that a row is of."""

    keys = ("tokens", "classes", "dtype", "masked", "loss", "pass")

    def __init__(self, rows: Rows) -> None:
        self.known = {self.key(row, row["candidate"]): row["seconds"] for row in rows}

    def key(self, row: Row, candidate: str, masked: float | None = None) -> tuple[Any, ...]:
        own = {**row, "masked": row["masked"] if masked is None else masked}
        return (*(own[k] for k in self.keys), candidate)

    def over(self, row: Row, candidate: str) -> str:
        """How many times as long as ours the candidate takes."""
        other = self.known.get(self.key(row, candidate))
        return f"{other / row['seconds']:.2f}" if other else "-"

    def of_unmasked(self, row: Row) -> str:
        other = self.known.get(self.key(row, OURS, 0.0))
        return f"{row['seconds'] / other:.2f}" if other else "-"


def case_table(
    rows: Rows, wanted: Callable[[Row], bool], times: Times, limits: Mapping[str, float]
) -> str:
    chosen = [row for row in rows if wanted(row)]
    ours = [row for row in chosen if row["candidate"] == OURS]
    names = peers(chosen)
    masked = any(row["masked"] for row in ours)
    several = len({row["loss"] for row in ours}) > 1
    lines = []
    for row in ours:
        kernel = row_kernel(row)
        line = [f"{row['tokens']} x {row['classes']} {row['dtype']}"]
        line += [row["loss"]] if several else []
        line += [
            row["pass"],
            milliseconds(row["seconds"]),
            percent(share(limits, row, row["seconds"])),
        ]
        line += [milliseconds(kernel) if kernel else "-", percent(share(limits, row, kernel))]
        line += [milliseconds(row["host seconds"])]
        line += [times.of_unmasked(row)] if masked else []
        lines.append([*line, *(times.over(row, name) for name in names)])
    header = ["logits", *(["loss"] if several else []), "pass", "ours", "of limit", "row kernel"]
    header += ["of limit", "host", *(["of unmasked"] if masked else [])]
    return markdown([*header, *(f"{name} / ours" for name in names)], lines)


def linear_table(rows: Rows) -> str:
    floor = next((row["seconds"] for row in rows if row["candidate"] == PRODUCTS), None)
    lines = [
        [
            row["candidate"],
            milliseconds(row["seconds"]),
            f"{row['seconds'] / floor:.2f}" if floor else "-",
            f"{row['peak'] / 2**20:.0f}",
        ]
        for row in rows
    ]
    return markdown(["candidate", "step", "of the products", "peak, MiB"], lines)


def tables(results: Mapping[str, Any]) -> str:
    """Everything that ``results`` has, as Markdown."""
    e, rows, linear = results["environment"], results["rows"], results["linear"]
    failed = len(e["failed checks"])
    checks = "Every check passed" if not failed else f"**{failed} checks failed**"
    facts = f"{e['gpu']}, driver {e['driver']}, PyTorch {e['torch']} with CUDA {e['cuda']}, Python "
    facts += f"{e['python']}; `{e['command']}` on {e['date']}. {checks} before anything was timed."
    facts += " It reads 2 GiB with {read:.2f} TB/s and copies them with {copy:.2f}.".format(
        **{what: rate / 1e12 for what, rate in e["limits"].items()}
    )
    blocks = [facts]
    times = Times(rows)
    parts: dict[str, Callable[[Row], bool]] = {
        "The mean": lambda row: row["loss"] == "mean" and not row["masked"],
        "Half of the tokens masked": lambda row: row["loss"] == "mean" and bool(row["masked"]),
        "Other losses and options": lambda row: row["loss"] != "mean",
    }
    for title, wanted in parts.items():
        if any(map(wanted, rows)):
            blocks.append(f"### {title}\n\n{case_table(rows, wanted, times, e['limits'])}")
    if linear:
        shape = "{tokens} tokens, hidden size {size}, {classes} classes, {dtype}".format(
            **linear[0]
        )
        blocks.append(f"### From hidden states\n\n{shape}.\n\n{linear_table(linear)}")
    if results["left out"]:
        lines = "\n".join(f"- {line.splitlines()[0]}" for line in results["left out"])
        blocks.append(f"### Left out\n\n{lines}")
    return "\n\n".join(blocks) + "\n"


WORDS = {"forward": "前向", "step": "前向加反向", "forward and backward": "前向加反向"}


def headline(results: Mapping[str, Any], chinese: bool = False) -> str:
    """How often ours is faster at 8192 tokens in bfloat16, in a few lines."""
    shown = [
        row
        for row in results["rows"]
        if (row["tokens"], row["dtype"], row["masked"], row["loss"])
        == (8192, "bfloat16", 0, "mean")
    ]
    times, names, limits = Times(shown), peers(shown), results["environment"]["limits"]
    lines = []
    for row in sorted(shown, key=lambda row: row["classes"]):
        if row["candidate"] == OURS:
            what = row["pass"].replace("step", "forward and backward")
            lines.append([f"8192 × {row['classes']}", WORDS[what] if chinese else what])
            lines[-1] += [
                percent(share(limits, row, row["seconds"])),
                *(times.over(row, name) for name in names),
            ]
    e = results["environment"]
    if chinese:
        of_limit, versus = "达到读取或拷贝速度的", "对比 "
        text = f"{e['gpu']}，PyTorch {e['torch']}，bfloat16，测于 {e['date']}："
    else:
        of_limit, versus = "of the speed of reading or copying", "vs "
        text = f"{e['gpu']}, PyTorch {e['torch']}, bfloat16, {e['date']}:"
    header = ["logits", "", of_limit, *(versus + name for name in names)]
    return f"{text}\n\n{markdown(header, lines)}\n"


def plot(results: Mapping[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows, e = results["rows"], results["environment"]
    limits = e["limits"]
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for axis, what in zip(axes, ("forward", "step"), strict=True):
        wanted = (what, "bfloat16", 0.0, "mean", 8192)
        keys = ("pass", "dtype", "masked", "loss", "tokens")
        shown = [row for row in rows if tuple(row[k] for k in keys) == wanted]
        shown.sort(key=lambda row: row["classes"])
        for name in dict.fromkeys(row["candidate"] for row in shown):
            found = [row for row in shown if row["candidate"] == name]
            points = [(row["classes"], share(limits, row, row["seconds"])) for row in found]
            axis.plot(*zip(*points, strict=True), marker="o", label=name)
        kernels = [(row, row_kernel(row)) for row in shown if row["candidate"] == OURS]
        alone = [(row["classes"], share(limits, row, taken)) for row, taken in kernels if taken]
        if alone:
            axis.plot(*zip(*alone, strict=True), marker=".", ls=":", label="our row kernel alone")
        axis.axhline(1, color="gray", linewidth=0.8)
        axis.set(xscale="log", xlabel="classes", ylim=(0, 1.15))
        axis.set_ylabel(f"share of the {'reading' if what == 'forward' else 'copying'} speed")
        axis.set_title(f"{what}, bfloat16, 8192 tokens")
        if shown:
            axis.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{e['gpu']}, PyTorch {e['torch']}, {e['date']}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def replace_between_marks(path: Path, text: str, mark: str = "gpu") -> None:
    """Between <!-- gpu: begin --> and <!-- gpu: end -->."""
    begin, end = f"<!-- {mark}: begin -->\n", f"<!-- {mark}: end -->"
    marked = re.compile(f"({begin}).*?({end})", re.DOTALL)
    old = path.read_text()
    if not marked.search(old):
        raise ValueError(f"{path} has no marks {begin.strip()} and {end}")
    path.write_text(marked.sub(lambda m: m[1] + text + m[2], old))


def write() -> None:
    """results/gpu.md and gpu.png from gpu.json, and what the READMEs show of them."""
    results = json.loads((timing.RESULTS / "gpu.json").read_text())
    text, project = tables(results), timing.HERE.parent
    (timing.RESULTS / "gpu.md").write_text(text)
    replace_between_marks(timing.HERE / "README.md", text)
    replace_between_marks(project / "README.md", headline(results))
    replace_between_marks(project / "README.zh-CN.md", headline(results, chinese=True))
    plot(results, timing.RESULTS / "gpu.png")


if __name__ == "__main__":
    write()
