# SPDX-License-Identifier: BSD-3-Clause
"""Checks what the CUDA compiler made of the kernels, without a GPU: `make cuda-check`.

Compiles csrc/kernels/cuda/*.cu for the architectures of --arch, by default for every one that a
release serves; `make cuda-check` asks for sm_90 alone, and with CUDA_CHECK= for all. Fails where a
kernel uses more registers than its blocks leave it, where a plain row kernel spills some, or moves
its rows by less than 16 bytes at a time; and where what was counted is not what cuda_budget.json
says. For the plain row kernels of every architecture that is registers, instructions, and of what
each loop over a row is made; for sm_90 also what a row takes of a warp, in its loops and around
them. The budget holds for one version of nvcc: another one gets the rest of the checks, and a note.
After a change that is meant, here for one architecture:

    python tools/cuda_check.py --update --arch sm_90
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import cuda_model
import sass
from sass import Instruction, Kernel

BUDGET = Path(__file__).with_name("cuda_budget.json")

REGISTERS = 65536  # of a multiprocessor
TOKEN_KERNELS = ("weigh", "count_groups", "write_", "reduce_")

# Rows whose instructions are counted: every team of warps, forward and fused.
ROWS = [
    cuda_model.Problem(8192, classes, dtype, fused)
    for dtype in ("bfloat16", "float32")
    for classes in (1024, 6400, 16384, 32000, 65536)
    for fused in (False, True)
]


def is_row_kernel(kernel: Kernel) -> bool:
    return kernel.name.startswith(cuda_model.ROW_KERNELS)


def writes_gradients(kernel: Kernel) -> bool:
    return kernel.name.startswith("rows_kernel")


def is_plain(kernel: Kernel) -> bool:
    plain = ", false," in kernel.name or not writes_gradients(kernel)
    return is_row_kernel(kernel) and plain and "double" not in kernel.name


def planned_threads(kernel: Kernel) -> int:
    """On a multiprocessor, as csrc/kernels/cuda/rows.inl.cuh has it."""
    values = kernel.name.startswith("values_kernel")
    if "double" in kernel.name:
        return 512
    if values and "LogProbs" not in kernel.name:
        return 768
    if not values and not is_plain(kernel):
        return 512
    return {"sm_75": 640, "sm_120": 896}.get(kernel.arch, 1024)


def allowed_registers(kernel: Kernel) -> int:
    if kernel.name.startswith(("shard_kernel", "merge_kernel", *TOKEN_KERNELS)):
        return REGISTERS // 512
    values = kernel.name.startswith("values_kernel")
    if not is_row_kernel(kernel) and not values:
        return 64
    if kernel.name.startswith("forward_kernel") and not kernel.name.endswith(" 16>"):
        most = 1024 if kernel.arch == "sm_75" else 1280  # more than 1024 Turing does not hold
        return REGISTERS // most // 8 * 8
    most = planned_threads(kernel)  # in whole blocks
    warps = int(kernel.name.removesuffix(">").rsplit(" ", 1)[1])
    block = 32 * (4 if warps == 1 else warps)
    return REGISTERS // (most // block * block) // 8 * 8


def wide(code: list[Instruction], base: str) -> int:
    """Loads or stores of 16 bytes."""
    return sum(i.moves(base, "128") for i in code)


def accesses_of_local_memory(code: list[Instruction]) -> int:
    return sum(i.base in ("LDL", "STL") for i in code)


def narrow_loads(kernel: Kernel) -> int:
    """Loads of less than 16 bytes in loops over pieces of 16 bytes."""
    loops = [[i for i in loop if i.base == "LDG"] for loop in kernel.loops()]
    return sum(not i.moves("LDG", "128") for loop in loops if wide(loop, "LDG") for i in loop)


def complaints(kernel: Kernel) -> list[str]:
    found = []
    if kernel.registers > (most := allowed_registers(kernel)):
        found.append(f"uses {kernel.registers} registers, expected <= {most}")
    if kernel.name.startswith(TOKEN_KERNELS) and kernel.spilled:
        found.append(f"spills {kernel.spilled} bytes of registers")
    if is_row_kernel(kernel):
        if not wide(kernel.code, "LDG"):
            found.append("has no 16-byte load")
        if writes_gradients(kernel) and not wide(kernel.code, "STG"):
            found.append("has no 16-byte store")
        if kernel.spilled and is_plain(kernel):
            found.append(f"spills {kernel.spilled} bytes of registers")
        if not kernel.spilled and (local := accesses_of_local_memory(kernel.code)):
            found.append(f"has {local} accesses of local memory")
        if is_plain(kernel) and (narrow := narrow_loads(kernel)):  # others read class weights there
            found.append(f"has {narrow} narrow loads in loops over whole pieces")
    return found


# The budget


def loop_counts(kernel: Kernel) -> list[str]:
    """The loops over a row: what an iteration costs a warp."""
    found = []
    for loop in kernel.loops():
        units = {"MUFU": sum(i.base == "MUFU" for i in loop)}
        units |= {f"{base}.128": wide(loop, base) for base in ("LDG", "STG")}
        if units["LDG.128"] or units["STG.128"]:
            made_of = ", ".join(f"{count} {unit}" for unit, count in units.items() if count)
            found.append(f"{len(loop)} ({made_of})")
    return found


def line_of(kernel: Kernel) -> str:
    loops = "; ".join(loop_counts(kernel))
    return f"{kernel.registers} registers, {len(kernel.code)} instructions; loops: {loops}"


def row_counts(problem: cuda_model.Problem, kernels: dict[str, Kernel]) -> dict[str, Any]:
    """What a row takes of the block's first warp and of its last: in its loops, and around them."""
    launch, _ = cuda_model.rows_launch(problem)
    kernel = kernels[launch.kernel]
    looping = {id(i) for loop in kernel.loops() if wide(loop, "LDG") for i in loop}
    warps = cuda_model.warps_of(kernel, launch)
    counts: dict[str, Any] = {"kernel": launch.kernel, "registers": kernel.registers}
    for name, steps in (("first warp", warps[0]), ("last warp", warps[-1])):
        inside = sum(id(step.instruction) in looping for step in steps)
        counts[name] = {"in loops": inside, "around them": len(steps) - inside}
    return counts


def counted(kernels: list[Kernel]) -> dict[str, Any]:
    """The plain row kernels of each architecture, and on one what a row takes."""
    found: dict[str, Any] = {"nvcc": sass.nvcc_version()}
    lines: dict[str, dict[str, str]] = {kernel.arch: {} for kernel in kernels}
    for kernel in kernels:
        if is_plain(kernel):
            lines[kernel.arch][kernel.name] = line_of(kernel)
    found["kernels"] = lines
    if cuda_model.ARCH in lines:
        by_name = {kernel.name: kernel for kernel in kernels if kernel.arch == cuda_model.ARCH}
        found[f"rows on {cuda_model.ARCH}"] = {
            f"{p.classes} {p.dtype} {'fused' if p.fused else 'forward'}": row_counts(p, by_name)
            for p in ROWS
        }
    return found


def differences(budget: Any, found: Any, where: str = "") -> list[str]:
    if isinstance(budget, dict) and isinstance(found, dict):
        return [
            line
            for key in dict.fromkeys([*budget, *found])
            for line in differences(budget.get(key), found.get(key), f"{where}{key}: ")
        ]
    return [] if budget == found else [f"{where}{found}, in the budget {budget}"]


def release_archs() -> list[str]:
    """As setup.py has them; importing it would build."""
    text = (sass.ROOT / "setup.py").read_text()
    line = next(line for line in text.splitlines() if line.startswith("RELEASE_ARCHS"))
    numbers = line.split('"')[1].replace("+PTX", "").split()
    return ["sm_" + number.replace(".", "") for number in numbers]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write what is counted as the budget")
    parser.add_argument("--arch", action="append", help="only these, such as sm_90")
    arguments = parser.parse_args()
    if sass.nvcc() is None:
        print("cuda_check: checked nothing: no nvcc in $CUDA_HOME, /usr/local/cuda or PATH")
        return 0
    archs = arguments.arch or release_archs()
    kernels = sass.kernels(*archs)
    failures = 0
    print(
        f"{'kernel':40} {'architecture':>12} {'registers':>9} {'spilled':>8} {'instructions':>12}"
    )
    for kernel in kernels:
        found = complaints(kernel)
        if found or kernel.arch == cuda_model.ARCH:
            print(
                f"{kernel.name[:40]:40} {kernel.arch:>12} {kernel.registers:12} "
                f"{kernel.spilled:12} {len(kernel.code):12}"
            )
        for complaint in found:
            failures += 1
            print(f"  FAILED: {complaint}")
    now = counted(kernels)
    budget = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    same_nvcc = budget.get("nvcc") == now["nvcc"]
    if arguments.update:
        kept = {**budget["kernels"], **now["kernels"]} if same_nvcc else now["kernels"]
        in_order = {arch: kept[arch] for arch in release_archs() if arch in kept}
        text = json.dumps({**budget, **now, "kernels": in_order}, indent=1)
        BUDGET.write_text(text + "\n")
        print(f"cuda_check: {BUDGET.name} written")
    elif not same_nvcc:
        print(
            f"cuda_check: the budget is nvcc {budget.get('nvcc')}'s, here is {now['nvcc']}: "
            "instructions not compared"
        )
    else:
        asked = {key: budget.get(key) for key in now}
        asked["kernels"] = {arch: budget["kernels"].get(arch) for arch in archs}
        for line in differences(asked, now):
            failures += 1
            print(f"  FAILED: {line}")
    print(f"cuda_check: {'failed' if failures else 'passed'} for {', '.join(archs)}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
