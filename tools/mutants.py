# SPDX-License-Identifier: BSD-3-Clause
"""What mutate.py changes, and which of it changes nothing that a test could see."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from inspect import CO_OPTIMIZED
from pathlib import Path
from types import CodeType
from typing import NamedTuple

TOOLS = Path(__file__).parent
ROOT = TOOLS.parent

# The quickest first.
ROWS = ["tests/losses/test_semantics.py", "tests/losses/test_special_numbers.py",
        "tests/losses/test_statistics.py", "tests/losses/test_token_log_probs.py",
        "tests/losses/test_cross_entropy.py", "tests/losses/test_dropin.py",
        "tests/losses/test_sharded.py", "tests/losses/test_packed.py",
        "tests/kernels/test_determinism.py", "tests/losses/test_masked_reduce.py",
        "tests/losses/test_errors.py", "tests/losses/test_layouts.py",
        "tests/kernels/test_memory.py",
        "tests/kernels/test_rounding.py"]  # fmt: skip
VECTORS = ["tests/kernels/test_rounding.py", *ROWS[:-1]]
SHARDS = ["tests/losses/test_sharded.py"]
AUTOGRAD = [
    f"tests/autograd/test_{story}.py" for story in ("gradients", "differences", "vmap", "compile")
]
ERRORS = ["tests/losses/test_errors.py"]
OPERATOR = [AUTOGRAD[0], *SHARDS, *ERRORS, *AUTOGRAD, *ROWS]
DIVERGENCE = ["tests/losses/test_divergence.py", "tests/losses/test_divergence_op.py"]
LINEAR = [
    *(f"tests/losses/test_{story}.py" for story in (
        "linear", "linear_autograd", "linear_chunks", "linear_log_probs", "linear_divergence",
        "sharded_linear",
    )),
    "tests/autograd/test_differences.py", "tests/kernels/test_memory.py", *ERRORS,
]  # fmt: skip
# What is changed, and the tests that must notice it.
TARGETS = {
    "csrc/kernels/math.inl.h": ROWS + DIVERGENCE,
    "csrc/kernels/losses.inl.h": ROWS,
    "csrc/kernels/token.inl.h": ROWS,
    "csrc/kernels/groups.inl.h": ROWS,
    "csrc/kernels/half.h": VECTORS,
    "csrc/kernels/divergence.inl.h": DIVERGENCE,
    "csrc/kernels/cpu/divergence.inl.h": DIVERGENCE,
    "csrc/kernels/cpu/pair_side.inl.h": DIVERGENCE,
    "csrc/kernels/shards.inl.h": SHARDS,
    "csrc/kernels/cpu/rows.inl.h": ROWS,
    "csrc/kernels/cpu/fetch.inl.h": ROWS,
    "csrc/kernels/cpu/scalar.inl.h": ROWS,
    "csrc/kernels/cpu/vec_math.inl.h": VECTORS,
    "csrc/kernels/tanh.inl.h": VECTORS,
    "csrc/kernels/cpu/vec_avx2.inl.h": VECTORS,
    "csrc/kernels/cpu/vec_portable.inl.h": VECTORS,
    "masked_loss/_op/cross_entropy.py": OPERATOR,
    "masked_loss/_op/log_probs.py": ["tests/losses/test_token_log_probs.py", *AUTOGRAD, *SHARDS],
    "masked_loss/_op/reduce.py": ["tests/losses/test_masked_reduce.py", *OPERATOR],
    "masked_loss/_op/divergence.py": DIVERGENCE + AUTOGRAD + ERRORS,
    "masked_loss/_op/linear.py": LINEAR,
    "masked_loss/_op/linear_chunks.py": LINEAR,
}
# What only CUDA's kernels call of the formulas that all share.
OF_CUDA = (
    "A value(A a, A b, A unit)",
    "A above(A a, A b, A unit,",
    "void push(const A (",
    "void push_soft(",
    "void push_uniform(",
    "V tree_dot(",
    "V tree_max(",
)
# Float vectors that a machine with wider ones uses for doubles only.
CAPABILITY = {"csrc/kernels/cpu/vec_portable.inl.h": "default"}

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
    (r"(?<![\w.[])(?<![ep][+-])(?:0x[0-9a-f]+|\d+)(?![\w.'])", None, ""),
]


class Mutant(NamedTuple):
    number: int
    file: str
    line: int
    column: int
    old: str
    new: str
    template: str
    text: str  # the line as it was

    def changed(self, text: str) -> str:
        """``text``, whose part from ``column`` on is as it was, with the change in it."""
        return text[: self.column] + self.new + text[self.column + len(self.old) :]

    def switched(self, text: str) -> str:
        """``text``, whose part from ``column`` on is as it was, with both versions in it."""
        n = self.number
        both = (
            f"{self.old}{self.template}<{n}>(){self.old}"
            if self.template
            else f"({self.old} + added<{n}>())"
        )
        return text[: self.column] + both + text[self.column + len(self.old) :]

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.changed(self.text).strip()}    (was {self.old})"


def mutants() -> list[Mutant]:
    found: list[Mutant] = []
    for file in TARGETS:
        in_docstring = of_cuda = False
        for number, line in enumerate((ROOT / file).read_text().splitlines(), 1):
            quotes = line.count('"""')
            of_cuda |= any(name in line for name in OF_CUDA)
            of_cuda &= line not in ("  }", "}")
            skip = in_docstring or quotes or of_cuda
            in_docstring ^= quotes % 2 == 1
            if not skip:
                found += [Mutant(len(found) + i, file, number, *change, line)
                          for i, change in enumerate(changes_of(line), 1)]  # fmt: skip
    return [m for m in found if m.file.startswith("csrc/") or changes_a_function(m)]


def changes_of(line: str) -> list[tuple[int, str, str, str]]:
    """(column, old, new, template) of every change of the code in one line."""
    comment = re.search(r"//|(^|\s)#", line)
    code = line[: comment.start()] if comment else line
    if re.match(r"\s*(template|using|static_assert|struct|enum|case|#|import|from|@)", code):
        return []
    constant = r"constexpr|Lanes<|&terms\)|kMagic =|DType::k"
    constant += r"|\b(?!return)[A-Za-z]+ \w+\[[^]]+\]( =|;)"
    constant += "|extract|blend_epi"
    constant += r"|prefetch|kPrefetchBytes|kElements|next \+"  # changes no result
    if re.search(constant, code):
        return []
    changes = []
    for pattern, new, template in CHANGES:
        for match in re.finditer(pattern, code):
            old = match.group()
            changes.append((match.start(), old, new or str(int(old, 0) + 1), template))
    return sorted(changes)


# Python


def changes_a_function(m: Mutant) -> bool:
    """What runs at import is over before any test."""
    pairs = pairs_of_code(*changed_code(ROOT / m.file, [m]))
    return any(before != after for before, after in pairs if before.co_flags & CO_OPTIMIZED)


def changed_code(path: Path, mutants: list[Mutant]) -> Iterator[CodeType]:
    """As it was and as it is."""
    lines = path.read_text().splitlines()
    yield compile("\n".join(lines), str(path), "exec", dont_inherit=True)
    for m in sorted(mutants, key=lambda m: -m.column):
        lines[m.line - 1] = m.changed(lines[m.line - 1])
    yield compile("\n".join(lines), str(path), "exec", dont_inherit=True)


def pairs_of_code(a: CodeType, b: CodeType) -> Iterator[tuple[CodeType, CodeType]]:
    inner = [[c for c in code.co_consts if isinstance(c, CodeType)] for code in (a, b)]
    for pair in zip(*inner, strict=True):
        yield pair
        yield from pairs_of_code(*pair)


# Those that change nothing that a test could see


def explained(everything: list[Mutant]) -> dict[Mutant, str]:
    """Why they are equal, by mutants_equal.txt: below a file lines, below the lines the reason.

    A line is as a mutant has it, or, behind an asterisk, as it is: all changes of it are equal.
    """
    of_line: dict[str, list[Mutant]] = {}
    for m in everything:
        for text in (m.changed(m.text).strip(), f"* {m.text.strip()}"):
            of_line.setdefault(f"{m.file} {text}", []).append(m)
    why: dict[Mutant, str] = {}
    file, lines = "", list[str]()
    for line in (TOOLS / "mutants_equal.txt").read_text().splitlines():
        match len(line) - len(line.lstrip()):
            case 0:
                file = line
            case 2:
                lines.append(f"{file} {line.strip()}")
                if lines[-1] not in of_line:
                    sys.exit(f"mutants_equal.txt has what is no mutant: {lines[-1]}")
            case _:
                why |= {m: line.strip() for text in lines for m in of_line[text]}
                lines = []
    return why
