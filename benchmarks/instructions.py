# SPDX-License-Identifier: BSD-3-Clause
"""Instructions of the CPU kernels: ``python benchmarks/instructions.py``.

Times differ from run to run, instruction counts do not. kernels.cpp is run under valgrind's
callgrind with few rows and with more; the difference belongs to the kernel. Valgrind knows no
AVX-512, so these are the counts of the AVX2 and of the portable kernels.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import timing

ROOT = timing.HERE.parent
COLS = 16000
FEW, MORE = 1, 3
PER_LOGIT = ("forward", "step", "backward", "masked")
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl")
PER_TOKEN = ("weigh", "reduce")
LENGTHS = (0, 1, 10, 1000, 100_000)  # of packed sequences; 0: the tokens are in no sequences
TYPES = {"avx2": ("fp32", "bf16", "fp16", "fp64"), "default": ("fp32", "bf16", "fp16", "fp64")}


def tools() -> list[str]:
    """What this needs and the machine lacks."""
    return [name for name in ("valgrind", "cmake") if shutil.which(name) is None]


def build() -> Path:
    folder = ROOT / "build" / "benchmarks"
    options = ["-DMASKED_LOSS_LIBRARY=OFF", "-DMASKED_LOSS_BENCHMARKS=ON"]
    for command in (["-S", ROOT, "-B", folder, *options], ["--build", folder, "-j2"]):
        subprocess.run(["cmake", *command], check=True, stdout=subprocess.DEVNULL)
    return folder / "kernels"


@cache
def instructions(
    driver: Path, isa: str, kernel: str, dtype: str, rows: int, cols: int, length: int = 0
) -> int:
    """All that one run executes."""
    sizes = [str(rows), str(cols), str(length)]
    with TemporaryDirectory() as folder:
        output = f"--callgrind-out-file={folder}/callgrind.out"
        result = subprocess.run(
            ["valgrind", "--tool=callgrind", output, driver, kernel, dtype, *sizes],
            env={"ATEN_CPU_CAPABILITY": isa},
            check=True,
            text=True,
            capture_output=True,
        )
    if result.stdout.strip() != isa:
        raise RuntimeError(f"asked for {isa} kernels, got {result.stdout.strip()}")
    found = re.search(r"Collected : (\d+)", result.stderr)
    if found is None:
        raise RuntimeError(f"no count in what callgrind wrote:\n{result.stderr}")
    return int(found[1])


def count(driver: Path, isa: str, kernel: str, dtype: str) -> float:
    """Instructions for each logit, or for each token. Making up the inputs is not among them."""
    per_token = kernel in PER_TOKEN
    few, more, cols = (1024, 5120, 1) if per_token else (FEW, MORE, COLS)

    few_rows, more_rows = (
        instructions(driver, isa, kernel, dtype, rows, cols)
        - instructions(driver, isa, "nothing", dtype, rows, cols)
        for rows in (few, more)
    )
    return (more_rows - few_rows) / ((more - few) * cols)


def packed(driver: Path, kernel: str, length: int, tokens: int = 200_000) -> float:
    """Instructions for each token of packed sequences, each of which has a mean."""
    ours, nothing = (
        instructions(driver, "avx2", k, "fp32", tokens, 1, length) for k in (kernel, "nothing")
    )
    return (ours - nothing) / tokens


def main() -> None:
    if missing := tools():
        sys.exit(f"instructions.py: not found: {', '.join(missing)}")
    driver = build()
    counts = {
        isa: {
            dtype: {kernel: count(driver, isa, kernel, dtype) for kernel in PER_LOGIT + PER_TOKEN}
            for dtype in types
        }
        for isa, types in TYPES.items()
    }
    divergences = {
        dtype: {kind: count(driver, "avx2", kind, dtype) for kind in DIVERGENCES}
        for dtype in ("fp32", "bf16")
    }
    timing.save("instructions", {**counts, "divergences": divergences})
    print(table(counts))
    print()
    steps = ([dtype, *(f"{n:.1f}" for n in of.values())] for dtype, of in divergences.items())
    print(timing.markdown(("value and gradient, per logit of the student", *DIVERGENCES), steps))
    print()
    sequences = [[f"{packed(driver, k, n):.0f}" for k in PER_TOKEN] for n in LENGTHS]
    names = ["none", *(f"{n:,}" for n in LENGTHS[1:])]
    rows = ([name, *found] for name, found in zip(names, sequences, strict=True))
    print(timing.markdown(("tokens of a packed sequence", *PER_TOKEN), rows))


def table(counts: dict[str, dict[str, dict[str, float]]]) -> str:
    header = ("instructions per logit", *PER_LOGIT, *(f"{k}, per token" for k in PER_TOKEN))
    return timing.markdown(
        header,
        (
            [f"{isa} {dtype}", *(f"{found[kernel]:.2f}" for kernel in PER_LOGIT + PER_TOKEN)]
            for isa, by_type in counts.items()
            for dtype, found in by_type.items()
        ),
    )


if __name__ == "__main__":
    main()
