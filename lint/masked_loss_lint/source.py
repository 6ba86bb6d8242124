# SPDX-License-Identifier: BSD-3-Clause
"""Source files: finding them, reading them, notebooks, and `# noqa` comments."""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

_SKIPPED = {"__pycache__", "node_modules", "site-packages", "venv", "build", "dist"}
_NOQA = re.compile(r"#\s*noqa(?P<codes>\s*:\s*[A-Z]+\d+(?:[\s,]+[A-Z]+\d+)*)?", re.IGNORECASE)
_MAGIC = re.compile(r"^\s*[%!?]|^\s*[\w.]+\?{1,2}\s*$")


class UnreadableError(Exception):
    """A file that cannot be read or parsed; the text says which and why."""


@dataclass
class Source:
    """One Python file, or all code cells of one notebook laid end to end."""

    path: Path
    text: str
    tree: ast.Module
    lines: list[str] = field(default_factory=list)
    cells: list[int] = field(default_factory=list)  # the first line of each code cell
    cell_numbers: list[int] = field(default_factory=list)
    encoding: str = "utf-8"

    def cell(self, line: int) -> tuple[int, int]:
        """The cell of a notebook that a line of `text` is in, and which of its lines it is."""
        if not self.cells:
            return 0, line
        index = max(i for i, first in enumerate(self.cells) if first <= line)
        return self.cell_numbers[index], line - self.cells[index] + 1

    def silences(self, line: int, last: int, code: str) -> bool:
        """True when a `# noqa` comment on the first or last line of a statement covers `code`."""
        for text in {self.lines[line - 1], self.lines[min(last, len(self.lines)) - 1]}:
            match = _NOQA.search(text)
            if match and (not match["codes"] or code in match["codes"].upper()):
                return True
        return False


def split(text: str) -> list[str]:
    """Lines as the Python parser counts them: a form feed, say, ends none."""
    return [line.decode() for line in text.encode().splitlines()] or [""]


def find(paths: Iterable[Path], exclude: Iterable[str] = ()) -> Iterator[Path]:
    """Every Python file and notebook under `paths`, once, in a fixed order."""
    patterns = list(exclude)
    seen: set[Path] = set()
    for path in paths:
        if path.is_file():
            candidates = [path]
        else:
            candidates = sorted([*path.rglob("*.py"), *path.rglob("*.ipynb")])
        for candidate in candidates:
            inside = candidate.relative_to(path).parts[:-1] if candidate != path else ()
            if any(part in _SKIPPED or part.startswith(".") for part in inside):
                continue
            if any(fnmatch(str(candidate), p) or fnmatch(candidate.name, p) for p in patterns):
                continue
            if candidate not in seen:
                seen.add(candidate)
                yield candidate


def read(path: Path) -> Source:
    """Reads and parses one file. Raises UnreadableError."""
    try:
        if path.suffix == ".ipynb":
            return _read_notebook(path)
        data = path.read_bytes()
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        text = data.decode(encoding)
        return Source(path, text, ast.parse(text), split(text), encoding=encoding)
    except SyntaxError as error:
        raise UnreadableError(f"{path}:{error.lineno or 1}: cannot parse: {error.msg}") from error
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise UnreadableError(f"{path}: cannot read: {error}") from error


def _read_notebook(path: Path) -> Source:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(notebook, dict):
        raise ValueError("not a notebook")
    lines: list[str] = []
    cells: list[int] = []
    numbers: list[int] = []
    for number, cell in enumerate(notebook.get("cells", []), start=1):
        if cell.get("cell_type") != "code":
            continue
        source = cell.get("source", "")
        code = _without_magics(source if isinstance(source, str) else "".join(source))
        try:
            ast.parse(code)
        except SyntaxError:
            continue  # a shell script, or a cell that was left unfinished
        cells.append(len(lines) + 1)
        numbers.append(number)
        lines += split(code)
    text = "\n".join(lines) + "\n"
    return Source(path, text, ast.parse(text), lines or [""], cells, numbers)


def _without_magics(code: str) -> str:
    """Replaces IPython magics by `pass`, so that line numbers stay as they are."""
    if code.lstrip().startswith("%%"):
        return "\n" * code.count("\n")
    kept = []
    for line in split(code):
        indent = line[: len(line) - len(line.lstrip())]
        kept.append(f"{indent}pass" if _MAGIC.match(line) else line)
    return "\n".join(kept)
