# SPDX-License-Identifier: BSD-3-Clause
"""Finds losses that were reduced before their mask, and related mistakes, in source code.

Run it as ``masked-loss-lint PATH ...``. The rules are described in docs/lint.md. Files
are read, never executed. It works in five small steps, one module each: `source` reads files,
`project` finds out which name means what across them, `interpreter` runs them on the abstract
`values` (`tensors` knows their arithmetic), `rules` judge the `events` it meets, `output` prints.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from masked_loss_lint.events import Event
from masked_loss_lint.interpreter import Interpreter
from masked_loss_lint.project import Project
from masked_loss_lint.rules import RULES, Finding
from masked_loss_lint.source import Source, find, read
from masked_loss_lint.values import Place

__all__ = ["RULES", "Finding", "check", "check_paths"]


def check(
    sources: Iterable[Source],
    codes: Collection[str] = tuple(RULES),
    on_error: Callable[[str], object] = warnings.warn,
) -> list[Finding]:
    """What the rules named by `codes` find in these files, in order of place.

    `on_error` is told what had to be left out.
    """
    files = list(sources)
    findings: dict[tuple[object, str], Finding] = {}
    too_deep: set[Place] = set()
    rules = [RULES[code] for code in RULES if code in codes]

    def report(event: Event) -> None:
        try:
            for rule in rules:
                finding = rule(event)
                if finding and not finding.silenced:
                    findings.setdefault((finding.place, finding.code), finding)
        except RecursionError:
            too_deep.add(event.frame.place(event.node))

    Interpreter(Project(files), report, too_deep.add).run()
    for place in sorted(too_deep):
        on_error(f"{place}: cannot check: nested too deeply")
    return sorted(findings.values())


def check_paths(paths: Iterable[Path], codes: Collection[str] = tuple(RULES)) -> list[Finding]:
    """`check` of every Python file and notebook under these paths.

    Raises `masked_loss_lint.source.UnreadableError` for a file that cannot be parsed.
    """
    return check([read(path) for path in find(paths)], codes)
