# SPDX-License-Identifier: BSD-3-Clause
"""Checks what the CUDA compiler made of the kernels, without a GPU: `make cuda-check`.

Compiles csrc/kernels/cuda/*.cu for sm_90 and fails where a kernel spills registers or uses more
of them than its blocks leave it, or where a row kernel moves its rows by less than 16 bytes at a
time. The
machine code is read with nvdisasm: from the toolkit, PATH, or the package nvidia-cuda-nvdisasm.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCH = "sm_90"
FLAGS = ["-O3", "-std=c++17", "-fmad=false", "-cubin", f"-arch={ARCH}", "-Xptxas=-v"]
FLAGS += [f"-I{ROOT / 'csrc'}"]

# Registers of a multiprocessor, and the threads that a kernel's team size is planned for
# (csrc/kernels/cuda/cross_entropy.cu): 1024, or 512 in general and for float64.
REGISTERS = 65536


@dataclass
class Kernel:
    name: str
    registers: int
    spilled: int
    sass: str = ""

    @property
    def is_row_kernel(self) -> bool:
        return "rows_kernel" in self.name

    @property
    def is_plain(self) -> bool:
        return "false" in self.name and "double" not in self.name

    @property
    def allowed_registers(self) -> int:
        if not self.is_row_kernel:
            return 64
        return REGISTERS // (1024 if self.is_plain else 512)

    def wide_accesses(self, instruction: str) -> int:
        """LDG or STG instructions that move 16 bytes."""
        return len(re.findall(rf"\b{instruction}\.E(?:\.\w+)*\.128\b", self.sass))

    def loops(self) -> list[list[str]]:
        """The innermost loops: the lines between a label and a jump back to it."""
        lines = self.sass.splitlines()
        labels: dict[str, int] = {}
        found: list[tuple[int, int]] = []
        for i, line in enumerate(lines):
            if label := re.match(r"(\.L_x_\d+):", line):
                labels[label[1]] = i
            elif (jump := re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)) and jump[1] in labels:
                found.append((labels[jump[1]], i))
        return [
            lines[begin:end]
            for begin, end in found
            if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in found)
        ]

    def narrow_loads(self) -> int:
        """Loads of less than 16 bytes in loops over pieces of 16 bytes."""
        loads = [[line for line in loop if re.search(r"\bLDG\b", line)] for loop in self.loops()]
        return sum(
            ".128" not in line for loop in loads if any(".128" in x for x in loop) for line in loop
        )

    def complaints(self) -> list[str]:
        found = []
        if self.spilled:
            found.append(f"spills {self.spilled} bytes")
        if self.registers > self.allowed_registers:
            found.append(f"uses {self.registers} registers, expected <= {self.allowed_registers}")
        if self.is_row_kernel:
            if not self.wide_accesses("LDG"):
                found.append("has no 16-byte load")
            if not self.wide_accesses("STG"):
                found.append("has no 16-byte store")
            if re.search(r"\b(LDL|STL)\b", self.sass):
                found.append("reads or writes local memory")
            if self.is_plain and self.narrow_loads():  # others read class weights there
                found.append(f"has {self.narrow_loads()} narrow loads in loops over whole pieces")
        return found


def nvcc() -> str:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which(f"{home}/bin/nvcc") or shutil.which("nvcc")
    if found is None:
        raise SystemExit("cuda_check: no nvcc in $CUDA_HOME/bin, /usr/local/cuda/bin or PATH")
    return found


def nvdisasm() -> str:
    for name in (str(Path(nvcc()).parent / "nvdisasm"), "nvdisasm"):
        if found := shutil.which(name):
            return found
    try:
        files = importlib.metadata.files("nvidia-cuda-nvdisasm") or []
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit("cuda_check: no nvdisasm; pip install nvidia-cuda-nvdisasm") from None
    return next(str(file.locate()) for file in files if file.name == "nvdisasm")


def demangled(name: str) -> str:
    """rows_kernel<float, false, 16>: as much of a kernel's name as tells it from the others."""
    plain = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout
    plain = re.sub(r"\(anonymous namespace\)::|masked_loss::|cuda::|^void ", "", plain.strip())
    plain = plain.replace("(bool)0", "false").replace("(bool)1", "true")
    return re.sub(r"\((bool|int)\)", "", plain).split("(")[0]


def kernels_of(source: Path, folder: Path, disassembler: str) -> list[Kernel]:
    cubin = folder / f"{source.stem}.cubin"
    command = [nvcc(), *FLAGS, str(source), "-o", str(cubin)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(f"cuda_check: nvcc failed\n{result.stderr}")
    report = re.compile(
        r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        re.DOTALL,
    )
    kernels = {
        name: Kernel(demangled(name), int(registers), int(stores) + int(loads))
        for name, stores, loads, registers in report.findall(result.stderr)
    }
    if kernels:
        text = subprocess.run(
            [disassembler, "-c", str(cubin)], capture_output=True, text=True, check=True
        ).stdout
        functions = re.compile(
            r"^\.text\.(\w+):\n(.*?)(?=^\t\.section|\Z)", re.DOTALL | re.MULTILINE
        )
        for name, sass in functions.findall(text):
            kernels[name].sass = sass
    return list(kernels.values())


def main() -> int:
    disassembler = nvdisasm()
    sources = sorted((ROOT / "csrc" / "kernels" / "cuda").glob("*.cu"))
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        folder = Path(name)
        found = list(pool.map(lambda source: kernels_of(source, folder, disassembler), sources))
    failures = 0
    print(f"{'kernel':44} {'registers':>9} {'spilled':>8} {'LDG.128':>8} {'STG.128':>8}")
    for kernel in sorted((k for ks in found for k in ks), key=lambda k: k.name):
        loads, stores = kernel.wide_accesses("LDG"), kernel.wide_accesses("STG")
        print(f"{kernel.name[:44]:44} {kernel.registers:9} {kernel.spilled:8} {loads:8} {stores:8}")
        for complaint in kernel.complaints():
            failures += 1
            print(f"  FAILED: {complaint}")
    print(f"cuda_check: {'failed' if failures else 'passed'} for {ARCH}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
