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
_RELEVANT = "loss", "entropy", "criteri", "nll", "kl_div", "accum", "size_average"
_FILL = re.compile(
    r"(?:fill_?|full|full_like|where|pad)\([^=]{0,80}?, *(-\d+|\w*(?:ignore|pad)\w*)\s*[,)]"
    r"|(?:\] *|value *|^[\w. ]*ignore\w* *|label_pad_token_id *)= *(-\d+|[\w.]*(?:ignore|pad)\w*)",
    re.IGNORECASE | re.MULTILINE,
)
_SHORT = 6  # lines of a function; what is longer and says nothing of losses is not looked at
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


class UnreadableError(Exception):
    """A file that cannot be read or parsed; the text says which and why."""


@dataclass
class Source:
    """One Python file, or all code cells of one notebook laid end to end."""

    path: Path
    text: str
    tree: ast.Module
    cells: list[tuple[int, int]] = field(default_factory=list)  # their first lines and numbers

    def __post_init__(self) -> None:
        self.imports: list[tuple[str, int]] = []  # dotted names, and their levels
        self.definitions: dict[tuple[int, int], FunctionNode] = {}
        self._lines = split(self.text)
        self._ascii = self.text.isascii()
        self.relevant = is_relevant(self.text)
        self.silenced = self._silenced()
        for node in statements(self.tree):
            if isinstance(node, ast.Import):
                self.imports += [(alias.name, 0) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module or ''}.{a.name}".lstrip(".") for a in node.names]
                self.imports += [(name, node.level) for name in (node.module or "", *names)]
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                self.definitions[node.lineno, node.col_offset] = node
                lines = self._lines[node.lineno - 1 : node.end_lineno]
                if (
                    len(lines) > _SHORT
                    and node.name != "__init__"
                    and not is_relevant("\n".join(lines))
                ):
                    node.body = [ast.Return(ast.JoinedStr([]))]  # something unknown

    def place(self, node: ast.expr | ast.stmt) -> Place:
        line, column = node.lineno, node.col_offset
        lines = (line, node.end_lineno or line)
        if not self._ascii:  # the tree counts bytes
            column = len(self._lines[line - 1].encode()[:column].decode(errors="ignore"))
        cell = 0
        if self.cells:
            first, cell = self.cells[bisect_right(self.cells, (line, len(self.text))) - 1]
            line -= first - 1
        return Place(str(self.path), cell, line, column + 1, lines)

    def _silenced(self) -> dict[int, str]:
        """The lines with a `# noqa` comment, and the codes it names ("": all)."""
        if "noqa" not in self.text.lower():
            return {}
        matches = ((n, _NOQA.search(line)) for n, line in enumerate(self._lines, start=1))
        return {number: (match["codes"] or "").upper() for number, match in matches if match}


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    """All statements in it, and the branches of `try` and `match`."""
    pending = [tree]
    while pending:
        node = pending.pop()
        yield node
        for part in ("body", "handlers", "orelse", "finalbody", "cases"):
            children = getattr(node, part, ())
            pending += children if isinstance(children, list) else ()


def is_relevant(text: str) -> bool:
    """Whether a file may have something to report."""
    text = text.lower()
    return any(word in text for word in _RELEVANT) or ("sum(" in text and "mask" in text)


def fills(text: str) -> frozenset[object]:
    """The negative constants that are put in the place of labels; "any": a name of one."""
    found = (name for pair in _FILL.findall(text) for name in pair if name)
    return frozenset(int(name) if name[0] == "-" else "any" for name in found)


def split(text: str) -> list[str]:
    """Lines as the Python parser counts them: a form feed, say, ends none."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


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
    except (AttributeError, KeyError, TypeError) as error:
        raise UnreadableError(f"{path}: cannot read: not a notebook") from error


def _read_notebook(path: Path) -> Source:
    lines: list[str] = []
    cells: list[tuple[int, int]] = []
    for number, cell in enumerate(_cells(json.loads(path.read_text(encoding="utf-8"))), start=1):
        if cell.get("cell_type") != "code":
            continue
        source = cell["source"] if "source" in cell else cell["input"]  # input: nbformat 3
        source = "".join(source) if isinstance(source, list) else source
        code = _without_magics(source)
        try:
            ast.parse(code)
        except SyntaxError:
            continue  # a shell script, or a cell that was left unfinished
        cells.append((len(lines) + 1, number))
        lines += split(code)
    text = "\n".join(lines) + "\n"
    return Source(path, text, ast.parse(text), cells)


def _cells(notebook: Any) -> list[Any]:
    """The cells of a notebook; nbformat 3 has them in worksheets."""
    return [cell for sheet in notebook.get("worksheets", [notebook]) for cell in sheet["cells"]]


def _without_magics(code: str) -> str:
    """Replaces IPython magics by `pass`, so that line numbers stay as they are."""
    if code.lstrip().startswith("%%"):
        return "\n" * code.count("\n")
    kept = []
    for line in split(code):
        indent = line[: len(line) - len(line.lstrip())]
        kept.append(f"{indent}pass" if _MAGIC.match(line) else line)
    return "\n".join(kept)
