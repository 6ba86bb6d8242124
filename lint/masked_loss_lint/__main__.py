# SPDX-License-Identifier: BSD-3-Clause
"""The command line: ``masked-loss-lint PATH ...``.

Exit status: 0 nothing found, 1 something found, 2 wrong use, or something could not be read.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from masked_loss_lint import check, fix
from masked_loss_lint.output import FORMATS, summary
from masked_loss_lint.rules import RULES, SUMMARIES, Finding
from masked_loss_lint.source import Source, UnreadableError, find, read


def _codes(text: str) -> list[str]:
    """Rule codes from ML001,ML003; a prefix such as ML stands for all it begins."""
    codes: list[str] = []
    for part in text.replace(" ", "").upper().split(","):
        matching = [code for code in RULES if part and code.startswith(part)]
        if not matching:
            raise argparse.ArgumentTypeError(f"no rule {part!r}; there are {', '.join(RULES)}")
        codes += matching
    return codes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="masked-loss-lint",
        description="Finds losses that were reduced before their mask, and related mistakes.",
        epilog="\n".join(f"{code}  {text}" for code, text in SUMMARIES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="files and folders")
    parser.add_argument("--select", type=_codes, default=list(RULES), help="only these rules")
    parser.add_argument("--ignore", type=_codes, default=[], help="not these rules")
    parser.add_argument("--exclude", action="append", default=[], metavar="GLOB")
    parser.add_argument("--format", choices=FORMATS, default="text")
    parser.add_argument("--fix", action="store_true", help="rewrite what ML002 finds")
    return parser


def _apply_fixes(
    sources: list[Source], findings: list[Finding], errors: list[str]
) -> list[Finding]:
    """Writes the repaired files; returns the findings that remain."""
    remaining = [f for f in findings if f.fix is None]
    for source in sources:
        own = [f for f in findings if f.place.source is source]
        fixes = [f.fix for f in own if f.fix is not None]
        repaired = fix.apply(source, fixes) if fixes else None
        try:
            if repaired is not None:
                source.path.write_bytes(repaired.encode(source.encoding))
                continue
        except OSError as error:
            errors.append(f"{source.path}: cannot write: {error}")
        remaining += [replace(f, fix=None) for f in own if f.fix is not None]
    return sorted(remaining)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    missing = [path for path in arguments.paths if not path.exists()]
    for path in missing:
        print(f"error: {path}: no such file or folder", file=sys.stderr)
    if missing:
        return 2

    collecting = gc.isenabled()
    gc.disable()  # syntax trees are many small objects that all live until the end
    try:
        return _run(arguments)
    finally:
        if collecting:
            gc.enable()


def _run(arguments: argparse.Namespace) -> int:
    errors: list[str] = []
    sources: list[Source] = []
    for path in find(arguments.paths, arguments.exclude):
        try:
            sources.append(read(path))
        except UnreadableError as error:
            errors.append(str(error))

    codes = [code for code in arguments.select if code not in arguments.ignore]
    findings = check(sources, codes, errors.append)
    fixed = 0
    if arguments.fix:
        found = len(findings)
        findings = _apply_fixes(sources, findings, errors)
        fixed = found - len(findings)

    for text in errors:
        print(f"error: {text}", file=sys.stderr)
    report = FORMATS[arguments.format](findings)
    if report:
        print(report)
    print(summary(findings, len(sources), fixed), file=sys.stderr)
    if errors:
        return 2
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
