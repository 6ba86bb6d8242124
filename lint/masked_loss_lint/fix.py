# SPDX-License-Identifier: BSD-3-Clause
"""Rewriting `size_average` and `reduce` in the source text, touching nothing else."""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Collection
from itertools import pairwise
from pathlib import Path

from masked_loss_lint.torch_losses import SPECS, legacy_reduction

_LOSSES = {spec.name: spec for spec in reversed(SPECS.values())}  # torch's first
_OLD = ("size_average", "reduce")
_FLAGS = {"None": None, "False": False, "0": False}
_NO_VALUE = (tokenize.NL, tokenize.COMMENT)


def fix(path: Path, places: Collection[tuple[int, int]]) -> int:
    """Rewrites the calls that begin at these lines and columns; returns how many could be.

    The first legacy argument becomes `reduction="..."` (or goes, where None is all it said), the
    other goes, and so does a `reduction` that PyTorch overrules; positional arguments after one of
    them become keywords. A call whose comments would be lost is left as it is.
    """
    data, count = path.read_bytes(), 0
    encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
    text = data.decode(encoding)
    for line, column in sorted(places, reverse=True):  # a call inside another begins after it
        changed = _rewritten(text, (line, column - 1))
        try:
            compile(changed, path, "exec")
        except SyntaxError:
            continue
        if changed != text and changed.count("#") == text.count("#"):
            text, count = changed, count + 1
    if count:
        path.write_bytes(text.encode(encoding))
    return count


def _rewritten(text: str, place: tuple[int, int]) -> str:
    """The text with one call rewritten: its tokens, cut at the commas between its arguments."""
    lines = [0, *(found.end() for found in re.finditer(r"\r\n|\r|\n", text))]
    tokens = tokenize.generate_tokens(io.StringIO(text, newline="").readline)
    call = [(t.type, t.string, _at(lines, t.start), _at(lines, t.end)) for t in tokens]
    call = [token for token in call if token[2] >= _at(lines, place)]  # what begins before it goes
    names = [n for n, (kind, *_) in enumerate(call) if kind == tokenize.NAME]
    start = next(n for n, (_, string, *_) in enumerate(call) if string == "(" and n > names[0])
    spec = _LOSSES.get(next(call[n][1] for n in reversed(names) if n < start))
    if spec is None:
        return text  # the loss goes by another name here
    parameters = dict(enumerate(spec.parameters))
    begin, depth = call[start][3], 1
    inside: list[tuple[str, int, int]] = []  # the tokens of one argument, where they begin and end
    arguments: list[tuple[str, list[str]]] = []  # names; what is before, the value, what is after
    for kind, string, here, end in call[start + 1 :]:
        if kind == tokenize.OP:
            depth += (string in "([{") - (string in ")]}")
        if depth > 1 or (depth and string != ","):
            inside += [] if kind in _NO_VALUE else [(string, here, end)]
            continue
        named = [string for string, *_ in inside[1:2]] == ["="]
        position = parameters.get(len(arguments), "") if inside else ""  # else the last comma's end
        name = inside[0][0] if named else position
        cuts = [begin, inside[0][1], inside[-1][2], here] if inside else [begin, here, here, here]
        arguments.append((name, [text[a:b] for a, b in pairwise(cuts)]))
        begin, inside = end, []
        if not depth:
            break
    return text[: call[start][3]] + ",".join(_arguments(arguments)) + text[here:]


def _at(lines: list[int], place: tuple[int, int]) -> int:
    return lines[place[0] - 1] + place[1]


def _arguments(given: list[tuple[str, list[str]]]) -> list[str]:
    """The arguments, with `reduction=` in the place of the legacy pair."""
    values = {name: value.rpartition("=")[2].strip(" ()") for name, (_, value, _) in given}
    flags = [_FLAGS.get(values.get(name, "None"), True) for name in _OLD]
    reduction = None if flags == [None, None] else legacy_reduction(*flags)
    placed, moved, comment, end = reduction is None, False, "", ""
    kept: list[str] = []
    for name, (before, value, after) in given:
        before = comment + before if kept else given[0][1][0]
        comment = end = ""
        if name in _OLD or (name == "reduction" and reduction is not None):
            moved = True
            if placed:  # it goes, but for a comment before it, which is one on the last argument
                comment, end = before.rstrip(), after
                continue
            placed, value = True, f'reduction="{reduction}"'
        elif moved and name and not re.match(rf"{name}\s*=", value):
            value = f"{name}={value}"
        kept.append(before + value + after)
    return [*kept[:-1], kept[-1] + comment + end] if kept else []
