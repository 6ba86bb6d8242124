# SPDX-License-Identifier: BSD-3-Clause
"""The command line: ``masked-loss-lint PATH ...``.

Exit status: 0 nothing found, 1 something found, 2 wrong use (with --strict, also a file that cannot
be read).
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from masked_loss_lint import Finding, Report, check
from masked_loss_lint.config import ConfigError, codes, read_config
from masked_loss_lint.output import FORMATS, statistics, summary
from masked_loss_lint.rules import RULES
from masked_loss_lint.source import find


def _codes(text: str) -> tuple[str, ...]:
    try:
        return codes(text.replace(" ", "").split(","))
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="masked-loss-lint",
        description="Finds losses that were reduced before their mask, and related mistakes.",
        epilog="\n".join(f"{code}  {text}" for code, text in RULES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="files and folders")
    parser.add_argument("--select", type=_codes, help="only these rules")
    parser.add_argument("--ignore", type=_codes, help="not these rules")
    parser.add_argument("--exclude", action="append", default=[], metavar="GLOB")
    parser.add_argument("--format", choices=FORMATS, default="text")
    parser.add_argument(
        "--fix", action="store_true", help="rewrite what ML002 finds (needs libcst)"
    )
    parser.add_argument("--statistics", action="store_true", help="count the findings of each rule")
    parser.add_argument("--strict", action="store_true", help="fail where a file cannot be read")
    parser.add_argument("--verbose", action="store_true", help="name what was not understood")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    errors = [f"{path}: no such file or folder" for path in arguments.paths if not path.exists()]
    try:
        config = read_config(arguments.paths)
    except ConfigError as error:
        errors.append(str(error))
    for text in errors:
        print(f"error: {text}", file=sys.stderr)
    if errors:
        return 2
    config = replace(
        config,
        select=arguments.select or config.select,
        ignore=arguments.ignore or config.ignore,
        exclude=(*config.exclude, *arguments.exclude),
    )
    collecting = gc.isenabled()
    gc.disable()  # what is made lives until the end
    try:
        report = check(find(arguments.paths, config.exclude), config.codes)
    finally:
        if collecting:
            gc.enable()
    return _print(arguments, report)


def _print(arguments: argparse.Namespace, report: Report) -> int:
    fixed, errors = 0, list(report.unreadable)
    if arguments.fix:
        before = len(report.findings)
        try:
            report.findings = _fixed(report.findings, errors)
        except ModuleNotFoundError:
            print("error: --fix needs libcst: pip install libcst", file=sys.stderr)
            return 2
        fixed = before - len(report.findings)
    for text in errors:
        print(f"error: {text}", file=sys.stderr)
    if arguments.verbose:
        for text in report.unclear:
            print(f"note: {text}", file=sys.stderr)
    printed = FORMATS[arguments.format](report.findings)
    if printed:
        print(printed)
    if arguments.statistics and report.findings:
        print(statistics(report.findings), file=sys.stderr)
    unread = len(report.unreadable)
    print(summary(report.findings, report.files, fixed, unread), file=sys.stderr)
    if len(errors) > unread or (unread and arguments.strict):
        return 2
    return 1 if report.findings else 0


def _fixed(findings: list[Finding], errors: list[str]) -> list[Finding]:
    """Writes the repaired files; returns the findings that remain."""
    from masked_loss_lint.fix import fix

    remaining = list(findings)
    for path in dict.fromkeys(f.place.path for f in findings if f.fixable):
        own = [f for f in findings if f.fixable and f.place.path == path]
        try:
            done = fix(Path(path), {(f.place.line, f.place.column) for f in own})
        except OSError as error:
            errors.append(f"{path}: cannot write: {error}")
            continue
        if done == len(own):
            remaining = [f for f in remaining if f not in own]
    return remaining


if __name__ == "__main__":
    sys.exit(main())
