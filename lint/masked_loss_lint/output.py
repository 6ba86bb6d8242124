# SPDX-License-Identifier: BSD-3-Clause
"""How findings are printed: as ruff and flake8 do, as JSON, or as annotations on GitHub."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence

from masked_loss_lint import RULES, Finding, Report

_PLACE, _FINDING = ("path", "cell", "line", "column"), ("code", "message", "fixable")


def text(findings: Sequence[Finding]) -> str:
    return "\n".join(f"{f.place}:{f.place.column}: {f.code} {f.message}" for f in findings)


def as_json(findings: Sequence[Finding]) -> str:
    """Of each finding its place and what is said of it."""
    places = [{key: getattr(f.place, key) or None for key in _PLACE} for f in findings]
    rest = [{key: getattr(f, key) for key in _FINDING} for f in findings]
    return json.dumps([a | b for a, b in zip(places, rest, strict=True)], indent=2)


def github(findings: Sequence[Finding]) -> str:
    """Workflow commands, see docs.github.com: Workflow commands for GitHub Actions."""
    return "\n".join(map(_command, findings))


def _command(finding: Finding) -> str:
    place, message = finding.place, finding.message
    where = f"file={_escape(place.path, ':,')}"
    if place.cell:  # a line of a cell is not a line of the file
        message = f"cell {place.cell}, line {place.line}: {message}"
    else:
        where += f",line={place.line},col={place.column}"
    return f"::error {where},title={finding.code}::{_escape(message)}"


def _escape(value: str, extra: str = "") -> str:
    return re.sub(f"[%\r\n{extra}]", lambda found: f"%{ord(found[0]):02X}", value)


FORMATS = {"text": text, "json": as_json, "github": github}


def statistics(findings: Sequence[Finding]) -> str:
    counts = Counter(finding.code for finding in findings)
    return "\n".join(f"{n:6}  {code}  {RULES[code]}" for code, n in sorted(counts.items()))


def summary(report: Report, fixed: int = 0) -> str:
    count, fixable = len(report.findings), sum(finding.fixable for finding in report.findings)
    first = (
        f"Found {count} in {report.files} files." if count else f"{report.files} files are clean."
    )
    counts = {
        "fixed": fixed,
        "can be fixed with --fix": fixable,
        "could not be read": len(report.unreadable),
    }
    return " ".join([first, *(f"{n} {what}." for what, n in counts.items() if n)])
