# SPDX-License-Identifier: BSD-3-Clause
"""The machine code of the CUDA kernels: compiled for an architecture, disassembled, decoded.

``kernels("sm_90")`` gives every kernel of csrc/kernels/cuda with its registers, its spills and its
instructions, each with the control bits that ptxas wrote beside it (how long to stall, which
scoreboards to wait for and to set). Cubins are kept in build/cubins under the hash of all that they
were made of, so that a second run compiles nothing.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc" / "kernels" / "cuda"
CUBINS = ROOT / "build" / "cubins"
FLAGS = ["-O3", "-std=c++17", "-fmad=false", "-cubin", "-Xptxas=-v"]  # as setup.py has them


@dataclass(frozen=True)
class Instruction:
    predicate: str  # "", "P0", "!P0", "UP1"
    opcode: str  # with its modifiers: LDG.E.EF.128
    operands: tuple[str, ...]
    stall: int  # clocks until the warp's next instruction
    waits: int  # a bit for each scoreboard that must be free before this one
    sets: int  # the scoreboard that is taken until the result is there, or -1
    reads: int  # the scoreboard that is taken until the operands are read, or -1

    @functools.cached_property
    def base(self) -> str:
        return self.opcode.split(".")[0]

    def moves(self, base: str, *modifiers: str) -> bool:
        """Whether this is such a memory instruction: ``moves("LDG", "128")``."""
        return self.base == base and all(m in self.opcode.split(".") for m in modifiers)


@dataclass
class Kernel:
    name: str
    arch: str
    registers: int
    shared: int  # bytes that the kernel itself declares
    spilled: int  # bytes of spill stores and loads
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # of the instruction that follows

    def target(self, instruction: Instruction) -> int | None:
        """The index of the instruction that a branch goes to."""
        found = re.search(r"`\(([^)]+)\)", " ".join(instruction.operands))
        return self.labels.get(found[1]) if found else None

    def loops(self) -> list[list[Instruction]]:
        """The innermost loops: what lies between a label and a branch back to it."""
        found = [
            (target, i)
            for i, instruction in enumerate(self.code)
            if instruction.base == "BRA"
            and (target := self.target(instruction)) is not None
            and target < i
        ]
        return [
            self.code[begin : end + 1]
            for begin, end in found
            if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in found)
        ]


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(f"{home}/bin/nvcc") or shutil.which("nvcc")


def nvcc_version() -> str:
    compiler = nvcc()
    assert compiler is not None
    text = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"V(\d+\.\d+\.\d+)", text)
    return found[1] if found else "unknown"


def nvdisasm() -> str:
    for name in (str(Path(nvcc() or "").parent / "nvdisasm"), "nvdisasm"):
        if found := shutil.which(name):
            return found
    try:
        files = importlib.metadata.files("nvidia-cuda-nvdisasm") or []
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit("no nvdisasm here; pip install nvidia-cuda-nvdisasm") from None
    return next(str(file.locate()) for file in files if file.name == "nvdisasm")


def demangled(names: Iterable[str]) -> list[str]:
    """rows_kernel<float, false, 16>: as much of a kernel's name as tells it from the others.

    false and true stand for CrossEntropy<false>, plain rows, and CrossEntropy<true>.
    """
    text = "\n".join(names)
    plain = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True)
    found = []
    for name in plain.stdout.splitlines():
        name = re.sub(r"\(anonymous namespace\)::|masked_loss\w*::|cuda::|^void ", "", name.strip())
        name = name.replace("(bool)0", "false").replace("(bool)1", "true")
        name = re.sub(r"\((bool|int)\)", "", name).split("(")[0]
        found.append(re.sub(r"CrossEntropy<(true|false)>", r"\1", name))
    return found


def _cubin(source: Path, arch: str) -> Path:
    """The compiled source, and beside it, in a .txt, what ptxas said about its kernels."""
    compiler = nvcc()
    if compiler is None:
        raise SystemExit("no nvcc in $CUDA_HOME/bin, /usr/local/cuda/bin or PATH")
    flags = [*FLAGS, f"-arch={arch}"]
    digest = hashlib.sha256(" ".join([nvcc_version(), *flags]).encode())
    headers = sorted(
        p for p in (ROOT / "csrc" / "kernels").rglob("*") if p.suffix in (".h", ".cuh")
    )
    for path in (source, *headers):
        digest.update(path.name.encode() + path.read_bytes())
    target = CUBINS / f"{source.stem}-{arch}-{digest.hexdigest()[:16]}.cubin"
    if not target.exists():
        CUBINS.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        command = [compiler, *flags, f"-I{ROOT / 'csrc'}", str(source), "-o", str(partial)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            raise SystemExit(f"nvcc failed for {source.name}, {arch}\n{result.stderr}")
        target.with_suffix(".txt").write_text(result.stderr)
        partial.rename(target)
    return target


_LINE = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P[0-9T]+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;"
    r"\s+/\* 0x[0-9a-f]{16} \*/$"
)
_CONTROL = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/$")
_LABEL = re.compile(r"^([\w.$]+):$")


def _decode(kernel: Kernel, sass: str) -> None:
    """An instruction is 128 bits, of which the upper 23 are its control bits."""
    pending = None
    for line in sass.splitlines():
        if found := _LINE.match(line):
            pending = found
        elif pending is not None and (bits := _CONTROL.match(line)):
            control = int(bits[1], 16) >> 41
            sets, reads = control >> 5 & 7, control >> 8 & 7
            operands = tuple(x.strip() for x in pending[3].split(",")) if pending[3] else ()
            kernel.code.append(
                Instruction(
                    predicate=pending[1] or "",
                    opcode=pending[2],
                    operands=operands,
                    stall=control & 15,
                    waits=control >> 11 & 63,
                    sets=-1 if sets == 7 else sets,
                    reads=-1 if reads == 7 else reads,
                )
            )
            pending = None
        elif found := _LABEL.match(line):
            kernel.labels[found[1]] = len(kernel.code)


def _kernels_of(source: Path, arch: str) -> list[Kernel]:
    cubin = _cubin(source, arch)
    report = re.findall(
        r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)",
        cubin.with_suffix(".txt").read_text(),
        re.DOTALL,
    )
    if not report:
        return []
    names = demangled(name for name, *_ in report)
    kernels = {}
    for name, (mangled, stores, loads, registers, more) in zip(names, report, strict=True):
        shared = re.search(r"(\d+) bytes smem", more)
        kernels[mangled] = Kernel(
            name,
            arch,
            registers=int(registers),
            shared=int(shared[1]) if shared else 0,
            spilled=int(stores) + int(loads),
        )
    text = subprocess.run(
        [nvdisasm(), "-c", "-hex", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    functions = re.compile(r"^\.text\.(\w+):\n(.*?)(?=^\t\.section|\Z)", re.DOTALL | re.MULTILINE)
    for name, sass in functions.findall(text):
        _decode(kernels[name], sass)
    return list(kernels.values())


def kernels(*archs: str) -> list[Kernel]:
    """Every kernel for every one of these architectures."""
    work = [(s, arch) for arch in archs for s in sorted(SOURCES.glob("*.cu"))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(lambda pair: _kernels_of(*pair), work))
    return sorted((k for ks in found for k in ks), key=lambda k: (archs.index(k.arch), k.name))
