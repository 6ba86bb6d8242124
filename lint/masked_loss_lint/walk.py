# SPDX-License-Identifier: BSD-3-Clause
"""Walks one file, each function once, and writes down what other files may ask of it.

Branches are walked one by one and joined, loops once. Nothing of the analysed program is executed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from contextlib import contextmanager
from typing import Any

from masked_loss_lint import local, names
from masked_loss_lint import values as V
from masked_loss_lint.assign import Assignments
from masked_loss_lint.expressions import Frame
from masked_loss_lint.program import ClassInfo, FunctionInfo, FunctionNode, Module, Scope
from masked_loss_lint.rules import Finding
from masked_loss_lint.source import Source
from masked_loss_lint.values import NONE, NUMBER, UNKNOWN, Value, same

_DEVICES = {"gpu", "gpus", "parallel", "dp", "device", "devices"}
_ENDS = (ast.Return, ast.Raise, ast.Continue, ast.Break)


def walk(module: Module, source: Source) -> list[Finding]:
    """Fills in the module, and returns what one function alone decides."""
    module.walked = True
    walker = _Walker(module, source)
    walker.block(source.tree.body)
    while walker.pending:
        walker.pending.pop(0)()
    return walker.findings


class _Walker(Assignments):
    def __init__(self, module: Module, source: Source) -> None:
        super().__init__(module, source)
        self._lambdas: dict[ast.Lambda, FunctionInfo] = {}

    # Statements; each returns True when control does not go past it

    def block(self, body: Iterable[ast.stmt]) -> bool:
        conditions = len(self.frame.conditions)
        ended = False
        for statement in body:
            if self.statement(statement):
                ended = True
                break
        del self.frame.conditions[conditions:]
        return ended

    def statement(self, node: ast.stmt) -> bool:
        method = getattr(self, f"do_{type(node).__name__.lower()}", None)
        if method is not None:
            return bool(method(node))
        self._of_parts(node)
        return isinstance(node, _ENDS)

    def do_return(self, node: ast.Return) -> bool:
        value = NONE if node.value is None else self.value(node.value)
        self.frame.returns.append(self._named(value, self.frame.info.name))
        return True

    def do_assign(self, node: ast.Assign) -> None:
        reads = len(self.frame.read)
        value = self.value(node.value)
        if isinstance(value, V.Sliced) and all(
            isinstance(target, ast.Name) for target in node.targets
        ):
            del self.frame.read[reads:]  # x = x.view(-1, V) is the same copy
        if isinstance(node.value, ast.List) and any(
            isinstance(e, ast.Constant) for e in node.value.elts
        ):
            value = V.Many(UNKNOWN)
        for target in node.targets:
            unknown = value is UNKNOWN or isinstance(value, V.TERMS)
            if unknown and names.is_mask(target) and names.is_scalar(node.value):
                value = NUMBER
            if unknown and names.is_mask(target) and isinstance(node.value, ast.Call):
                text = names.text(node.value)  # sequence_mask(lengths)
                value = V.Mask(text, never_empty=True) if names.is_never_empty(text) else value
            if isinstance(target, ast.Subscript) or "ignore" in names.words(
                names.last_name(target)
            ):
                self.note_fill(node.value)
            self.assign(target, value)

    def do_annassign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.assign(node.target, self.value(node.value))

    def do_augassign(self, node: ast.AugAssign) -> None:
        self.assign(node.target, self.operate(node, node.op, node.target, node.value))

    def do_if(self, node: ast.If) -> bool:
        """A chain of elif is walked as one statement, however long it is."""
        tests: list[Value] = []
        blocks: list[list[ast.stmt]] = []
        devices = 0
        chain: list[ast.stmt] = [node]
        while len(chain) == 1 and isinstance(chain[0], ast.If):
            tests.append(self.test(chain[0].test))
            devices |= bool(_DEVICES & set(names.words(self.source.segment(chain[0].test))))
            blocks.append(chain[0].body)
            chain = chain[0].orelse
        self.frame.devices += devices
        ended = self._branches(tests, [*blocks, chain])
        self.frame.devices -= devices
        return ended

    def _branches(self, tests: list[Value], blocks: list[list[ast.stmt]]) -> bool:
        """Walks each block from the same start and joins where those that go on meet again.

        `tests` decide which of the blocks but the last is taken.
        """
        frame, scope = self.frame, self.frame.scope
        start, conditions = scope.names, len(frame.conditions)
        ends: list[tuple[Value, dict[str, Value]]] = []
        left: list[
            tuple[Value, bool]
        ] = []  # what is known where the blocks that end did not end it
        for number, block in enumerate(blocks):
            test = tests[number] if number < len(tests) else UNKNOWN
            scope.names = dict(start)
            if test is not UNKNOWN:
                frame.conditions.append((test, True))
            if not self.block(block):
                ends.append((test, scope.names))
            elif frame.conditions[conditions:] and frame.conditions[-1][1]:
                left.append((test, False))
            if test is not UNKNOWN:
                frame.conditions[-1] = (test, False)
        del frame.conditions[conditions:]
        frame.conditions += left
        scope.names = start
        if not ends:
            return True
        _, merged = ends.pop()
        for test, names_there in reversed(ends):
            merged = self._merge(test, names_there, merged)
        scope.names = merged
        return False

    def _merge(self, test: Value, yes: dict[str, Value], no: dict[str, Value]) -> dict[str, Value]:
        merged = dict(no)
        for name, value in yes.items():
            other = no.get(name, NONE)
            if value is not other:
                merged[name] = value if same(value, other) else self.either(test, value, other)
        for name in no.keys() - yes.keys():
            merged[name] = self.either(test, NONE, no[name])
        return merged

    def do_for(self, node: ast.For | ast.AsyncFor) -> None:
        self.bind_elements(node.target, node.iter, alone=False)
        self._loop(node)

    do_asyncfor = do_for

    def do_while(self, node: ast.While) -> None:
        self.value(node.test)
        self._loop(node)

    def _loop(self, node: Any) -> None:
        self.block(node.body)
        self.block(node.orelse)

    def do_with(self, node: ast.With | ast.AsyncWith) -> bool:
        for item in node.items:
            value = self.value(item.context_expr)
            if item.optional_vars is not None:
                self.assign(item.optional_vars, value)
        return self.block(node.body)

    do_asyncwith = do_with

    def do_try(self, node: ast.Try) -> bool:
        handlers = [handler.body for handler in node.handlers]
        unknown: list[Value] = [UNKNOWN] * len(handlers)
        ended = self._branches(unknown, [*handlers, [*node.body, *node.orelse]])
        return self.block(node.finalbody) or ended

    do_trystar = do_try

    def do_match(self, node: ast.Match) -> bool:
        self.value(node.subject)
        return self._branches([UNKNOWN] * len(node.cases), [*(c.body for c in node.cases), []])

    def do_global(self, node: ast.Global) -> None:
        for name in node.names:
            self.frame.scope.names[name] = self.module.scope.names.get(name, UNKNOWN)

    def do_delete(self, node: ast.Delete) -> None:
        for target in node.targets:
            self.assign(target, UNKNOWN)

    # Definitions

    def do_import(self, node: ast.Import) -> None:
        for alias in node.names:
            path = alias.name if alias.asname else alias.name.partition(".")[0]
            self.frame.scope.names[alias.asname or path] = self.imported((path,), 0)

    def do_importfrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            path = f"{node.module}.{alias.name}" if node.module else alias.name
            if alias.name == "*":
                self.module.stars.append((node.module or "", node.level))
            else:
                name = alias.asname or alias.name
                self.frame.scope.names[name] = self.imported((path,), node.level)

    def do_functiondef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        info = self._definition(node, None, self.frame.scope)
        manager = {"contextmanager", "asynccontextmanager"} & info.decorators
        self.frame.scope.names[node.name] = UNKNOWN if manager else V.Function(info)

    do_asyncfunctiondef = do_functiondef

    def _definition(
        self,
        node: ast.FunctionDef | ast.AsyncFunctionDef,
        owner: ClassInfo | None,
        outside: Scope | None,
    ) -> FunctionInfo:
        for decorator in node.decorator_list:
            self.value(decorator)
        called = (d.func if isinstance(d, ast.Call) else d for d in node.decorator_list)
        return self._function(
            node, node.name, frozenset(map(names.last_name, called)), owner, outside
        )

    def lambda_(self, node: ast.Lambda) -> Value:
        if node not in self._lambdas:
            self._lambdas[node] = self._function(
                node, "<lambda>", frozenset(), None, self.frame.scope
            )
        return V.Function(self._lambdas[node])

    def _function(
        self,
        node: FunctionNode,
        name: str,
        decorators: frozenset[str],
        owner: ClassInfo | None,
        outside: Scope | None,
    ) -> FunctionInfo:
        arguments = node.args
        positional = [*arguments.posonlyargs, *arguments.args]
        keyword_only = arguments.kwonlyargs
        pairs = list(zip(reversed(positional), reversed(arguments.defaults), strict=False))
        pairs += [
            (a, d)
            for a, d in zip(keyword_only, arguments.kw_defaults, strict=True)
            if d is not None
        ]
        numbers = {
            a.arg
            for a in (*positional, *keyword_only)
            if names.last_name(a.annotation or ast.Name("")) in {"float", "int", "bool"}
        }
        numbers |= {a.arg for a, d in pairs if _is_switch(a, d)}
        info = FunctionInfo(
            name,
            self.module,
            owner,
            tuple(a.arg for a in positional),
            tuple(a.arg for a in keyword_only),
            {a.arg: self.value(d) for a, d in pairs},
            frozenset(numbers),
            decorators,
            per_sample="vmap" in decorators,
        )
        self.module.functions.append(info)
        scope = Scope(outside, {a: V.Param(info, a) for a in (*info.params, *info.keyword_only)})
        for extra in (arguments.vararg, arguments.kwarg):
            if extra is not None:
                scope.names[extra.arg] = UNKNOWN
        self.pending.append(lambda: self._body(node, info, scope))
        return info

    def _body(self, node: FunctionNode, info: FunctionInfo, scope: Scope) -> None:
        with self._inside(Frame(info, scope, node)):
            if isinstance(node, ast.Lambda):
                self.frame.returns.append(self.value(node.body))
            else:
                abstract = all(isinstance(s, (ast.Raise, ast.Pass, ast.Expr)) for s in node.body)
                info.opaque = isinstance(node, ast.AsyncFunctionDef) or abstract
                if not self.block(node.body):
                    self.frame.returns.append(NONE)
            info.returns = self._returned(self.frame.returns)
            local.unread_copies(self)

    def _returned(self, values: list[Value]) -> Value:
        result: Value = NONE
        for value in reversed(values):
            alone = result == NONE or same(result, value)
            result = value if alone else self.either(UNKNOWN, value, result)
        return result

    @contextmanager
    def _inside(self, frame: Frame) -> Any:
        outside, self.frame = self.frame, frame
        try:
            yield
        finally:
            self.frame = outside

    def do_classdef(self, node: ast.ClassDef) -> None:
        info = ClassInfo(node.name, self.module, [self.value(base) for base in node.bases])
        self.frame.scope.names[node.name] = V.Class(info)
        body = Scope(self.frame.scope)
        with self._inside(Frame(self.frame.info, body, self.frame.node)):
            for statement in node.body:
                if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    info.methods[statement.name] = self._definition(statement, info, body.parent)
                    continue
                if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                    info.order.append(statement.target.id)
                self.statement(statement)
        for name, value in body.names.items():
            info.fields[name].append(value)


def _is_switch(argument: ast.arg, default: ast.expr) -> bool:
    """True for mask=1.0: one number is enough for what is called a mask here."""
    number = isinstance(default, ast.Constant) and type(default.value) in (int, float)
    return number and names.is_mask(ast.Name(argument.arg))
