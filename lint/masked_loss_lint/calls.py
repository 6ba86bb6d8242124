# SPDX-License-Identifier: BSD-3-Clause
"""Calls of one file as values: losses, Python's own functions, and those of other files."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator
from typing import Any

from masked_loss_lint import local, names
from masked_loss_lint import values as V
from masked_loss_lint.tensors import Tensors
from masked_loss_lint.torch_losses import SPECS
from masked_loss_lint.values import NONE, NUMBER, UNKNOWN, Value, bounded

_MODELS = {"model", "module", "net", "network", "engine", "self"}
_MAPPERS = {"map", "vmap", "starmap", "grad", "vmap_"}
_NUMERIC = {"float", "int", "len", "bool", "round", "max", "min", "abs"}


class Calls(Tensors):
    def call(self, node: ast.Call) -> Value:
        function = node.func
        if isinstance(function, ast.Attribute):
            if isinstance(function.value, ast.Call) and names.text(function.value.func) == "super":
                return self._called(node, V.Member(self._super(), function.attr, self.module))
            reads = len(self.frame.read)
            receiver = self.value(function.value)
            result = self._method(node, function, receiver, reads)
            if result is not None:
                return result
        return self._call(self.value(function), node)

    def _super(self) -> Value:
        owner = self.frame.info.owner
        return UNKNOWN if owner is None else V.Super(owner, self.receiver())

    def receiver(self) -> Value:
        """What `self` is here."""
        params = self.frame.info.params
        return (params and self.frame.scope.lookup(params[0])) or UNKNOWN

    def _arguments(self, node: ast.Call) -> tuple[list[Value], dict[str, Value]]:
        positional = [self.value(argument) for argument in node.args]
        keywords = {k.arg or "**": self.value(k.value) for k in node.keywords}
        for value in (*positional, *keywords.values()):
            if isinstance(value, V.Function) and value.info.name == "<lambda>":
                value.info.given_away = True
        return positional, keywords

    def _call(self, callee: Value, node: ast.Call) -> Value:
        if isinstance(callee, V.External):
            return self._external(callee, node)
        return self._called(node, callee)

    def _called(self, node: ast.Call, callee: Value) -> Value:
        """A call that is understood when all files are known."""
        reads = len(self.frame.read)
        positional, keywords = self._arguments(node)
        self._note_loss(node, callee, [*positional, *map(keywords.get, ("input", "target"))], reads)
        starred = any(isinstance(argument, ast.Starred) for argument in node.args)
        last = names.last_name(node.func)
        if last in _MAPPERS:
            self.module.mapped += positional
        if last[:1].isupper() or last == "dict":
            for name, value in keywords.items():
                self.store(name, value)
        self._note_fills(node, last)
        wraps = next(
            (i for i, a in enumerate(node.args) if _MODELS & set(names.words(names.last_name(a)))),
            -1,
        )
        known = isinstance(
            callee,
            (V.Function, V.Class, V.Instance, V.Super, V.External, V.Partial, V.Record, *V.TERMS),
        )
        if not known and "labels" not in keywords:
            return UNKNOWN
        items = tuple((name, value) for name, value in keywords.items() if name != "**")
        spread = starred or "**" in keywords
        place = self.place(node)
        call = V.Called(callee, tuple(positional), items, place, self.module, wraps, spread)
        call = bounded(call, callee, *positional, *keywords.values())  # type: ignore[assignment]
        if isinstance(call, V.Called):
            self.frame.info.calls.append((call, tuple(self.frame.conditions)))
            owner = self.frame.info.owner
            inherited = isinstance(callee, V.Member) and isinstance(callee.owner, V.Super)
            if owner is not None and inherited and getattr(callee, "key", "") == "__init__":
                owner.base_init = call
        return call

    def _note_loss(self, node: ast.Call, callee: Value, inputs: list[Any], reads: int) -> None:
        """Tells the rule of copied logits of a call of a loss, or of a module made here."""
        made = callee.callee if isinstance(callee, V.Called) else callee
        spec = SPECS.get(made.path) if isinstance(made, V.External) else None
        if spec is not None and spec.is_module == isinstance(callee, V.Called):
            local.copied_logits(self, node, spec, [v for v in inputs if v is not None], reads)

    # PyTorch, masked_loss, Python

    def _external(self, callee: V.External, node: ast.Call) -> Value:
        path, last = callee.path, callee.path.rpartition(".")[2]
        spec = SPECS.get(path)
        if spec is not None:
            local.legacy_arguments(self, node, spec)
            return self._called(node, callee)
        if path.startswith("torch.") or last in {"max", "min"}:
            result = self._torch(last, node)
            if result is not None:
                return result
        positional, keywords = self._arguments(node)
        first = positional[0] if positional else UNKNOWN
        if last in _MAPPERS:
            for value in positional:
                if isinstance(value, V.Function):
                    value.info.per_sample = True
            self.module.mapped += positional
            return UNKNOWN
        partial = SPECS.get(first.path) if isinstance(first, V.External) else None
        if path == "functools.partial" and partial is not None:
            later = ast.copy_location(ast.Call(node.func, node.args[1:], node.keywords), node)
            local.legacy_arguments(self, later, partial, partial=True)
        if path == "builtins.getattr" and len(node.args) > 1:
            return self._getattr(node, first, positional[1])
        if path == "builtins.setattr" and len(node.args) == 3:
            self._setattr(node, positional[1], positional[2])
            return NONE
        if path == "builtins.sum":
            return first.each if isinstance(first, V.Many) else UNKNOWN
        if path in {"builtins.dict", "types.SimpleNamespace"} and "**" not in keywords:
            for name, value in keywords.items():
                self.store(name, value)
            return bounded(V.Record(NUMBER, tuple(keywords.items())), *keywords.values())
        if path.startswith("builtins."):
            if hasattr(builtins, last):
                return NUMBER if last in _NUMERIC and not isinstance(first, V.TERMS) else UNKNOWN
            return self._called(node, UNKNOWN)
        if path.startswith(("random.", "math.")):
            return NUMBER
        if path.endswith(("ModuleDict", "ModuleList")) and isinstance(first, (V.Record, V.Many)):
            return first
        return self._called(node, callee)

    def _getattr(self, node: ast.Call, owner: Value, name: Value) -> Value:
        text = V.text_of(name)
        if text is not None:
            return self.member(owner, text)
        some = {"torch.nn": "CrossEntropyLoss", "torch.nn.functional": "cross_entropy"}
        path = owner.path if isinstance(owner, V.External) else ""
        if path in some and names.is_loss(names.text(node.args[1])):
            return V.External(f"{path}.{some[path]}")  # a loss of torch, whichever it is
        return UNKNOWN

    def _setattr(self, node: ast.Call, name: Value, value: Value) -> None:
        """setattr(owner, name, value); a name that is not known may be that of the reduction."""
        attribute = V.text_of(name)
        target = ast.Attribute(node.args[0], attribute or "reduction", ast.Store())
        self.assign(ast.copy_location(target, node), value if attribute else UNKNOWN)

    # Methods

    def _method(
        self, node: ast.Call, function: ast.Attribute, receiver: Value, reads: int
    ) -> Value | None:
        """A method of a tensor, a list or a dictionary; None: something else is called."""
        name = function.attr
        if name in {"size", "dim", "numel"}:
            del self.frame.read[reads:]
        if isinstance(receiver, (V.External, V.Function, V.Class)):
            return None
        if name == "__setitem__" and len(node.args) == 2:
            item = ast.Subscript(function.value, node.args[0], ast.Store())
            self.assign(ast.copy_location(item, node), self.value(node.args[1]))
            return NONE
        if isinstance(receiver, V.Record) and name in {"get", "pop"} and node.args:
            key = V.text_of(self.value(node.args[0]))
            return UNKNOWN if key is None else self.member(receiver, key)
        if name == "update" and isinstance(receiver, V.Record):
            for name_node, written in self._updates(node):
                field = ast.Subscript(function.value, name_node, ast.Store())
                self.assign(ast.copy_location(field, node), self.value(written))
            if not all(isinstance(argument, ast.Dict) for argument in node.args):
                self.assign(function.value, UNKNOWN)
            return NONE
        if isinstance(receiver, V.Many) and name == "append" and len(node.args) == 1:
            value = self.value(node.args[0])
            empty = receiver.each is UNKNOWN and receiver.depth == 0
            self.assign(function.value, self.many([value] if empty else [receiver.each, value]))
            return NONE
        return self._tensor_method(node, function.value, name, receiver)

    def _updates(self, node: ast.Call) -> Iterator[tuple[ast.expr, ast.expr]]:
        """The keys and values of dict.update(loss=..., **more) and dict.update({"loss": ...})."""
        yield from ((ast.Constant(k.arg), k.value) for k in node.keywords if k.arg)
        for argument in node.args:
            if isinstance(argument, ast.Dict):
                pairs = zip(argument.keys, argument.values, strict=True)
                yield from ((key, value) for key, value in pairs if key is not None)
