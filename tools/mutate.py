# SPDX-License-Identifier: BSD-3-Clause
"""Changes the formulas, one operator or number at a time, and lists what no test notices.

    python tools/mutate.py                       all of them
    python tools/mutate.py --only math --share 4 every fourth, of the files with this in their name
    python tools/mutate.py --list                what would be changed

All mutants of the kernels are in one library, built once: MASKED_LOSS_MUTANT says which of them a
process is (mutants.inl.h). Those of the Python files are made while they are imported. A process
that has torch already is forked for each, runs the tests that apply and stops at the first that
fails. What none of them notices is a missing test, or equal to the original: EQUAL says why for
those that were looked into.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.machinery
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TREE = ROOT / "build" / "mutants"
TOOLS = Path(__file__).parent

# The quickest first.
ROWS = ["tests/losses/test_semantics.py", "tests/kernels/test_rounding.py",
        "tests/losses/test_token_log_probs.py", "tests/losses/test_cross_entropy.py",
        "tests/losses/test_dropin.py", "tests/losses/test_layouts.py",
        "tests/losses/test_packed.py", "tests/kernels/test_determinism.py",
        "tests/losses/test_sharded.py", "tests/kernels/test_memory.py",
        "tests/losses/test_masked_reduce.py"]  # fmt: skip
OPERATOR = [*ROWS, "tests/autograd/test_gradients.py", "tests/autograd/test_differences.py"]
DIVERGENCE = ["tests/losses/test_divergence.py"]
SHARDS = ["tests/losses/test_sharded.py"]
LINEAR = ["tests/losses/test_semantics.py", "tests/losses/test_linear.py"]
LINEAR += [f"tests/losses/test_linear_{story}.py" for story in ("autograd", "chunks")]
# What is changed, and the tests that must notice it.
TARGETS = {
    "csrc/kernels/math.inl.h": ROWS + DIVERGENCE,
    "csrc/kernels/losses.inl.h": ROWS,
    "csrc/kernels/token.inl.h": ROWS,
    "csrc/kernels/groups.inl.h": ROWS,
    "csrc/kernels/half.h": ROWS,
    "csrc/kernels/divergence.inl.h": DIVERGENCE,
    "csrc/kernels/cpu/divergence.inl.h": DIVERGENCE,
    "csrc/kernels/cpu/pair_side.inl.h": DIVERGENCE,
    "csrc/kernels/shards.inl.h": SHARDS,
    "csrc/kernels/cpu/rows.inl.h": ROWS,
    "csrc/kernels/cpu/fetch.inl.h": ROWS,
    "csrc/kernels/cpu/scalar.inl.h": ROWS,
    "csrc/kernels/cpu/vec_math.inl.h": ROWS,
    "csrc/kernels/tanh.inl.h": ROWS,
    "csrc/kernels/cpu/vec_avx2.inl.h": ROWS,
    "csrc/kernels/cpu/vec_portable.inl.h": ROWS,
    "masked_loss/_op/cross_entropy.py": OPERATOR,
    "masked_loss/_op/log_probs.py": OPERATOR,
    "masked_loss/_op/reduce.py": OPERATOR,
    "masked_loss/_op/divergence.py": DIVERGENCE,
    "masked_loss/_op/linear.py": LINEAR,
    "masked_loss/_op/linear_chunks.py": LINEAR,
}
# Float vectors that a machine with wider ones uses for doubles only.
CAPABILITY = {"csrc/kernels/cpu/vec_portable.inl.h": "default"}

TIME_OUT = "time out"

# (what is found, what it becomes, the template that can be both)
CHANGES = [
    (r"(?<= )\+(?= )", "-", "Plus"),
    (r"(?<=[\w)\]] )-(?= )", "+", "Minus"),
    (r"(?<=[\w)\]] )\*(?= )", "/", "Times"),
    (r"(?<=[\w)\]] )/(?= )", "*", "Over"),
    (r"(?<= )<(?= )", "<=", "Less"),
    (r"(?<= )<=(?= )", "<", "AtMost"),
    (r"(?<= )>(?= )", ">=", "Greater"),
    (r"(?<= )>=(?= )", ">", "AtLeast"),
    (r"(?<= )==(?= )", "!=", "Equal"),
    (r"(?<= )!=(?= )", "==", "Unequal"),
    # A number: one more. Not of a subscript, which would be beside what there is.
    (r"(?<![\w.[])(?<!e[+-])(?:0x[0-9a-f]+|\d+)(?![\w.'])", None, ""),
]

# Survivors that change nothing, by file and line: why.
EQUAL: dict[tuple[str, str], str] = {
    (
        "csrc/kernels/math.inl.h",
        "ML_FN EntropySums() : entropy_sum(V(0)) {}",
    ): "raise() multiplies what it starts with by exp(lowest - top) = 0",
    (
        "csrc/kernels/cpu/rows.inl.h",
        "return lane_sum(keep(logit(r, load<V>(r.x + j, Part{1})), Part{1}, A(0)));",
    ): "the lanes behind the first are logits of 0, whose softcap is 0",
    (
        "csrc/kernels/cpu/divergence.inl.h",
        "for (int64_t f = Field::kValue; f < fields; ++f) column(f, token) = 0;",
    ): "of a masked token nothing is read but its weight",
    (
        "csrc/kernels/token.inl.h",
        "if (begin < 0 || end > groups.tokens) return {group, 0, 0};",
    ): "the CPU refuses such bounds before; the emulator's tests are about them",
    (
        "csrc/kernels/cpu/fetch.inl.h",
        "const int64_t last = std::max<int64_t>(0, cols - kElements);",
    ): "what is fetched ahead changes no result",
    (
        "csrc/kernels/cpu/vec_portable.inl.h",
        "const Bits finite = magnitude < 0x38800000 ? subnormal : normal;",
    ): "of the smallest normal number both ways make the same",
    (
        "csrc/kernels/cpu/vec_portable.inl.h",
        "return __builtin_convertvector(y | (bits >> 16 & 0x8000), Half);",
    ): "a shift by 17 leaves the sign at this bit, too",
    (
        "csrc/kernels/cpu/rows.inl.h",
        "a = of_raw(a, V(0)), b = of_raw(b, V(0));",
    ): "a loss that is not soft has no use for it",
    (
        "csrc/kernels/cpu/fetch.inl.h",
        "f(std::min(last, end), x + j + kElements);",
    ): "what is fetched ahead changes no result",
    (
        "csrc/kernels/losses.inl.h",
        "token.column(TokenField::kLoss) = 0;",
    ): "of a masked token nothing is read but its weight",
    (
        "masked_loss/_op/linear_chunks.py",
        "everything = int(index[-1]) - self.first + 1 == self.count",
    ): "tokens that follow one another are gathered instead",
    (
        "masked_loss/_op/linear_chunks.py",
        "beta = 0 if self.empty else 1",
    ): "of CUDA, which these tests do not run",
    (
        "csrc/kernels/cpu/vec_portable.inl.h",
        "const Bits infinite = ((magnitude > 0x7f800000) & 0x200) | 0x7c00;",
    ): "one NaN is as good as another",
    (
        "csrc/kernels/math.inl.h",
        "this->sum = this->sum + e;",
    ): "of CUDA's kernels, which the emulator's tests are about",
    (
        "csrc/kernels/cpu/rows.inl.h",
        "if (begin <= j && j < end) narrow(this->derivative[k], dx + j);",
    ): "the next part writes the same there",
    (
        "masked_loss/_op/log_probs.py",
        "return _forward(inputs, how)[: 1 + entropy]",
    ): "of more results the caller takes what it wants",
    (
        "csrc/kernels/cpu/vec_portable.inl.h",
        "const Bits y = magnitude < 0x477ff000 ? finite : infinite;",
    ): "this number itself is rounded up to infinity",
    (
        "csrc/kernels/cpu/rows.inl.h",
        "Loss::kSoft ? soft_target_at(r, j, count, uniform) : V(0));",
    ): "a loss that is not soft has no use for it",
}


class Mutant(NamedTuple):
    number: int
    file: str
    line: int
    column: int
    old: str
    new: str
    template: str
    text: str  # the line as it was

    def changed(self) -> str:
        return self.text[: self.column] + self.new + self.text[self.column + len(self.old) :]

    def switched(self, text: str) -> str:
        """``text``, whose part from ``column`` on is as it was, with both versions in it."""
        n = self.number
        both = (
            f"{self.old}{self.template}<{n}>(){self.old}"
            if self.template
            else f"({self.old} + one<{n}>())"
        )
        return text[: self.column] + both + text[self.column + len(self.old) :]

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.changed().strip()}    (was {self.old})"


def mutants() -> list[Mutant]:
    found: list[Mutant] = []
    for file in TARGETS:
        in_docstring = False
        for number, line in enumerate((ROOT / file).read_text().splitlines(), 1):
            quotes = line.count('"""')
            skip = in_docstring or quotes
            in_docstring ^= quotes % 2 == 1
            if not skip:
                found += [Mutant(len(found) + i, file, number, *change, line)
                          for i, change in enumerate(changes_of(line), 1)]  # fmt: skip
    return found


def changes_of(line: str) -> list[tuple[int, str, str, str]]:
    """(column, old, new, template) of every change of the code in one line."""
    comment = re.search(r"//|(^|\s)#", line)
    code = line[: comment.start()] if comment else line
    if re.match(r"\s*(template|using|static_assert|struct|enum|case|#|import|from|@)", code):
        return []
    constant = r"constexpr|Lanes<|&terms\)|kMagic =|DType::k"
    constant += r"|\b(?!return)[A-Za-z]+ \w+\[[^]]+\]( =|;)"
    constant += "|extract|blend_epi|prefetch"
    if re.search(constant, code):
        return []
    changes = []
    for pattern, new, template in CHANGES:
        for match in re.finditer(pattern, code):
            old = match.group()
            changes.append((match.start(), old, new or str(int(old, 0) + 1), template))
    return sorted(changes)


# The library of all mutants

SWITCH = """#include <cstdlib>
inline const int masked_loss_mutant = [] {
  const char* s = std::getenv("MASKED_LOSS_MUTANT");
  return s ? std::atoi(s) : 0;
}();
"""


NO_AVX512 = """#include "kernels/cpu/isa.h"
namespace masked_loss::cpu::isa_avx512 {
extern const Kernels kKernels;
const Kernels kKernels{};
}
"""


def build(chosen: list[Mutant]) -> list[Mutant]:
    """Those that there are: a place that wants a constant is left out, and named."""
    for name in ("csrc", "masked_loss", "tests"):
        shutil.rmtree(TREE / name, ignore_errors=True)
        shutil.copytree(ROOT / name, TREE / name, ignore=shutil.ignore_patterns("_C.so"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, TREE / name)
    setup = (ROOT / "setup.py").read_text()
    switch = TREE / "mutants.h"
    switch.write_text(SWITCH)
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
    return [m for m in chosen if m in left or not m.file.startswith("csrc/")]


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


# One process for each


class Changed(importlib.machinery.SourceFileLoader):
    """Imports a Python file with its change."""

    def __init__(self, name: str, mutant: Mutant) -> None:
        super().__init__(name, str(TREE / mutant.file))
        self.mutant = mutant

    def get_data(self, path: str) -> bytes:
        if path.endswith(".pyc"):
            raise OSError("to be compiled anew")
        lines = super().get_data(path).decode().splitlines()
        lines[self.mutant.line - 1] = self.mutant.changed()
        return "\n".join(lines).encode()

    def set_data(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is kept."""


def change_at_import(mutant: Mutant) -> None:
    name = mutant.file.removesuffix(".py").replace("/", ".")

    class Finder:
        @staticmethod
        def find_spec(wanted: str, path: Any = None, target: Any = None) -> Any:
            if wanted != name:
                return None
            return importlib.machinery.ModuleSpec(wanted, Changed(name, mutant), origin=mutant.file)

    sys.meta_path.insert(0, Finder)


def noticed_by(mutant: Mutant, seconds: float) -> str:
    """What noticed it, or "" for a survivor."""
    log = TREE / f"log-{os.getpid()}.txt"
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        in_a_process_of_its_own(mutant, log)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status)
            failed = re.search(r"^(?:FAILED|ERROR) (\S+)", log.read_text(errors="replace"), re.M)
            return "" if code == 0 else failed[1] if failed else f"exit code {code}"
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return TIME_OUT


def in_a_process_of_its_own(mutant: Mutant, log: Path) -> None:
    import pytest

    with log.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
        os.chdir(TREE)
        sys.path.insert(0, str(TREE))
        if mutant.file.endswith(".py"):
            change_at_import(mutant)
        os.environ["MASKED_LOSS_MUTANT"] = str(mutant.number)
        os.environ["ATEN_CPU_CAPABILITY"] = CAPABILITY.get(mutant.file, "avx2")
        code = 3
        with contextlib.suppress(BaseException):
            for file in TARGETS[mutant.file]:  # one by one: to collect them all takes the longest
                code = pytest.main(
                    ["-q", "-x", "-p", "no:cacheprovider", "--tb=no", "-m", "not slow", file]
                )
                if code:
                    break
    os._exit(int(code))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="files whose name contains this")
    parser.add_argument("--share", type=int, default=1, help="every n-th mutant")
    parser.add_argument("--number", type=int, nargs="*", help="these mutants")
    parser.add_argument("--seconds", type=float, default=300, help="for the tests of one mutant")
    parser.add_argument("--keep", action="store_true", help="the library of the last run")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    everything = mutants()
    chosen = [m for m in everything if args.only in m.file]
    chosen = [m for m in chosen[:: args.share] if not args.number or m.number in args.number]
    if args.list:
        print(*chosen, f"{len(chosen)} mutants", sep="\n")
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    import hypothesis  # noqa: F401  # for the processes that are forked, as torch is
    import pytest  # noqa: F401
    import torch

    torch.set_num_threads(1)
    if args.keep:
        built = {int(n) for path in (TREE / "csrc").rglob("*.h")
                 for n in re.findall(r"<(\d+)>\(\)", path.read_text())}  # fmt: skip
        chosen = [m for m in chosen if m.number in built or m.file.endswith(".py")]
    else:
        built_ones = set(build(everything))
        chosen = [m for m in chosen if m in built_ones]
    counts: dict[str, Counter[str]] = {}
    for m in chosen:
        who = noticed_by(m, args.seconds)
        equal = EQUAL.get((m.file, m.text.strip()), "")
        verdict = "noticed" if who else "equal" if equal else "SURVIVED"
        verdict = who if who == TIME_OUT else verdict  # it hangs, or its tests take longer
        counts.setdefault(m.file, Counter())[verdict] += 1
        print(f"{verdict} {who or equal}: {m.number} {m}", flush=True)
    for file, of_file in counts.items():
        print(f"{file}: {dict(of_file)}")
    if any(of_file["SURVIVED"] for of_file in counts.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
