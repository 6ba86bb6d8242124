# SPDX-License-Identifier: BSD-3-Clause
"""Finds losses that were reduced before their mask, and related mistakes, in source code.

Run it as ``masked-loss-lint PATH ...``. The rules are described in docs/lint.md. Files are read,
never executed. `source` reads a file; `walk` (with `expressions`, `calls`) makes of each function
one summary of `values`; `program` knows which file means which by an import; `resolve` brings the
summaries together and hands what happens in them to `rules`; `local` judges what one function alone
decides.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from masked_loss_lint.program import Module, Program
from masked_loss_lint.resolve import Resolver
from masked_loss_lint.rules import RULES, Finding
from masked_loss_lint.source import UnreadableError, read
from masked_loss_lint.walk import walk

__all__ = ["RULES", "Finding", "Report", "check"]


@dataclass
class Report:
    """What `check` found, and what it did not understand."""

    findings: list[Finding] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)  # files, and why
    unclear: list[str] = field(default_factory=list)  # masks that met something unknown
    files: int = 0


def check(paths: Iterable[Path], codes: Collection[str] = tuple(RULES)) -> Report:
    """What the rules named by `codes` find in these files, as one program, in order of place."""
    report = Report()
    modules: list[Module] = []
    findings: list[Finding] = []
    silenced: dict[str, dict[int, str]] = {}
    for path in sorted(paths, key=str):
        try:
            source = read(path)
        except UnreadableError as error:
            report.unreadable.append(str(error))
            continue
        report.files += 1
        module = Module(path, source.imports())
        modules.append(module)
        if source.relevant:
            findings += walk(module, source)
            silenced[str(path)] = source.silenced()

    resolver = Resolver(Program(modules, lambda module: walk(module, read(module.path))))
    resolver.run()
    findings += resolver.findings.values()

    def is_silenced(finding: Finding) -> bool:
        places = (finding.place, finding.met)
        comments = (silenced.get(p.path, {}).get(line) for p in places for line in p.lines)
        return any(c is not None and (not c or finding.code in c) for c in comments)

    unique = {(f.place, f.code): f for f in findings if f.code in codes and not is_silenced(f)}
    report.findings = sorted(unique.values())
    report.unclear = [
        f"{place}:{place.column}: {text}" for place, text in sorted(resolver.unclear.items())
    ]
    return report
