# SPDX-License-Identifier: BSD-3-Clause
"""Rewriting `size_average` and `reduce` in the source text, touching nothing else."""

from __future__ import annotations

import ast
from dataclasses import dataclass

from masked_loss.lint.torch_losses import LossSpec


@dataclass(frozen=True, order=True)
class Edit:
    """Replace the text from (line, column) to (end_line, end_column); columns count UTF-8 bytes."""

    line: int
    column: int
    end_line: int
    end_column: int
    text: str


def rewrite_legacy(spec: LossSpec, node: ast.Call, reduction: str | None) -> tuple[Edit, ...]:
    """Edits that put `reduction=` in place of the legacy arguments of a call.

    The first legacy argument becomes `reduction="..."` (or goes, if reduction is None), the other
    goes, and so does a `reduction` that PyTorch overrules. Positional arguments that follow one of
    them become keywords. Returns no edits for a call with * or ** arguments.
    """
    if any(isinstance(a, ast.Starred) for a in node.args) or any(not k.arg for k in node.keywords):
        return ()
    dropped = {"size_average", "reduce"} | ({"reduction"} if reduction else set())
    arguments: list[tuple[str, ast.expr | ast.keyword]] = [
        *zip(spec.parameters, node.args, strict=False),
        *((k.arg or "", k) for k in node.keywords),
    ]
    if len(node.args) > len(spec.parameters):
        return ()
    edits: list[Edit] = []
    placed = reduction is None
    shifted = False  # a positional argument before this one is gone
    for index, (name, argument) in enumerate(arguments):
        positional = index < len(node.args)
        if name in dropped:
            shifted |= positional
            if placed:
                edits.append(_removal(arguments, index, node))
            else:
                edits.append(_replacement(argument, f'reduction="{reduction}"'))
                placed = True
        elif positional and shifted:
            start = argument.lineno, argument.col_offset
            edits.append(Edit(*start, *start, f"{name}="))
    return tuple(edits)


def _replacement(node: ast.expr | ast.keyword, text: str) -> Edit:
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    return Edit(node.lineno, node.col_offset, node.end_lineno, node.end_col_offset, text)


def _removal(
    arguments: list[tuple[str, ast.expr | ast.keyword]], index: int, node: ast.Call
) -> Edit:
    """Removes an argument with the comma before it, or after it if it is the first."""
    here = _replacement(arguments[index][1], "")
    if index > 0:
        before = _replacement(arguments[index - 1][1], "")
        return Edit(before.end_line, before.end_column, here.end_line, here.end_column, "")
    if len(arguments) > 1:
        after = arguments[1][1]
        return Edit(here.line, here.column, after.lineno, after.col_offset, "")
    return here


def apply(text: str, edits: list[Edit]) -> str:
    """The text after all edits; they must not overlap."""
    lines = text.encode().splitlines(keepends=True)
    for edit in sorted(edits, reverse=True):
        head = lines[edit.line - 1][: edit.column]
        tail = lines[edit.end_line - 1][edit.end_column :]
        lines[edit.line - 1 : edit.end_line] = [head + edit.text.encode() + tail]
    return b"".join(lines).decode()
