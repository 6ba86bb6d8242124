# SPDX-License-Identifier: BSD-3-Clause
"""Changes the formulas one operator at a time, and lists the changes that no test notices.

    python tools/mutate.py --minutes 20          a sample, in an order drawn from --seed
    python tools/mutate.py --list                what would be changed

Each mutant is built in a tree of its own (build/mutants) and given to the tests without torch,
whose build is the shortest, and then to those of the library. A survivor is a missing test, or
equal to the original: EQUAL says why for those that were looked into.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TREE = ROOT / "build" / "mutants"

ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(TREE),
    "MASKED_LOSS_CUDA": "0",
    "OMP_NUM_THREADS": "1",
}

# What is mutated, with the tests that must notice it.
KERNEL_TESTS = ["tests/kernels/test_rounding.py", "tests/losses/test_semantics.py",
                "tests/losses/test_invariants.py"]  # fmt: skip
PYTHON_TESTS = ["tests/losses/test_semantics.py", "tests/losses/test_linear.py",
                "tests/autograd/test_gradients.py"]  # fmt: skip
TARGETS = {
    "csrc/kernels/math.inl.h": KERNEL_TESTS,
    "csrc/kernels/losses.inl.h": KERNEL_TESTS,
    "csrc/kernels/token.inl.h": KERNEL_TESTS,
    "csrc/kernels/half.h": KERNEL_TESTS,
    "csrc/kernels/cpu/scalar.inl.h": KERNEL_TESTS,
    "csrc/kernels/cpu/vec_*.inl.h": KERNEL_TESTS,
    "masked_loss/_op/cross_entropy.py": PYTHON_TESTS,
    "masked_loss/_op/linear*.py": PYTHON_TESTS,
    "masked_loss/_op/reduce.py": PYTHON_TESTS,
}
# What this machine cannot run: a change there would survive unseen.
LEFT_OUT = {"vec_neon.inl.h", "vec_avx512.inl.h"}

# (what is found, what it becomes). One match is one mutant.
CHANGES = [
    (r"(?<= )\+(?= )", "-"),
    (r"(?<=[\w)\]] )-(?= )", "+"),
    (r"(?<=[\w)\]] )\*(?= )", "/"),
    (r"(?<=[\w)\]] )/(?= )", "*"),
    (r"(?<= )<(?= )", "<="),
    (r"(?<= )<=(?= )", "<"),
    (r"(?<= )>(?= )", ">="),
    (r"(?<= )>=(?= )", ">"),
    (r"(?<= )==(?= )", "!="),
    (r"(?<= )!=(?= )", "=="),
    (r"(?<= )&&(?= )", "||"),
    (r"(?<= )and(?= )", "or"),
    (r"\bstd::min\b", "std::max"),
    (r"\bstd::max\b", "std::min"),
    (r"(?<![\w.])(\d+)(?![\w.])", None),  # a number: one more
    (r"(?<![\w.])0x[0-9a-f]+(?![\w.])", None),
]

# Survivors that change nothing, by file and line: why.
EQUAL: dict[tuple[str, str], str] = {}


class Mutant(NamedTuple):
    file: str
    line: int
    column: int
    old: str
    new: str
    text: str  # the line as it was
    tests: tuple[str, ...]

    def __str__(self) -> str:
        changed = self.text[: self.column] + self.new + self.text[self.column + len(self.old) :]
        return f"{self.file}:{self.line}: {changed.strip()}    (was {self.old})"


def mutants() -> list[Mutant]:
    found = []
    for pattern, tests in TARGETS.items():
        for path in sorted(ROOT.glob(pattern)):
            if path.name in LEFT_OUT:
                continue
            name = str(path.relative_to(ROOT))
            in_docstring = False
            for number, line in enumerate(path.read_text().splitlines(), 1):
                quotes = line.count('"""')
                skip = in_docstring or quotes
                in_docstring ^= quotes % 2 == 1
                if not skip:
                    found += [Mutant(name, number, *change, tuple(tests)) for change in of(line)]
    return found


def of(line: str) -> list[tuple[int, str, str, str]]:
    """(column, old, new, line) of every change of the code in one line."""
    comment = re.search(r"//|(^|\s)#", line)
    code = line[: comment.start()] if comment else line
    if re.match(r"\s*(template|using|static_assert|struct|#|import|from|@)", code):
        return []
    changes = []
    for pattern, new in CHANGES:
        for match in re.finditer(pattern, code):
            old = match.group()
            changes.append((match.start(), old, new or more(old), line))
    return changes


def more(number: str) -> str:
    return hex(int(number, 16) + 1) if number.startswith("0x") else str(int(number) + 1)


def run(*command: str, minutes: float = 10) -> bool:
    """Whether a command in the mutant's tree succeeds; one that hangs does not."""
    try:
        done = subprocess.run(
            ["nice", "-n", "10", *command],
            cwd=TREE,
            capture_output=True,
            timeout=60 * minutes,
            env=ENVIRONMENT,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def noticed_by(mutant: Mutant) -> str:
    """What noticed it, or "" for a survivor."""
    kernels = mutant.file.startswith("csrc/")
    if kernels:
        if not run("cmake", "--build", "build/cpp"):
            return "the compiler"
        if not run("ctest", "--test-dir", "build/cpp", "-j2"):
            return "the tests without torch"
        if not run(sys.executable, "setup.py", "-q", "build_ext", "--inplace"):
            return "the compiler"
    pytest = (sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n2")
    return "" if run(*pytest, *mutant.tests) else "pytest"


def prepare() -> None:
    subprocess.run(["git", "worktree", "prune"], cwd=ROOT, check=True)
    if not TREE.exists():
        subprocess.run(["git", "worktree", "add", "--detach", TREE], cwd=ROOT, check=True)
    subprocess.run(["git", "checkout", "-q", "--detach", "HEAD"], cwd=TREE, check=True)
    cmake = ["cmake", "-S", ".", "-B", "build/cpp", "-G", "Ninja", "-DMASKED_LOSS_LIBRARY=OFF",
             "-DMASKED_LOSS_KERNEL_TESTS=ON", "-DMASKED_LOSS_SANITIZERS="]  # fmt: skip
    unchanged = Mutant("csrc/", 0, 0, "", "", "", ("tests/kernels/test_rounding.py",))
    if not run(*cmake) or (who := noticed_by(unchanged)):
        sys.exit(f"mutate.py: the unchanged tree fails already: {who or 'cmake'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=20, help="start no mutant after these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="files whose name contains this")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    chosen = [mutant for mutant in mutants() if args.only in mutant.file]
    random.Random(args.seed).shuffle(chosen)
    if args.list:
        print(*chosen, f"{len(chosen)} mutants", sep="\n")
        return
    prepare()
    counts: dict[str, int] = {}
    end = time.monotonic() + 60 * args.minutes
    for mutant in chosen:
        if time.monotonic() > end:
            break
        path = TREE / mutant.file
        original = path.read_text()
        lines = original.splitlines(keepends=True)
        line = lines[mutant.line - 1]
        stop = mutant.column + len(mutant.old)
        lines[mutant.line - 1] = line[: mutant.column] + mutant.new + line[stop:]
        path.write_text("".join(lines))
        try:
            who = noticed_by(mutant)
        finally:
            path.write_text(original)
        equal = EQUAL.get((mutant.file, mutant.text.strip()), "")
        verdict = f"noticed by {who}" if who else f"equal: {equal}" if equal else "SURVIVED"
        counts[verdict.split(":")[0]] = counts.get(verdict.split(":")[0], 0) + 1
        print(f"{verdict}: {mutant}", flush=True)
    print(f"{sum(counts.values())} of {len(chosen)} mutants:", counts)
    if "SURVIVED" in counts:
        sys.exit(1)


if __name__ == "__main__":
    main()
