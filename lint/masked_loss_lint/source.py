# SPDX-License-Identifier: BSD-3-Clause
"""Source files: finding them, reading them, notebooks, and `# noqa` comments."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import tokenize
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from masked_loss_lint.values import Place

_SKIPPED = {"__pycache__", "node_modules", "site-packages", "venv", "build", "dist"}
_NOQA = re.compile(r"#\s*noqa(?P<codes>\s*:\s*[A-Z]+\d+(?:[\s,]+[A-Z]+\d+)*)?", re.IGNORECASE)
_MAGIC = re.compile(r"^\s*[%!?]|^\s*[\w.]+\?{1,2}\s*$")
# A file without any of these has nothing to report; its names are looked up when others ask.
_RELEVANT = re.compile(r"loss|entropy|criteri|nll|kl_div|accum|size_average", re.IGNORECASE)


class UnreadableError(Exception):
    """A file that cannot be read or parsed; the text says which and why."""


@dataclass
class Source:
    """One Python file, or all code cells of one notebook laid end to end."""

    path: Path
    text: str
    tree: ast.Module
    cells: list[int] = field(default_factory=list)  # the first line of each code cell
    cell_numbers: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._name = str(self.path)
        lines = split(self.text)
        self.ascii_lines = lines if self.text.isascii() else []
        self._lines = [] if self.ascii_lines else lines

    @property
    def relevant(self) -> bool:
        averages = "sum(" in self.text and "mask" in self.text
        return averages or _RELEVANT.search(self.text) is not None

    def place(self, node: ast.expr | ast.stmt) -> Place:
        line, column = node.lineno, node.col_offset
        lines = (line, node.end_lineno or line)
        if self._lines:  # the tree counts bytes
            column = len(self._lines[line - 1].encode()[:column].decode(errors="ignore"))
        if not self.cells:
            return Place(self._name, 0, line, column + 1, lines)
        index = bisect_right(self.cells, line) - 1
        return Place(
            self._name, self.cell_numbers[index], line - self.cells[index] + 1, column + 1, lines
        )

    def segment(self, node: ast.expr) -> str:
        """The text of an expression of one line, "" for others."""
        if node.lineno != node.end_lineno or not self.ascii_lines:
            return ""
        return self.ascii_lines[node.lineno - 1][node.col_offset : node.end_col_offset]

    def imports(self) -> list[tuple[str, int]]:
        """The dotted names that are imported anywhere in it, with their levels."""
        found: list[tuple[str, int]] = []
        pending: list[Any] = [self.tree]
        while pending:
            node = pending.pop()
            if isinstance(node, ast.Import):
                found += [(alias.name, 0) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                found.append((node.module or "", node.level))
                inside = f"{node.module}." if node.module else ""
                found += [(inside + alias.name, node.level) for alias in node.names]
            else:
                for name in ("body", "handlers", "orelse", "finalbody", "cases"):
                    children = getattr(node, name, ())
                    if isinstance(children, list):
                        pending += children
        return found

    def silenced(self) -> dict[int, str]:
        """The lines with a `# noqa` comment, and the codes it names ("": all)."""
        if "noqa" not in self.text.lower():
            return {}
        matches = ((n, _NOQA.search(line)) for n, line in enumerate(split(self.text), start=1))
        return {number: (match["codes"] or "").upper() for number, match in matches if match}


def split(text: str) -> list[str]:
    """Lines as the Python parser counts them: a form feed, say, ends none."""
    return [line.decode() for line in text.encode().splitlines()] or [""]


def find(paths: Iterable[Path], exclude: Iterable[str] = ()) -> Iterator[Path]:
    """Every Python file and notebook under `paths`, once, in a fixed order."""
    patterns = list(exclude)
    found = dict.fromkeys(file for path in paths for file in _inside(path))
    for file in found:
        if not any(fnmatch(str(file), p) or fnmatch(file.name, p) for p in patterns):
            yield file


def _inside(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    for folder, folders, files in os.walk(path):
        folders[:] = sorted(f for f in folders if f not in _SKIPPED and not f.startswith("."))
        names = (name for name in sorted(files) if name.endswith((".py", ".ipynb")))
        yield from (Path(folder, name) for name in names if os.path.isfile(f"{folder}/{name}"))


def read(path: Path) -> Source:
    """Reads and parses one file. Raises UnreadableError."""
    try:
        if path.suffix == ".ipynb":
            return _read_notebook(path)
        data = path.read_bytes()
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        text = data.decode(encoding)
        return Source(path, text, ast.parse(text))
    except SyntaxError as error:
        raise UnreadableError(f"{path}:{error.lineno or 1}: cannot parse: {error.msg}") from error
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise UnreadableError(f"{path}: cannot read: {error}") from error


def _read_notebook(path: Path) -> Source:
    lines: list[str] = []
    cells: list[int] = []
    numbers: list[int] = []
    for number, cell in enumerate(_cells(json.loads(path.read_text(encoding="utf-8"))), start=1):
        if cell.get("cell_type") != "code":
            continue
        source = cell.get("source", cell.get("input", ""))  # input: nbformat 3
        if isinstance(source, list) and all(isinstance(line, str) for line in source):
            source = "".join(source)
        if not isinstance(source, str):
            raise ValueError(f"not a notebook: cell {number} has no source")
        code = _without_magics(source)
        try:
            ast.parse(code)
        except SyntaxError:
            continue  # a shell script, or a cell that was left unfinished
        cells.append(len(lines) + 1)
        numbers.append(number)
        lines += split(code)
    text = "\n".join(lines) + "\n"
    return Source(path, text, ast.parse(text), cells, numbers)


def _cells(notebook: object) -> list[dict[str, Any]]:
    """The cells of a notebook; nbformat 3 has them in worksheets."""
    sheets = notebook.get("worksheets", [notebook]) if isinstance(notebook, dict) else None
    if not isinstance(sheets, list) or not all(isinstance(sheet, dict) for sheet in sheets):
        raise ValueError("not a notebook")
    groups = [sheet.get("cells", []) for sheet in sheets]
    if not all(isinstance(group, list) for group in groups):
        raise ValueError("not a notebook")
    cells = [cell for group in groups for cell in group]
    if not all(isinstance(cell, dict) for cell in cells):
        raise ValueError("not a notebook: a cell is no object")
    return cells


def _without_magics(code: str) -> str:
    """Replaces IPython magics by `pass`, so that line numbers stay as they are."""
    if code.lstrip().startswith("%%"):
        return "\n" * code.count("\n")
    kept = []
    for line in split(code):
        indent = line[: len(line) - len(line.lstrip())]
        kept.append(f"{indent}pass" if _MAGIC.match(line) else line)
    return "\n".join(kept)
