# SPDX-License-Identifier: BSD-3-Clause
"""How findings are printed: as ruff and flake8 do, as JSON, or as annotations on GitHub."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

from masked_loss_lint.rules import RULES, Finding


def text(findings: Sequence[Finding]) -> str:
    return "\n".join(f"{f.place}:{f.place.column}: {f.code} {f.message}" for f in findings)


def as_json(findings: Sequence[Finding]) -> str:
    rows = [
        {
            "path": f.place.path,
            "cell": f.place.cell or None,
            "line": f.place.line,
            "column": f.place.column,
            "code": f.code,
            "message": f.message,
            "fixable": f.fixable,
        }
        for f in findings
    ]
    return json.dumps(rows, indent=2)


def github(findings: Sequence[Finding]) -> str:
    """Workflow commands, see docs.github.com: Workflow commands for GitHub Actions."""

    def escape(value: str, extra: str = "") -> str:
        for character in "%\r\n" + extra:
            value = value.replace(character, f"%{ord(character):02X}")
        return value

    def command(f: Finding) -> str:
        place, message = f.place, f.message
        where = f"file={escape(place.path, ':,')}"
        if place.cell:  # a line of a cell is not a line of the file
            message = f"cell {place.cell}, line {place.line}: {message}"
        else:
            where += f",line={place.line},col={place.column}"
        return f"::error {where},title={f.code}::{escape(message)}"

    return "\n".join(map(command, findings))


FORMATS = {"text": text, "json": as_json, "github": github}


def statistics(findings: Sequence[Finding]) -> str:
    counts = Counter(finding.code for finding in findings)
    return "\n".join(f"{n:6}  {code}  {RULES[code]}" for code, n in sorted(counts.items()))


def summary(findings: Sequence[Finding], files: int, fixed: int, unreadable: int) -> str:
    fixable = sum(finding.fixable for finding in findings)
    parts = [
        f"Found {len(findings)} in {files} files." if findings else f"{files} files are clean."
    ]
    if fixed:
        parts.append(f"{fixed} fixed.")
    if fixable:
        parts.append(f"{fixable} can be fixed with --fix.")
    if unreadable:
        parts.append(f"{unreadable} could not be read.")
    return " ".join(parts)
