# SPDX-License-Identifier: BSD-3-Clause
"""Predicts the row kernels' speed from their machine code, without a GPU: a table.

    python tools/cuda_model.py --write             # the table of docs/cuda.md, a few minutes
    python tools/cuda_model.py --rows 8192 --classes 32000 --dtype bfloat16

For each shape the host code itself says what it would launch (the emulator records it), the machine
code of that kernel says what each warp issues (cuda_trace.py), and cuda_model.cpp replays that on a
few multiprocessors that share their part of the memory. One launch of the row kernel is looked at,
not the call around it. Beside it stands what GPUs took, if benchmarks/results/gpu*.json say it.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sass
import torch
from cuda_trace import Step, Warp
from sass_lane import Launch

ROOT = sass.ROOT
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "kernels"), str(ROOT / "benchmarks")]

import gpu_report  # noqa: E402

ARCH = "sm_90"
ROW_KERNELS = ("rows_kernel", "forward_kernel")
REGISTERS, WARPS, SHARED = 65536, 64, 228 << 10  # of a multiprocessor
CLOCK, MULTIPROCESSORS = 1.98e9, 132


# Fitted to an H100 (docs/cuda.md): the share of its memory's peak that reading reaches, and reading
# and writing in turns; the bytes in rows that are being read of which the L2 loses none until they
# are read again; seconds of a launch beside its steady state.
READING, IN_TURNS = 0.91, 0.843
L2_HOLDS = 34e6
BEGIN_AND_END = 3e-6


@dataclass(frozen=True)
class Gpu:
    name: str
    peak: float  # bytes a second, of its data sheet

    def bytes_a_clock(self, fused: bool) -> float:
        """That its memory moves for each multiprocessor."""
        return self.peak * (IN_TURNS if fused else READING) / MULTIPROCESSORS / CLOCK


GPUS = [Gpu("H100", 3.35e12), Gpu("H200", 4.8e12)]
SHAPES = [(32768, 256), (32768, 4096), (8192, 6400), (8192, 32000), (8192, 50257)]
SHAPES += [(8192, 128256), (16384, 131072)]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SIMULATED = 4  # multiprocessors


# What is launched


@functools.cache
def emulator() -> Any:
    from cuda_emulator.build import build
    from cuda_emulator.operators import load

    return load(build())


@functools.cache
def names() -> dict[int, str]:
    """The kernels of the emulator's file by where they begin in it."""
    table = subprocess.run(["nm", emulator().__file__], capture_output=True, text=True, check=True)
    lines = [line.split() for line in table.stdout.splitlines()]
    found = [line for line in lines if len(line) == 3 and line[1] in "tTwW"]
    plain = sass.demangled(line[2] for line in found)
    return {int(line[0], 16): name for line, name in zip(found, plain, strict=True)}


@dataclass(frozen=True)
class Problem:
    rows: int
    classes: int
    dtype: str
    fused: bool  # the gradient too

    @property
    def bytes(self) -> int:
        size = 4 if self.dtype == "float32" else 2
        return self.rows * self.classes * size * (2 if self.fused else 1)


def launches(problem: Problem) -> tuple[list[Launch], range]:
    """Every launch of a masked mean, and where its logits lie. Memory is asked for, not touched."""
    from cuda_emulator.operators import emulated

    from masked_loss import masked_cross_entropy

    settings = emulator().Settings()
    settings.record, settings.multiprocessors = True, MULTIPROCESSORS
    emulator().configure(settings)
    emulator().recorded()
    logits = torch.empty(problem.rows, problem.classes, dtype=DTYPES[problem.dtype])
    target = torch.empty(problem.rows, dtype=torch.int64)
    with emulated():
        masked_cross_entropy(logits.requires_grad_(problem.fused), target)
    emulator().configure(emulator().Settings())
    found = [Launch(names()[at], *rest) for at, *rest in emulator().recorded()]
    return found, range(logits.data_ptr(), logits.data_ptr() + logits.nbytes)


def rows_launch(problem: Problem) -> tuple[Launch, range]:
    """The row kernel's, and where the logits lie."""
    found, logits = launches(problem)
    rows = [launch for launch in found if launch.kernel.startswith(ROW_KERNELS)]
    if len(rows) != 1:
        raise SystemExit(f"cuda_model: {problem} takes {len(rows)} launches of the row kernel")
    return rows[0], logits


# What its warps issue


def lost(in_flight: float) -> float:
    """The share of what is read a second time that the L2 has let go, in rows of so many bytes."""
    return max(0.0, 1 - (L2_HOLDS / in_flight) ** 2)


def unit_and_level(step: Step, logits: range, seen: set[int], lost: float) -> tuple[str, str, int]:
    """The unit that a step keeps busy, where its memory is, and how many bytes a warp moves."""
    i = step.instruction
    if not step.taken:
        return "none", "nowhere", 0
    parts = i.opcode.split(".")
    if i.base in ("LDG", "STG"):
        wide = "128" in parts
        size = 512 if wide else 32
        line = (step.address or 0) // 128
        ours = step.address is not None and step.address in logits
        first = line not in seen
        if wide and not first:  # lines that are lost lie among the others as if by chance
            first = line * 2654435761 % 2**16 < lost * 2**16
        if wide or not ours:  # a target's logit brings no more than its own 32 bytes
            seen.add(line)
        if i.base == "STG":
            return "store", "dram" if wide else "l2", size
        return "load", "dram" if ours and first else "l1" if not first and not ours else "l2", size
    if i.base in ("LDS", "STS"):
        size = 512 if "128" in parts else 128
        return "load" if i.base == "LDS" else "store", "shared", size
    if i.base in ("FADD", "FMUL", "FFMA", "HADD2", "HFMA2", "HMUL2") or "MOV" in parts:
        return "fma" if i.base != "MOV" else "alu", "nowhere", 0
    units = {"IMAD": "heavy", "MUFU": "mufu", "BAR": "barrier", "SHFL": "shuffle"}
    units |= dict.fromkeys(["F2F", "I2F", "F2I", "FCHK", "FRND"], "mufu")
    units |= dict.fromkeys(["DADD", "DMUL", "DFMA", "DSETP"], "fp64")
    units |= dict.fromkeys(["S2R", "S2UR", "LDC"], "special")
    branches = ("BRA", "BSSY", "BSYNC", "EXIT", "CALL", "RET", "WARPSYNC", "NOP", "BREAK")
    if i.base in branches or i.base[0] == "U" or i.base == "R2UR":
        return "none", "nowhere", 0
    return units.get(i.base, "alu"), "nowhere", 0


UNITS = ["none", "alu", "fma", "heavy", "mufu", "fp64", "load", "store", "barrier", "shuffle"]
UNITS += ["special"]
LEVELS = ["nowhere", "shared", "l1", "l2", "dram"]


def made_up(address: int, size: int) -> int:
    """What loads find: a weight or a gradient of 1, a logit of 0, the target 0."""
    return {16: 0, 8: 0, 4: 0x3F800000, 2: 0, 1: 1}[size]


def warps_of(kernel: sass.Kernel, launch: Launch) -> list[list[Step]]:
    shared: dict[int, int | None] = {}
    return [
        Warp(kernel, launch, warp, 0, made_up, shared).run() for warp in range(launch.block // 32)
    ]


def trace_text(steps: list[Step], logits: range, seen: set[int], lost: float) -> str:
    lines = ["T"]
    for step in steps:
        unit, level, size = unit_and_level(step, logits, seen, lost)
        i = step.instruction
        sets, reads = (i.sets, i.reads) if step.taken else (-1, -1)
        numbers = i.stall, i.waits, sets, reads, UNITS.index(unit), LEVELS.index(level), size
        lines.append(" ".join(map(str, numbers)))
    return "\n".join(lines)


def resident(kernel: sass.Kernel, launch: Launch) -> int:
    """Blocks that a multiprocessor holds at a time."""
    warps = launch.block // 32
    registers = -(-kernel.registers // 8) * 8 * 32  # of a warp, as they are given out
    shared = -(-(launch.shared + kernel.shared + 1024) // 128) * 128
    return min(WARPS // warps, 32, REGISTERS // registers // warps, SHARED // shared)


# How long it takes


@functools.cache
def simulator() -> Path:
    source = Path(__file__).with_suffix(".cpp")
    program = ROOT / "build" / "cuda_model"
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        program.parent.mkdir(exist_ok=True)
        command = ["c++", "-O2", "-std=c++17", str(source), "-o", str(program)]
        subprocess.run(command, check=True)
    return program


@functools.cache
def code() -> dict[str, sass.Kernel]:
    return {kernel.name: kernel for kernel in sass.kernels(ARCH)}


@dataclass(frozen=True)
class Prediction:
    kernel: str
    issued: int  # instructions of a block
    seconds: dict[str, float]  # of the row kernel, by GPU
    slots: dict[str, float]  # share of the issue slots that were used


def predict(problem: Problem, launch: Launch, logits: range) -> Prediction:
    kernel = code()[launch.kernel]
    seen: set[int] = set()
    warps = warps_of(kernel, launch)
    blocks = resident(kernel, launch)
    share = lost(len(logits) / launch.grid * blocks * MULTIPROCESSORS)
    text = "\n".join(trace_text(steps, logits, seen, share) for steps in warps)
    seconds, slots = {}, {}
    for gpu in GPUS:
        lines = [f"P bytes {gpu.bytes_a_clock(problem.fused)}", text]
        lines += [f"P multiprocessors {SIMULATED}", "B " + " ".join(map(str, range(len(warps))))]
        lines += [f"R {blocks * SIMULATED * 8} {blocks}", ""]
        result = subprocess.run(
            [str(simulator())], input="\n".join(lines), capture_output=True, text=True, check=True
        )
        clocks, slots[gpu.name] = map(float, result.stdout.split())
        # The last wave is left out, as if there were many.
        steady = clocks * launch.grid / MULTIPROCESSORS / CLOCK
        seconds[gpu.name] = steady + BEGIN_AND_END
    return Prediction(launch.kernel, sum(map(len, warps)), seconds, slots)


# Beside what was measured


Results = dict[str, Any]  # of one run of benchmarks/gpu.py


@functools.cache
def results() -> list[Results]:
    folder = ROOT / "benchmarks" / "results"
    return [json.loads(path.read_text()) for path in sorted(folder.glob("gpu*.json"))]


def of_gpu(gpu: Gpu) -> Results | None:
    return next((run for run in results() if gpu.name in run["environment"]["gpu"]), None)


def measured(run: Results, problem: Problem) -> float | None:
    """Seconds of the row kernel alone; None where they are not known."""
    what = "step" if problem.fused else "forward"
    wanted = problem.rows, problem.classes, problem.dtype, what, "mean", 0.0, "ours"
    keys = ("tokens", "classes", "dtype", "pass", "loss", "masked", "candidate")
    rows = [row for row in run["rows"] if tuple(row[k] for k in keys) == wanted]
    return gpu_report.row_kernel(rows[0]) if rows else None


def table(found: dict[Problem, Prediction]) -> str:
    runs = {gpu: run for gpu in GPUS if (run := of_gpu(gpu))}
    lines = []
    for problem, prediction in found.items():
        rates = {gpu: problem.bytes / prediction.seconds[gpu.name] for gpu in GPUS}
        line = [f"{problem.rows} x {problem.classes} {problem.dtype}"]
        line += ["fused" if problem.fused else "forward"]
        line += [f"{rate / 1e12:.2f} ({rate / gpu.peak:.0%})" for gpu, rate in rates.items()]
        for gpu, run in runs.items():
            seconds = measured(run, problem)
            rate = problem.bytes / seconds if seconds else 0
            line += [f"{rate / 1e12:.2f} ({rate / gpu.peak:.0%})"] if rate else ["-"]
            line += [f"{rates[gpu] / rate - 1:+.0%}"] if rate else ["-"]
        lines.append(line)
    header = ["logits", "row kernel", *(f"{gpu.name}, predicted" for gpu in GPUS)]
    for gpu in runs:
        header += [f"{gpu.name}, measured", "prediction off by"]
    text = "TB/s of the row kernel, and the share of the peak"
    ran = [run["environment"] for run in runs.values()]
    said = [f"an {e['gpu']} on {e['date']}, `{e['command']}`" for e in ran]
    text += f"; measured on {', and on '.join(said)}" if said else ""
    return f"{text}:\n\n{gpu_report.markdown(header, lines)}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int)
    parser.add_argument("--classes", type=int)
    parser.add_argument("--dtype", choices=DTYPES, action="append")
    parser.add_argument("--write", action="store_true", help="put the table into docs/cuda.md")
    arguments = parser.parse_args()
    if sass.nvcc() is None:
        print("cuda_model: predicted nothing: no nvcc in $CUDA_HOME, /usr/local/cuda or PATH")
        return 0
    shapes = SHAPES
    if arguments.classes:
        shapes = [(arguments.rows or 8192, arguments.classes)]
    dtypes = arguments.dtype or ["bfloat16", "float32"]
    cases = [
        Problem(rows, classes, dtype, fused)
        for (rows, classes), dtype, fused in itertools.product(shapes, dtypes, (False, True))
    ]
    code(), simulator()
    launched = [rows_launch(problem) for problem in cases]
    with ThreadPoolExecutor(2) as pool:
        predicted = pool.map(
            lambda case: predict(case[0], *case[1]), zip(cases, launched, strict=True)
        )
        found = dict(zip(cases, predicted, strict=True))
    print(table(found))
    if arguments.write:
        gpu_report.replace_between_marks(ROOT / "docs" / "cuda.md", table(found), "model")
    if len(shapes) == 1:
        for problem, p in found.items():
            slots = ", ".join(f"{name} {share:.0%}" for name, share in p.slots.items())
            what = "fused" if problem.fused else "forward"
            print(f"{what}: {p.kernel}, {p.issued} instructions a block; issue slots: {slots}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
