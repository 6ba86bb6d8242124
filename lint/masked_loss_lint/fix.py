# SPDX-License-Identifier: BSD-3-Clause
"""Rewriting `size_average` and `reduce` in the source text, touching nothing else."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Collection
from itertools import pairwise
from pathlib import Path

from masked_loss_lint.torch_losses import SPECS, legacy_reduction
from masked_loss_lint.values import Place

_LOSSES = {spec.name: spec for spec in reversed(SPECS.values())}  # torch's first
_OLD = ("size_average", "reduce")
_NO_VALUE = (tokenize.NL, tokenize.COMMENT)


def fix(path: Path, places: Collection[Place]) -> set[Place]:
    """Rewrites the calls that begin at these places of a file; returns those that could be.

    The first legacy argument becomes `reduction="..."` (or goes, where None is all it said), the
    other goes, and so does a `reduction` that PyTorch overrules; positional arguments after one of
    them become keywords. A call whose comments would be lost is left as it is.
    """
    data, done = path.read_bytes(), set()
    encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
    text = data.decode(encoding)
    for place in sorted(places, reverse=True):  # a call inside another begins after it
        try:
            changed = _rewritten(text, (place.line, place.column - 1))
            compile(changed, path, "exec")
        except (SyntaxError, ValueError):  # or a flag that is no constant
            continue
        if changed != text and changed.count("#") == text.count("#"):
            text = changed
            done.add(place)
    if done:
        path.write_bytes(text.encode(encoding))
    return done


def _rewritten(text: str, place: tuple[int, int]) -> str:
    """The text with one call rewritten: its tokens, cut at the commas between its arguments."""
    # The last token is in a line of its own, also where no newline ends the one before.
    lines = [0, *(found.end() for found in re.finditer(r"\r\n|\r|\n", text)), len(text)]
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
    arguments: list[tuple[str, list[str]]] = []  # names; what is before, `name=`, value, after
    for kind, string, here, end in call[start + 1 :]:
        if kind == tokenize.OP:
            depth += (string in "([{") - (string in ")]}")
        if depth > 1 or (depth and string != ","):
            inside += [] if kind in _NO_VALUE else [(string, here, end)]
            continue
        named = [string for string, *_ in inside[1:2]] == ["="]
        position = parameters.get(len(arguments), "") if inside else ""  # else the last comma's end
        name = inside[0][0] if named else position
        first, last = (inside[0][1], inside[-1][2]) if inside else (here, here)
        cuts = [begin, first, inside[2][1] if named else first, last, here]
        arguments.append((name, [text[a:b] for a, b in pairwise(cuts)]))
        begin, inside = end, []
        if not depth:
            break
    return text[: call[start][3]] + ",".join(_arguments(arguments)) + text[here:]


def _at(lines: list[int], place: tuple[int, int]) -> int:
    return lines[place[0] - 1] + place[1]


def _arguments(given: list[tuple[str, list[str]]]) -> list[str]:
    """The arguments, with `reduction=` in the place of the legacy pair."""
    values = {name: parts[2] for name, parts in given}
    # In brackets, since a value may go on in the next line; a comment in it ends with that.
    flags = [ast.literal_eval(f"({values.get(name)}\n)") for name in _OLD]
    reduction = None if flags == [None, None] else legacy_reduction(*flags)
    placed, moved, comment, end = reduction is None, False, "", ""
    kept: list[str] = []
    for name, (before, keyword, value, after) in given:
        before = comment + before if kept else given[0][1][0]
        comment = end = ""
        if name in _OLD or (name == "reduction" and reduction is not None):
            moved = True
            if placed:  # it goes, but for a comment before it, which is one on the last argument
                comment, end = before.rstrip(), after
                continue
            placed, keyword, value = True, "reduction=", f'"{reduction}"'
        elif moved and name and not keyword:
            keyword = f"{name}="
        kept.append(before + keyword + value + after)
    return [*kept[:-1], kept[-1] + comment + end] if kept else []
