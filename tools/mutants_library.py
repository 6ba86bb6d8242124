# SPDX-License-Identifier: BSD-3-Clause
"""The library of all mutants, built once: any number of them can be switched on in a process."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import FunctionType

from mutants import ROOT, TARGETS, TOOLS, Mutant, changed_code, pairs_of_code

TREE = ROOT / "build" / "mutants"
MOST_MUTANTS = 4096

# Which of them are on.
SWITCHES = f"""
__attribute__((visibility("default"))) inline bool masked_loss_mutants[{MOST_MUTANTS}];
"""


NO_AVX512 = """#include "kernels/cpu/isa.h"
namespace masked_loss::cpu::isa_avx512 {
extern const Kernels kKernels;
const Kernels kKernels{};
}
"""


def build(chosen: list[Mutant]) -> None:
    """A place that wants a constant is left out, and named."""
    for name in ("csrc", "masked_loss", "tests"):
        shutil.rmtree(TREE / name, ignore_errors=True)
        shutil.copytree(ROOT / name, TREE / name, ignore=shutil.ignore_patterns("_C.so"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, TREE / name)
    setup = (ROOT / "setup.py").read_text()
    switch = TREE / "mutants.h"
    switch.write_text(SWITCHES)
    setup = setup.replace('"-O3"', f'"-O1", "-w", "-include", "{switch}"')
    (TREE / "setup.py").write_text(setup)
    shutil.copy(TOOLS / "mutants.inl.h", TREE / "csrc")
    # Its formulas are those of the others, and not every machine could run it.
    (TREE / "csrc/kernels/cpu/isa_avx512.cpp").write_text(NO_AVX512)
    sources = [f"csrc/kernels/cpu/{name}.cpp" for name in ("tokens", "isa_avx2", "isa_default")]
    checks = [["c++", "-fsyntax-only", "-w", "-std=c++17", "-Icsrc", "-include", str(switch), file]
              for file in sources]  # fmt: skip
    left = [m for m in chosen if m.file.startswith("csrc/")]
    write(left)
    for command in [*checks, [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]]:
        while output := errors_of(command):
            places = blamed(output, {(m.file, m.line) for m in left})
            if not places:
                sys.exit(output[-5000:])
            for m in left:
                if (m.file, m.line) in places:
                    print(f"needs a constant, left out: {m}", flush=True)
            left = [m for m in left if (m.file, m.line) not in places]
            write(left)


def built() -> set[int]:
    files = [path.read_text() for path in (TREE / "csrc").rglob("*.h")]
    return {int(n) for text in files for n in re.findall(r"<(\d+)>\(\)", text)}


def errors_of(command: list[str]) -> str:
    run = subprocess.run(
        command, cwd=TREE, env={**os.environ, "MASKED_LOSS_CUDA": "0"}, capture_output=True,
        text=True,
    )  # fmt: skip
    return "" if run.returncode == 0 else run.stdout + run.stderr + " "


def write(left: list[Mutant]) -> None:
    by_line: dict[tuple[str, int], list[Mutant]] = {}
    for m in left:
        by_line.setdefault((m.file, m.line), []).append(m)
    for file in TARGETS:
        if file.startswith("csrc/"):
            lines = (ROOT / file).read_text().splitlines()
            for number in range(1, len(lines) + 1):
                for m in reversed(by_line.get((file, number), [])):
                    lines[number - 1] = m.switched(lines[number - 1])
            save(TREE / file, "\n".join(lines) + "\n")
    # Where the formulas are included, what switches them comes first.
    for path in (TREE / "csrc" / "kernels").rglob("*.*"):
        text = path.read_text()
        begin = (
            '#include "kernels/cpu/scalar.inl.h"' if path.name != "half.h" else "struct BFloat16"
        )
        if begin in text and path.suffix in (".cpp", ".h") and "mutants.inl.h" not in text:
            save(path, text.replace(begin, f'#include "mutants.inl.h"\n{begin}'))


def save(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def blamed(output: str, lines: set[tuple[str, int]]) -> set[tuple[str, int]]:
    """The changed lines that the compiler's errors are about."""
    found: set[tuple[str, int]] = set()
    for block in re.split(r"(?=In instantiation of|In member function|In function)", output):
        if "error:" not in block:
            continue
        places = re.findall(r"(csrc/[\w/.]+):(\d+):\d+[:,]?\s+(error)?", block)
        for file, line, _ in sorted(places, key=lambda place: place[2] != "error"):
            if (file, int(line)) in lines:
                found.add((file, int(line)))
                break
    return found


# In a process


def switch_on(mutants: list[Mutant]) -> None:
    library = ctypes.CDLL(str(TREE / "masked_loss" / "_C.so"))
    switches = (ctypes.c_bool * MOST_MUTANTS).in_dll(library, "masked_loss_mutants")
    for m in mutants:
        switches[m.number] = True
    for file in {m.file for m in mutants if m.file.endswith(".py")}:
        change_functions(TREE / file, [m for m in mutants if m.file == file])


def change_functions(path: Path, mutants: list[Mutant]) -> None:
    """Gives the functions that this file has defined their changed code."""
    new = dict(pairs_of_code(*changed_code(path, mutants)))
    for f in gc.get_objects():
        if type(f) is FunctionType and f.__code__ in new and f.__code__.co_filename == str(path):
            f.__code__ = new[f.__code__]
