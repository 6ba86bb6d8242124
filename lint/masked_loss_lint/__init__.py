# SPDX-License-Identifier: BSD-3-Clause
"""Finds losses that were reduced before their mask, and related mistakes, in source code.

Run it as ``masked-loss-lint PATH ...``. The rules are described in docs/lint.md. Files are read,
never executed. `source` reads a file; `walk` looks at each function, first with unknown arguments,
then as it is called, with `statements`, `expressions`, `tensors`, `calls` and `objects`, which say
what an expression is (`values`); `program` knows which file an import means; `rules` and `local`
say what is wrong.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from masked_loss_lint.program import Module, Program
from masked_loss_lint.rules import NOTE, RULES, Finding
from masked_loss_lint.source import read
from masked_loss_lint.walk import Walker

__all__ = ["RULES", "Finding", "Report", "check"]

_FRAMES = 5000  # eight calls within calls, each in ninety expressions and blocks, need 4000
_TREES = 64  # as many are kept at a time


@dataclass
class Report:
    """What `check` found, and what it did not understand."""

    findings: list[Finding] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)  # files, and why
    unclear: list[str] = field(default_factory=list)  # masks that met something unknown
    files: int = 0


def check(paths: Iterable[Path], codes: Collection[str] = tuple(RULES)) -> Report:
    """What the rules named by `codes` find in these files, as one program, in order of place."""
    limit, collecting = sys.getrecursionlimit(), gc.isenabled()
    sys.setrecursionlimit(max(limit, _FRAMES))
    gc.disable()  # what is made lives until the end
    try:
        return _check(paths, codes)
    finally:
        sys.setrecursionlimit(limit)
        if collecting:
            gc.enable()


def _check(paths: Iterable[Path], codes: Collection[str]) -> Report:
    cached = lru_cache(maxsize=_TREES)(read)
    program = Program(Module(path, cached) for path in paths)
    walker = Walker(program)
    walker.look_at_all()
    report = Report(unreadable=[module.error for module in program.modules if module.error])
    report.files = len(program.modules) - len(report.unreadable)
    silenced = {str(module.path): module.silenced for module in program.modules}

    def is_silenced(finding: Finding) -> bool:
        places = (finding.place, finding.met)
        comments = (silenced.get(p.path, {}).get(line) for p in places for line in p.lines)
        return any(c is not None and (not c or finding.code in c) for c in comments)

    unique: dict[tuple[object, str], Finding] = {}
    for finding in sorted(walker.findings(), key=lambda f: f.message, reverse=True):
        if finding.code in (*codes, NOTE) and not is_silenced(finding):
            unique[finding.place, finding.code] = finding
    report.findings = sorted(f for f in unique.values() if f.code != NOTE)
    notes = sorted(f for f in unique.values() if f.code == NOTE)
    report.unclear = [f"{f.place}:{f.place.column}: {f.message}" for f in notes]
    return report
