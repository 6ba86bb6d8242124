# SPDX-License-Identifier: BSD-3-Clause
"""Rewriting `size_average` and `reduce` in the source text, touching nothing else. Needs libcst."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import libcst as cst
from libcst.metadata import MetadataWrapper, PositionProvider

from masked_loss_lint.torch_losses import SPECS, LossSpec, legacy_reduction

_OLD = ("size_average", "reduce")


def fix(path: Path, places: Collection[tuple[int, int]]) -> int:
    """Rewrites the calls that begin at these lines and columns; returns how many could be.

    The first legacy argument becomes `reduction="..."` (or goes, where None is all it said), the
    other goes, and so does a `reduction` that PyTorch overrules; positional arguments after one of
    them become keywords. A call whose comments would be lost is left as it is.
    """
    module = cst.parse_module(path.read_bytes())
    rewriter = _Rewriter(places)
    changed = MetadataWrapper(module).visit(rewriter)
    if rewriter.count:
        path.write_bytes(changed.bytes)
    return rewriter.count


class _Rewriter(cst.CSTTransformer):
    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self, places: Collection[tuple[int, int]]) -> None:
        super().__init__()
        self._places = frozenset(places)
        self.count = 0

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.Call:  # noqa: N802
        start = self.get_metadata(PositionProvider, original_node).start
        if (start.line, start.column + 1) not in self._places:
            return updated_node
        changed = _rewritten(updated_node)
        self.count += changed is not None
        return changed or updated_node


def _spec(call: cst.Call) -> LossSpec | None:
    """The loss by its last name; the linter has found out that it is one."""
    name = call.func.attr if isinstance(call.func, cst.Attribute) else call.func
    found = [s for s in SPECS.values() if isinstance(name, cst.Name) and s.name == name.value]
    return found[0] if found else None


def _rewritten(call: cst.Call) -> cst.Call | None:
    spec = _spec(call)
    if spec is None:
        return None
    names = [a.keyword.value if a.keyword else spec.parameters[i] for i, a in enumerate(call.args)]
    flags = [_constant(call.args[names.index(n)].value) if n in names else None for n in _OLD]
    reduction = None if flags == [None, None] else legacy_reduction(*flags)
    kept: list[cst.Arg] = []
    placed, moved = reduction is None, False
    for name, argument in zip(names, call.args, strict=True):
        if name in _OLD or (name == "reduction" and reduction is not None):
            if placed and "#" in cst.Module([]).code_for_node(argument):
                return None  # its comment would be lost
            if not placed:
                value = cst.SimpleString(f'"{reduction}"')
                kept.append(argument.with_changes(value=value, **_keyword("reduction")))
            placed, moved = True, True
        elif moved and argument.keyword is None:
            if isinstance(argument.value, cst.NamedExpr) and not argument.value.lpar:
                return None
            kept.append(argument.with_changes(**_keyword(name)))
        else:
            kept.append(argument)
    if kept and kept[-1].comma is not call.args[-1].comma:
        comma = _last_comma(kept[-1].comma, call.args[-1].comma)
        if comma is None:
            return None
        space = call.args[-1].whitespace_after_arg
        kept[-1] = kept[-1].with_changes(comma=comma, whitespace_after_arg=space)
    return call.with_changes(args=kept)


def _last_comma(own: Any, last: Any) -> Any:
    """The end of the call as it is written, with the comment of the argument that is last now."""
    if not isinstance(own, cst.Comma) or "#" not in cst.Module([]).code_for_node(own):
        return last
    spaces = getattr(own, "whitespace_after", None), getattr(last, "whitespace_after", None)
    if not all(isinstance(space, cst.ParenthesizedWhitespace) for space in spaces):
        return None  # the comment would be lost
    before: Any = spaces[0]
    after: Any = spaces[1]
    space = before.with_changes(indent=after.indent, last_line=after.last_line)
    return own.with_changes(whitespace_after=space)


def _keyword(name: str) -> dict[str, object]:
    none = cst.SimpleWhitespace("")
    equal = cst.AssignEqual(whitespace_before=none, whitespace_after=none)
    return {"keyword": cst.Name(name), "equal": equal}


def _constant(node: cst.BaseExpression) -> bool | None:
    text = node.value if isinstance(node, (cst.Name, cst.Integer)) else ""
    return None if text == "None" else text not in {"False", "0"}
