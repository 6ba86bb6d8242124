# SPDX-License-Identifier: BSD-3-Clause
"""The command line: ``masked-loss-lint PATH ...``.

Exit status: 0 nothing found, 1 something found, 2 wrong use (with --strict, also a file that cannot
be read).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from masked_loss_lint import RULES, Finding, Report, check
from masked_loss_lint.config import ConfigError, codes, read_config
from masked_loss_lint.fix import fix
from masked_loss_lint.output import FORMATS, statistics, summary
from masked_loss_lint.source import find
from masked_loss_lint.values import Place


def _codes(text: str) -> list[str]:
    return codes(text.replace(" ", "").split(","))


_OPTIONS: dict[str, dict[str, Any]] = {
    "--select": {"type": _codes, "help": "only these rules"},
    "--ignore": {"type": _codes, "help": "not these rules"},
    "--exclude": {"action": "append", "metavar": "GLOB", "default": []},
    "--format": {"choices": FORMATS, "default": "text"},
    "--fix": {"action": "store_true", "help": "rewrite what ML002 finds"},
    "--statistics": {"action": "store_true", "help": "count the findings of each rule"},
    "--strict": {"action": "store_true", "help": "fail where a file cannot be read"},
    "--verbose": {"action": "store_true", "help": "name what was not understood"},
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="masked-loss-lint",
        description="Finds losses that were reduced before their mask, and related mistakes.",
        epilog="\n".join(f"{code}  {text}" for code, text in RULES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="files and folders")
    for name, settings in _OPTIONS.items():
        parser.add_argument(name, **settings)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(argv)
    errors = [f"{path}: no such file or folder" for path in given.paths if not path.exists()]
    try:
        config = read_config(given.paths)
    except ConfigError as error:
        errors.append(str(error))
    if errors:
        return _fail(errors)
    ignored = given.ignore or config["ignore"]
    selected = [code for code in given.select or config["select"] if code not in ignored]
    report = check(find(given.paths, [*config["exclude"], *given.exclude]), selected)
    return _print(given, report)


def _fail(errors: Sequence[str]) -> int:
    for text in errors:
        print(f"error: {text}", file=sys.stderr)
    return 2 if errors else 0


def _print(given: argparse.Namespace, report: Report) -> int:
    found, errors = len(report.findings), list(report.unreadable)
    if given.fix:
        report.findings = _fixed(report.findings, errors)
    _fail(errors)
    for text in report.unclear if given.verbose else ():
        print(f"note: {text}", file=sys.stderr)
    if report.findings or given.format == "json":
        print(FORMATS[given.format](report.findings))
    if given.statistics and report.findings:
        print(statistics(report.findings), file=sys.stderr)
    print(summary(report, found - len(report.findings)), file=sys.stderr)
    failed = len(errors) > len(report.unreadable) or (report.unreadable and given.strict)
    return 2 if failed else int(bool(report.findings))


def _fixed(findings: list[Finding], errors: list[str]) -> list[Finding]:
    """Writes the repaired files; returns the findings that remain, which it cannot repair."""
    places = [f.place for f in findings if f.fixable]
    done: set[Place] = set()
    for path in dict.fromkeys(place.path for place in places):
        try:
            done |= fix(Path(path), [place for place in places if place.path == path])
        except OSError as error:
            errors.append(f"{path}: cannot write: {error}")
    return [replace(f, fixable=False) for f in findings if not (f.fixable and f.place in done)]


if __name__ == "__main__":
    sys.exit(main())
