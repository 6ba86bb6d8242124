# SPDX-License-Identifier: BSD-3-Clause
"""Two builds of the library on one GPU, in turns: which one is faster, case by case.

    python benchmarks/gpu_ab.py A/_C.so B/_C.so [--rounds 3] [--case '8192 x 32000']

Each turn is a process of its own, `gpu.py --quick --alone`, with a copy of this package around one
of the two libraries.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import timing
from gpu_report import OURS

HERE = Path(__file__).resolve().parent


def package_around(library: Path, folder: Path) -> Path:
    """A folder for PYTHONPATH, in which masked_loss has this library."""
    shutil.copytree(
        HERE.parent / "masked_loss",
        folder / "masked_loss",
        ignore=shutil.ignore_patterns("_C.so", "__pycache__"),
    )
    (folder / "masked_loss" / "_C.so").symlink_to(library.resolve())
    return folder


def turn(package: Path, case: str) -> list[dict[str, Any]]:
    answer = package / "answer.json"
    command = [sys.executable, str(HERE / "gpu.py"), "--quick", "--alone", "--json", str(answer)]
    environment = {**os.environ, "PYTHONPATH": str(package)}
    result = subprocess.run([*command, "--case", case], env=environment)
    if not answer.exists():
        raise SystemExit(f"gpu_ab: gpu.py measured nothing and ended with {result.returncode}")
    measured = json.loads(answer.read_text())
    return [row for row in measured["rows"] + measured["linear"] if row["candidate"] == OURS]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("libraries", type=Path, nargs=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--case", default="")
    arguments = parser.parse_args()
    if missing := [str(path) for path in arguments.libraries if not path.is_file()]:
        parser.error(f"no such library: {', '.join(missing)}")
    times: dict[tuple[Any, ...], list[timing.Times]] = defaultdict(
        lambda: [timing.Times(), timing.Times()]
    )
    keys = ("tokens", "classes", "dtype", "masked", "loss", "pass")
    with tempfile.TemporaryDirectory() as name:
        packages = [
            package_around(library, Path(name) / letter)
            for letter, library in zip("ab", arguments.libraries, strict=True)
        ]
        for _ in range(arguments.rounds):
            for i, package in enumerate(packages):
                for row in turn(package, arguments.case):
                    times[tuple(row.get(k) for k in keys)][i].append(row["seconds"])
    lines = [
        [*map(str, key), *(timing.milliseconds(t.median) for t in (a, b)), f"{b.ratio(a):.3f}"]
        for key, (a, b) in times.items()
    ]
    print(timing.markdown([*keys, "A", "B", "A / B"], lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
