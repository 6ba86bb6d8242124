# SPDX-License-Identifier: BSD-3-Clause
"""Assignments of one file: variables, attributes, items, and what a loop binds."""

from __future__ import annotations

import ast
from dataclasses import replace

from masked_loss_lint import names
from masked_loss_lint import values as V
from masked_loss_lint.calls import Calls
from masked_loss_lint.program import ClassInfo
from masked_loss_lint.values import NUMBER, UNKNOWN, Value, bounded


class Assignments(Calls):
    def _named(self, value: Value, name: str) -> Value:
        """A sum or a mean under the name of a loss is a loss."""
        if isinstance(value, (V.Reduced, V.Ratio)) and not value.is_loss and names.is_loss(name):
            return bounded(replace(value, is_loss=True), value.base)
        return value

    def assign(self, target: ast.expr, value: Value) -> None:
        scope = self.frame.scope
        if isinstance(target, ast.Name):
            if scope.paths:
                for path in [
                    p for p in scope.paths if p.startswith((f"{target.id}.", f"{target.id}["))
                ]:
                    scope.names.pop(path, None)
            scope.names[target.id] = self._named(value, target.id)
        elif isinstance(target, (ast.Tuple, ast.List)):
            for number, element in enumerate(target.elts):
                starred = any(isinstance(e, ast.Starred) for e in target.elts)
                self.assign(
                    element, UNKNOWN if starred else self._item(value, number, len(target.elts))
                )
        elif isinstance(target, ast.Starred):
            self.assign(target.value, UNKNOWN)
        elif isinstance(target, ast.Attribute):
            self._assign_member(target, target.value, target.attr, self._named(value, target.attr))
        elif isinstance(target, ast.Subscript) and isinstance(target.slice, ast.Constant):
            if isinstance(target.slice.value, str):
                self._assign_member(target, target.value, target.slice.value, value)

    def _item(self, value: Value, number: int, length: int) -> Value:
        if isinstance(value, V.Tuple):
            return value.items[number] if len(value.items) == length else UNKNOWN
        if isinstance(value, V.Either):
            return self.either(
                value.test,
                self._item(value.yes, number, length),
                self._item(value.no, number, length),
            )
        if isinstance(value, V.TERMS):
            return bounded(V.Member(value, number, self.module), value)
        return UNKNOWN

    def _assign_member(
        self, target: ast.expr, owner_node: ast.expr, key: str, value: Value
    ) -> None:
        owner = self.value(owner_node)
        self.store(key, value)
        if isinstance(value, V.Sliced) and value.copied:
            self.frame.read.append(value.copied)
        if (own := _class_of(owner)) is not None:
            own.fields[key].append(value)
        elif names.path(owner_node) and isinstance(owner, (V.Record, *V.TERMS)):
            changed = owner if isinstance(owner, V.Record) else V.Record(owner, ())
            self._replace(owner_node, changed.set(key, value))  # an object gains a field
        path = names.path(target)
        if path:
            self.frame.scope.names[path] = value
            self.frame.scope.paths.add(path)

    def _replace(self, node: ast.expr, value: Value) -> None:
        if not isinstance(node, ast.Attribute):
            self.frame.scope.names[names.path(node)] = value
            return
        if (own := _class_of(self.value(node.value))) is not None:
            own.fields[node.attr].append(value)
        self.frame.scope.names[names.path(node)] = value
        self.frame.scope.paths.add(names.path(node))

    def bind_elements(self, target: ast.expr, iterable: ast.expr, alone: bool) -> None:
        """Binds a loop's variables. Elements of zipped tensors may be scalars (`alone`: always)."""
        value = self.value(iterable)
        while (
            isinstance(iterable, ast.Call)
            and names.text(iterable.func) in {"enumerate", "tqdm"}
            and iterable.args
        ):
            iterable = iterable.args[0]
        self.assign(target, value.each if isinstance(value, V.Many) else UNKNOWN)
        zipped = isinstance(iterable, ast.Call) and names.text(iterable.func) == "zip"
        loaders = "load" in names.text(iterable).lower() if zipped or alone else False
        if alone or ((zipped or names.is_mask(iterable)) and not loaders):
            for node in ast.walk(target):
                if isinstance(node, ast.Name) and self.frame.scope.names.get(node.id) is UNKNOWN:
                    self.frame.scope.names[node.id] = NUMBER


def _class_of(value: Value) -> ClassInfo | None:
    """The class whose object `self` is."""
    is_param = isinstance(value, V.Param) and value.function.bound
    return value.function.owner if is_param and value.name == value.function.params[0] else None  # type: ignore[attr-defined]
