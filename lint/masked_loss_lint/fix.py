# SPDX-License-Identifier: BSD-3-Clause
"""Rewriting `size_average` and `reduce` in the source text, touching nothing else.

Where an argument begins and ends is read from the tokens, since the syntax tree knows neither
parentheses nor commas. A file is only written when its new text parses to exactly what the fixes
mean; in doubt a call is left as it is.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from masked_loss_lint.source import Source
from masked_loss_lint.torch_losses import LossSpec

_OPENING, _CLOSING = frozenset("([{"), frozenset(")]}")


@dataclass(frozen=True, order=True)
class Edit:
    """Replace text[start:end]."""

    start: int
    end: int
    text: str


@dataclass(frozen=True)
class Fix:
    """A call, the arguments it is to have, and the edits that give it these."""

    call: ast.Call
    args: tuple[ast.expr, ...]
    keywords: tuple[ast.keyword, ...]
    edits: tuple[Edit, ...]


def rewrite_legacy(
    spec: LossSpec, call: ast.Call, reduction: str | None, source: Source
) -> Fix | None:
    """Puts `reduction=` in place of the legacy arguments of a call.

    The first legacy argument becomes `reduction="..."` (or goes, if reduction is None), the other
    goes, and so does a `reduction` that PyTorch overrules. Positional arguments that follow one of
    them become keywords. None for a call with * or ** arguments, one that is not written in this
    file as it stands (arguments of a functools.partial), or one whose comments would be lost.
    """
    if any(isinstance(a, ast.Starred) for a in call.args) or any(not k.arg for k in call.keywords):
        return None
    if len(call.args) > len(spec.parameters) or not _is_written_in(call, source):
        return None
    layout = _layout(call, source.text)
    if layout is None:
        return None
    dropped = {"size_average", "reduce"} | ({"reduction"} if reduction else set())
    args: list[ast.expr] = []
    keywords: list[ast.keyword] = []
    texts: list[str | None] = []  # of each argument; None: it goes
    placed = reduction is None
    named: list[tuple[str, ast.expr | ast.keyword]] = [
        *zip(spec.parameters, call.args, strict=False),
        *((k.arg or "", k) for k in call.keywords),
    ]
    for (name, node), span in zip(named, layout.arguments, strict=True):
        text = source.text[span.start : span.stop]
        if name in dropped:
            texts.append(None if placed else f'reduction="{reduction}"')
            if not placed:
                keywords.append(ast.keyword(arg="reduction", value=ast.Constant(reduction)))
            placed = True
        elif isinstance(node, ast.keyword):
            texts.append(text)
            keywords.append(node)
        elif len(texts) > len(args):  # a positional argument before this one is gone
            texts.append(f"{name}={text}")
            keywords.append(ast.keyword(arg=name, value=node))
        else:
            texts.append(text)
            args.append(node)
    edits = _edits(layout, texts, source.text)
    return Fix(call, tuple(args), tuple(keywords), tuple(edits)) if edits else None


def _edits(layout: _Layout, texts: list[str | None], text: str) -> list[Edit]:
    """What gives the arguments these texts; nothing if a comment would be lost."""
    deletions = list(_deletions(layout, [new is None for new in texts]))
    if any(span.start <= comment < span.stop for span in deletions for comment in layout.comments):
        return []
    pairs = zip(layout.arguments, texts, strict=True)
    return [Edit(span.start, span.stop, "") for span in deletions] + [
        Edit(span.start, span.stop, new)
        for span, new in pairs
        if new is not None and new != text[span.start : span.stop]
    ]


def apply(source: Source, fixes: Sequence[Fix]) -> str | None:
    """The text after all fixes, or None if it would not mean exactly what they say."""
    edits = sorted(edit for fix in fixes for edit in fix.edits)
    if any(after.start < before.end for before, after in pairwise(edits)):
        return None
    text = source.text
    for edit in reversed(edits):
        text = text[: edit.start] + edit.text + text[edit.end :]
    try:
        return text if ast.dump(ast.parse(text)) == _dump_fixed(source.tree, fixes) else None
    except (SyntaxError, ValueError, RecursionError):
        return None


def _dump_fixed(tree: ast.Module, fixes: Sequence[Fix]) -> str:
    """What the tree is when the calls have the arguments that the fixes give them."""
    before = [(fix.call, fix.call.args, fix.call.keywords) for fix in fixes]
    try:
        for fix in fixes:
            fix.call.args, fix.call.keywords = list(fix.args), list(fix.keywords)
        return ast.dump(tree)
    finally:
        for call, args, keywords in before:
            call.args, call.keywords = args, keywords


def _is_written_in(call: ast.Call, source: Source) -> bool:
    return any(node is call for node in ast.walk(source.tree))


# Where the arguments of a call are


@dataclass(frozen=True)
class _Layout:
    """Offsets in the text: of each argument with its parentheses, of commas and comments."""

    arguments: list[range]
    commas: list[range]  # after each argument, the last one's only if it is there
    comments: list[int]
    ends: list[int]  # of all commas and comments


@dataclass(frozen=True)
class _Token:
    text: str
    start: int
    end: int


def _layout(call: ast.Call, text: str) -> _Layout | None:
    """None where the tokens and the syntax tree tell different stories."""
    try:
        tokens = _tokens(text)
    except (tokenize.TokenError, SyntaxError):
        return None
    whole = _span(call, text)
    inner = _between_parentheses([t for t in tokens if whole.start <= t.start < whole.stop])
    pieces: list[list[_Token]] = [[]]
    commas: list[_Token] = []
    comments: list[_Token] = []
    depth = 0
    for token in inner:
        depth += (token.text in _OPENING) - (token.text in _CLOSING)
        if token.text.startswith("#"):
            comments.append(token)
        elif token.text == "," and depth == 0:
            commas.append(token)
            pieces.append([])
        else:
            pieces[-1].append(token)
    if not pieces[-1]:
        pieces.pop()
    arguments = [range(p[0].start, p[-1].end) for p in pieces if p]
    written: list[ast.expr | ast.keyword] = [*call.args, *call.keywords]
    nodes = [_span(node, text) for node in written]
    if len(arguments) != len(pieces) or len(arguments) != len(nodes):
        return None
    for argument, node in zip(arguments, nodes, strict=True):
        if not argument.start <= node.start < node.stop <= argument.stop:
            return None
    return _Layout(
        arguments,
        [range(c.start, c.end) for c in commas],
        [c.start for c in comments],
        sorted(t.end for t in (*commas, *comments)),
    )


@lru_cache(maxsize=1)
def _tokens(text: str) -> list[_Token]:
    if re.search("\r(?!\n)", text):
        raise SyntaxError("tokenize does not end a line at a lone carriage return, ast does")
    starts = _line_starts(text)
    return [
        _Token(token.string, starts[token.start[0] - 1] + token.start[1], starts[end - 1] + column)
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        for end, column in [token.end]
        if token.string.strip()
    ]


def _span(node: ast.expr | ast.keyword, text: str) -> range:
    """Where a node is, in characters; the tree counts the UTF-8 bytes of each line."""
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    starts = _line_starts(text)
    first, last = starts[node.lineno - 1], starts[node.end_lineno - 1]
    head = text[first : first + node.col_offset].encode()[: node.col_offset]
    tail = text[last : last + node.end_col_offset].encode()[: node.end_col_offset]
    return range(first + len(head.decode()), last + len(tail.decode()))


@lru_cache(maxsize=1)
def _line_starts(text: str) -> list[int]:
    starts = [0]
    for line in io.StringIO(text):
        starts.append(starts[-1] + len(line))
    return starts


def _between_parentheses(tokens: list[_Token]) -> list[_Token]:
    """The tokens between a call's last parenthesis and the one that opens it."""
    depth = 0
    for index in reversed(range(len(tokens))):
        depth += (tokens[index].text in _CLOSING) - (tokens[index].text in _OPENING)
        if depth == 0:
            return tokens[index + 1 : -1]
    return []


def _deletions(layout: _Layout, gone: list[bool]) -> Iterator[range]:
    """The text to delete, with the commas that are then too many."""
    arguments, commas = layout.arguments, layout.commas
    index = 0
    while index < len(gone):
        first = index
        while index < len(gone) and gone[index]:
            index += 1
        if first == index:
            index += 1
        elif index < len(gone):
            yield range(arguments[first].start, arguments[index].start)
        else:
            yield _last_ones(layout, first, trailing=len(commas) == len(arguments))


def _last_ones(layout: _Layout, first: int, trailing: bool) -> range:
    """Arguments at the end: one comma goes with them, and a comment before them stays."""
    start = layout.arguments[first].start
    end = layout.commas[-1].stop if trailing else layout.arguments[-1].stop
    if first == 0:
        return range(start, end)
    comma = layout.commas[first - 1]
    before = max(e for e in layout.ends if e <= start)
    return range(before if trailing or before > comma.stop else comma.start, end)
