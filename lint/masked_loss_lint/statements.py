# SPDX-License-Identifier: BSD-3-Clause
"""Statements of a function, one by one: branches are joined, loops looked at once."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from masked_loss_lint import names
from masked_loss_lint import values as V
from masked_loss_lint.calls import Calls
from masked_loss_lint.program import ClassInfo, FunctionInfo, Scope
from masked_loss_lint.values import NONE, NUMBER, UNKNOWN, Value, join

_ENDS = (ast.Raise, ast.Continue, ast.Break)


class Statements(Calls):
    # Statements; each returns True when control does not go past it

    def block(self, body: Iterable[ast.stmt]) -> bool:
        return any(self.statement(statement) for statement in body)

    def statement(self, node: ast.stmt) -> bool:
        return self.handle(node) is True or isinstance(node, _ENDS)

    def of_return(self, node: ast.Return) -> bool:
        value = NONE if node.value is None else self.value(node.value)
        self.frame.returns.append(_named(value, self.frame.info.name))
        return True

    def of_assign(self, node: ast.Assign) -> None:
        reads = len(self.frame.read)
        value = self.value(node.value)
        if isinstance(value, V.Sliced) and isinstance(node.targets[0], ast.Name):
            del self.frame.read[reads:]  # x = x.view(-1, V) is the same copy
        for target in node.targets:
            named = value
            if names.is_mask(target) and (
                value is V.FOREIGN or isinstance(value, (V.Thing, *V.TENSORS))
            ):
                text = names.text(node.value) if isinstance(node.value, ast.Call) else ""
                if names.is_scalar(node.value):
                    named = NUMBER
                elif names.is_never_empty(text):  # sequence_mask(lengths)
                    named = V.Mask(never_empty=True)
            self.assign(target, named)

    def of_annassign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.assign(node.target, self.value(node.value))

    def of_augassign(self, node: ast.AugAssign) -> None:
        self.assign(node.target, self.operate(node, node.op, node.target, node.value))

    def of_if(self, node: ast.If) -> bool:
        """A chain of elif is looked at as one statement, however long it is."""
        blocks: list[list[ast.stmt]] = []
        chain: list[ast.stmt] = [node]
        while len(chain) == 1 and isinstance(chain[0], ast.If):
            test, body, chain = chain[0].test, chain[0].body, chain[0].orelse
            outcome = self.test(test)
            if outcome is not False:
                blocks.append(body)
            if outcome:
                chain = []
                break
        else:
            blocks.append(chain)
        return self._branches(blocks)

    def _branches(self, blocks: list[list[ast.stmt]]) -> bool:
        """Looks at each block from the same start, and joins where those that go on meet again."""
        scope, start = self.frame.scope, self.frame.scope.names
        merged: dict[str, Value] | None = None
        self.frame.nested += 1
        for block in blocks if self.frame.nested < 90 else ():
            scope.names = dict(start)
            if self.block(block):
                continue
            if merged is not None:
                for name in {**scope.names, **merged}:
                    one, other = scope.names.get(name, NONE), merged.get(name, NONE)
                    if one is not other:
                        scope.names[name] = join(other, one)
            merged = scope.names
        self.frame.nested -= 1
        scope.names = start if merged is None else merged
        return merged is None and bool(blocks)

    def of_for(self, node: Any) -> None:
        if isinstance(node, ast.While):
            self.value(node.test)
        else:
            self.bind_elements(node.target, node.iter, False)
        self.block(node.body)
        self.block(node.orelse)

    of_asyncfor = of_while = of_for

    def of_with(self, node: ast.With | ast.AsyncWith) -> bool:
        for item in node.items:
            value = self.value(item.context_expr)
            if item.optional_vars is not None:
                self.assign(item.optional_vars, value)
        return self.block(node.body)

    of_asyncwith = of_with

    def of_try(self, node: ast.Try) -> bool:
        handlers = [handler.body for handler in node.handlers]
        ended = self._branches([*handlers, [*node.body, *node.orelse]])
        return self.block(node.finalbody) or ended

    of_trystar = of_try

    def of_match(self, node: ast.Match) -> bool:
        self.value(node.subject)
        return self._branches([*(case.body for case in node.cases), []])

    # Assignments

    def assign(self, target: ast.expr, value: Value) -> None:
        if isinstance(target, ast.Name):
            self.frame.scope.names[target.id] = _named(value, target.id)
        elif isinstance(target, (ast.Tuple, ast.List)):
            starred = any(isinstance(element, ast.Starred) for element in target.elts)
            known = isinstance(value, (V.Record, V.Loss)) and not starred
            for number, element in enumerate(target.elts):
                self.assign(element, self.member(value, number) if known else UNKNOWN)
        elif isinstance(target, ast.Attribute):
            self._assign_member(target.value, target.attr, _named(value, target.attr))
        elif isinstance(target, ast.Subscript) and isinstance(target.slice, ast.Constant):
            self._assign_member(target.value, str(target.slice.value), value)

    def _assign_member(self, owner: ast.expr, key: str, value: Value) -> None:
        self.store(key, value)
        if isinstance(value, V.Sliced) and value.copied:
            self.frame.read.append(value.copied)
        whole = self.value(owner)
        if isinstance(whole, V.Partial):
            keywords = (*whole.given.keywords, (key, value))
            self.assign(owner, replace(whole, given=replace(whole.given, keywords=keywords)))
            return
        params = self.frame.info.params if self.frame.info.bound else ()
        if isinstance(owner, ast.Name) and owner.id in params[:1]:
            self.frame.outcome.fields[key].append(value)
        if isinstance(whole, (V.Record, V.Instance, V.Thing)) or whole is V.FOREIGN:
            record = whole if isinstance(whole, V.Record) else V.Record(whole, ())
            self.assign(owner, record.set(key, value))  # the object gains a field

    def bind_elements(self, target: ast.expr, iterable: ast.expr, alone: bool) -> None:
        """Binds a loop's variables. Elements of zipped tensors may be scalars (`alone`: always)."""
        value = self.value(iterable)
        while (
            isinstance(iterable, ast.Call)
            and names.text(iterable.func) in {"enumerate", "tqdm"}
            and iterable.args
        ):
            iterable = iterable.args[0]
        self.assign(target, self.member(value, None))
        zipped = isinstance(iterable, ast.Call) and names.text(iterable.func) == "zip"
        loaders = "load" in names.text(iterable).lower() if zipped or alone else False
        if alone or ((zipped or names.is_mask(iterable)) and not loaders):
            for node in ast.walk(target):
                if isinstance(node, ast.Name) and self.frame.scope.names.get(node.id) == UNKNOWN:
                    self.frame.scope.names[node.id] = NUMBER

    # Definitions

    def of_import(self, node: ast.Import) -> None:
        for alias in node.names:
            path = alias.name if alias.asname else alias.name.partition(".")[0]
            term = V.Import((path,), self.frame.info.module)
            self.frame.scope.names[alias.asname or path] = term

    def of_importfrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            path = f"{node.module}.{alias.name}" if node.module else alias.name
            term = V.Import((path,), self.frame.info.module, node.level)
            if alias.name == "*":
                self.frame.info.module.stars.append((node.module or "", node.level))
            else:
                self.frame.scope.names[alias.asname or alias.name] = term

    def of_functiondef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self.frame.scope.names[node.name] = self._function(node, self.frame.scope)

    of_asyncfunctiondef = of_functiondef

    def of_lambda(self, node: ast.Lambda) -> Value:
        return self._function(node, self.frame.scope)

    def _function(self, node: Any, scope: Scope, owner: ClassInfo | None = None) -> V.Function:
        given, module, position = node.args, self.frame.info.module, (node.lineno, node.col_offset)
        params = [*given.posonlyargs, *given.args]
        pairs = dict(zip(params[::-1], given.defaults[::-1], strict=False))
        pairs |= {a: d for a, d in zip(given.kwonlyargs, given.kw_defaults, strict=True) if d}
        info = module.infos.get(position)
        if not isinstance(info, FunctionInfo):
            info = FunctionInfo(getattr(node, "name", "<lambda>"), module, position, owner)
            info.lambda_ = node if isinstance(node, ast.Lambda) else None
            info.params = tuple(a.arg for a in params)
            info.parameters = (*info.params, *(a.arg for a in given.kwonlyargs))
            numbers = (a for a in (*params, *given.kwonlyargs) if _is_number(a, pairs.get(a)))
            info.numbers = frozenset(a.arg for a in numbers)
            called = (getattr(d, "func", d) for d in getattr(node, "decorator_list", ()))
            info.decorators = frozenset(map(names.last_name, called))
            info.given_away = "vmap" in info.decorators
            module.infos[position] = info
        info.defaults = {a.arg: self.value(d) for a, d in pairs.items()}
        function = V.Function(info, scope)
        pending = module.pending if self.frame.info is module.top else self.frame.pending
        pending.append(function)
        return function

    def of_classdef(self, node: ast.ClassDef) -> None:
        module, position = self.frame.info.module, (node.lineno, node.col_offset)
        info = module.infos.get(position)
        if not isinstance(info, ClassInfo):
            info = module.infos[position] = ClassInfo(node.name, module)
        info.bases = [self.value(base) for base in node.bases]
        self.frame.scope.names[node.name] = V.Class(info)
        outside = self.frame.scope
        body = self.frame.scope = Scope(outside)
        for statement in node.body:
            if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
                info.methods[statement.name] = self._function(statement, outside, info)
                continue
            target = getattr(statement, "target", None)
            if isinstance(statement, ast.AnnAssign) and isinstance(target, ast.Name):
                info.order[target.id] = None
            self.statement(statement)
        self.frame.scope = outside
        info.fields = body.names


def _named(value: Value, name: str) -> Value:
    """A sum or a mean under the name of a loss is a loss."""
    if not isinstance(value, V.Total) or value.loss or value.dims or value.of_mask:
        return value
    if isinstance(value.key, str) or not names.is_loss(name):
        return value
    ratio = value.op == "ratio"
    loss = V.Loss(
        "sum" if ratio else value.op, "mean" if ratio else value.op, value.place, None, ratio
    )
    return replace(value, loss=loss, key=None)


def _is_number(argument: ast.arg, default: ast.expr | None) -> bool:
    """True for scale: float, and for mask=1.0: one number is enough for a mask here."""
    if argument.annotation and names.last_name(argument.annotation) in {"float", "int", "bool"}:
        return True
    number = isinstance(default, ast.Constant) and type(default.value) in (int, float)
    return number and names.is_mask(ast.Name(argument.arg))
