# SPDX-License-Identifier: BSD-3-Clause
"""Expressions of one file as values: names, attributes, items, comparisons, literals."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from masked_loss_lint import names
from masked_loss_lint import values as V
from masked_loss_lint.program import Event, FunctionInfo, FunctionNode, Module, Scope
from masked_loss_lint.rules import Finding
from masked_loss_lint.source import Source
from masked_loss_lint.values import (
    FOREIGN,
    NONE,
    NUMBER,
    UNKNOWN,
    Place,
    Value,
    bounded,
    is_number,
    same,
)

_METHODS: dict[type[ast.AST], Any] = {}
_DEEPEST = 60  # expressions inside expressions
_CONVENTIONS = {"F": "torch.nn.functional", "nn": "torch.nn", "torch": "torch"}
_KNOWN_ROOTS = {"torch", "masked_loss", "builtins", "random", "math", "functools", "types"}
_METADATA = {"size", "shape", "device", "dtype", "dim", "ndim", "numel"}
_TESTS = {ast.Eq: "==", ast.Is: "==", ast.NotEq: "!=", ast.IsNot: "!="}
_TENSOR_COMPARISONS = (ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE)


@dataclass(eq=False)
class Frame:
    """What is known while one function, or a module's top level, is walked."""

    info: FunctionInfo
    scope: Scope
    node: FunctionNode | ast.Module
    conditions: list[tuple[Value, bool]] = field(default_factory=list)
    returns: list[Value] = field(default_factory=list)
    read: list[Place] = field(default_factory=list)  # copies of logits that something has read
    copies: list[tuple[Place, Finding]] = field(default_factory=list)
    devices: int = 0  # inside a test of the number of devices


class Expressions:
    def __init__(self, module: Module, source: Source) -> None:
        self.module = module
        self.source = source
        self.frame = Frame(module.top, module.scope, source.tree)
        self.findings: list[Finding] = []
        self.pending: list[
            Callable[[], None]
        ] = []  # bodies of functions, walked after their outside
        self._depth = 0

    # What walk.py and calls.py add

    def call(self, node: ast.Call) -> Value:
        raise NotImplementedError

    def operate(
        self, node: ast.expr | ast.stmt, op: ast.operator, left: ast.expr, right: ast.expr
    ) -> Value:
        raise NotImplementedError

    def assign(self, target: ast.expr, value: Value) -> None:
        raise NotImplementedError

    def lambda_(self, node: ast.Lambda) -> Value:
        raise NotImplementedError

    def bind_elements(self, target: ast.expr, iterable: ast.expr, alone: bool) -> None:
        raise NotImplementedError

    def place(self, node: ast.expr | ast.stmt) -> Place:
        return self.source.place(node)

    def emit(self, kind: str, node: ast.expr | ast.stmt, value: Value, text: str) -> None:
        conditions = tuple(self.frame.conditions)
        self.frame.info.events.append(Event(kind, self.place(node), value, text, conditions))

    def value(self, node: ast.expr) -> Value:
        if self._depth >= _DEEPEST:
            return UNKNOWN
        self._depth += 1
        try:
            method = _METHODS.get(type(node))
            if method is None:
                name = f"of_{type(node).__name__.lower()}"
                method = _METHODS[type(node)] = getattr(type(self), name, type(self)._of_parts)
            result: Value = method(self, node)
            return result
        finally:
            self._depth -= 1

    def _of_parts(self, node: ast.AST) -> Value:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self.value(child)
        return UNKNOWN

    def of_constant(self, node: ast.Constant) -> Value:
        return V.Const(node.value)

    def of_call(self, node: ast.Call) -> Value:
        return self.call(node)

    def of_lambda(self, node: ast.Lambda) -> Value:
        return self.lambda_(node)

    def of_name(self, node: ast.Name) -> Value:
        found = self.frame.scope.lookup(node.id)
        if found is None:
            if self.module.stars and not hasattr(builtins, node.id):
                paths = tuple(f"{dotted}.{node.id}" for dotted, _ in self.module.stars)
                return self.imported(paths, self.module.stars[-1][1], f"builtins.{node.id}")
            return V.External(_CONVENTIONS.get(node.id, f"builtins.{node.id}"))
        if isinstance(found, V.Sliced) and found.copied:
            self.frame.read.append(found.copied)
        return found

    def imported(self, paths: tuple[str, ...], level: int, default: str = "") -> Value:
        """What these full names mean: known for PyTorch's, a term for all others."""
        if level == 0:
            for path in paths:
                if path.partition(".")[0] in _KNOWN_ROOTS:
                    return V.External(path)
        return V.Import((*paths, default) if default else paths, self.module, level)

    # Attributes and items

    def of_attribute(self, node: ast.Attribute) -> Value:
        if self.frame.scope.paths or self.module.scope.paths:
            stored = self.frame.scope.lookup(names.path(node))
            if stored is not None:
                return stored
        reads = len(self.frame.read)
        owner = self.value(node.value)
        if node.attr in _METADATA:
            del self.frame.read[reads:]  # it looks at a tensor, but not into it
        return self.member(owner, node.attr)

    def member(self, owner: Value, key: str | int | None) -> Value:
        if isinstance(owner, V.External) and isinstance(key, str):
            if owner.path.startswith("builtins."):  # a name that nothing in the file binds
                return V.Member(UNKNOWN, key, self.module) if names.is_loss(key) else UNKNOWN
            return V.External(f"{owner.path}.{key}")
        if isinstance(owner, V.Import) and isinstance(key, str):
            return V.Import(
                tuple(f"{path}.{key}" for path in owner.paths), owner.importer, owner.level
            )
        if isinstance(owner, V.Mask) and key in {"T", "mT", "data"}:
            return owner
        if key in _METADATA:
            return NUMBER if key == "ndim" else UNKNOWN
        if isinstance(owner, (*V.TERMS, V.Record, V.Tuple, V.Many, V.Super)):
            if key in {"T", "mT", "data"}:
                return owner
            return bounded(V.Member(owner, key, self.module), owner)
        if owner is UNKNOWN and isinstance(key, str) and names.is_loss(key):
            return V.Member(owner, key, self.module)
        return UNKNOWN

    def of_subscript(self, node: ast.Subscript) -> Value:
        index = node.slice
        if isinstance(index, ast.Constant) and isinstance(index.value, str):
            stored = self.frame.scope.lookup(names.path(node))
            owner = self.value(node.value)
            return stored if stored is not None else self.member(owner, index.value)
        owner = self.value(node.value)
        which = self.value(index)
        if self._selects(index, which):
            if isinstance(owner, V.TERMS):
                self.emit("chosen", node, owner, names.text(index))
                return bounded(V.Changed(owner, "selected"), owner)
            return owner
        if isinstance(owner, V.Mask) or names.is_mask(node.value) or names.is_weights(node.value):
            if self._is_element(node, which):
                return NUMBER
            return owner if isinstance(owner, V.Mask) else UNKNOWN
        if isinstance(index, ast.Constant) and isinstance(index.value, int):
            return self.member(owner, index.value)
        if isinstance(owner, (*V.TERMS, V.Record)) and not names.slices_time(index):
            return self.member(owner, None) if isinstance(which, (V.Const, *V.TERMS)) else UNKNOWN
        return _slice_of(index)

    def _selects(self, index: ast.expr, value: Value) -> bool:
        return isinstance(value, V.Mask) or (names.is_mask(index) and not is_number(value))

    def _is_element(self, node: ast.Subscript, which: Value) -> bool:
        """True for mask[i]: one number, if the mask has one dimension."""
        index = node.slice
        return not (
            names.slices_time(index)
            or isinstance(which, V.Mask)
            or names.is_labels(index)  # weights[labels]: one for each of them
        )

    # Literals, choices, comprehensions

    def of_tuple(self, node: ast.Tuple) -> Value:
        if any(isinstance(element, ast.Starred) for element in node.elts):
            return self._of_parts(node)
        items = tuple(self.value(element) for element in node.elts)
        return bounded(V.Tuple(items), *items)

    def of_list(self, node: ast.List) -> Value:
        values = [self.value(element) for element in node.elts]
        return self.many(values)

    of_set = of_list

    def many(self, values: list[Value]) -> Value:
        each: Value | None = None
        for value in values[:8]:
            each = value if each is None or same(each, value) else V.Either(UNKNOWN, each, value)
        return bounded(V.Many(each), each) if each is not None else V.Many(UNKNOWN)

    def of_dict(self, node: ast.Dict) -> Value:
        fields: list[tuple[str | int, Value]] = []
        for key, item in zip(node.keys, node.values, strict=True):
            value = self.value(item)
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                fields.append((key.value, value))
                self.store(key.value, value)
        return bounded(V.Record(NUMBER, tuple(fields)), *(value for _, value in fields))

    def store(self, name: str, value: Value) -> None:
        """Notes that some object's `.name` was set to `value`."""
        if names.is_loss(name):
            self.module.stores[name].append(value)

    def of_ifexp(self, node: ast.IfExp) -> Value:
        test = self.test(node.test)
        yes, no = self.value(node.body), self.value(node.orelse)
        return self.either(test, yes, no)

    def either(self, test: Value, yes: Value, no: Value) -> Value:
        if same(yes, no):
            return yes
        return bounded(V.Either(test, yes, no), test, yes, no)

    def of_namedexpr(self, node: ast.NamedExpr) -> Value:
        value = self.value(node.value)
        self.assign(node.target, value)
        return value

    def of_yield(self, node: ast.Yield | ast.YieldFrom) -> Value:
        self.frame.info.opaque = True
        return self._of_parts(node)

    of_yieldfrom = of_yield

    def of_starred(self, node: ast.Starred) -> Value:
        self.value(node.value)
        return UNKNOWN

    def _comprehension(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp) -> Value:
        return self.many(self._elements(node, [node.elt]))

    of_listcomp = of_setcomp = of_generatorexp = _comprehension

    def of_dictcomp(self, node: ast.DictComp) -> Value:
        self._elements(node, [node.key, node.value])
        return UNKNOWN

    def _elements(self, node: Any, parts: list[ast.expr]) -> list[Value]:
        outside, self.frame.scope = self.frame.scope, Scope(self.frame.scope)
        for generator in node.generators:
            self.bind_elements(generator.target, generator.iter, alone=True)
            for condition in generator.ifs:
                self.value(condition)
        values = [self.value(part) for part in parts]
        self.frame.scope = outside
        return values

    # Operators

    def of_binop(self, node: ast.BinOp) -> Value:
        return self.operate(node, node.op, node.left, node.right)

    def of_boolop(self, node: ast.BoolOp) -> Value:
        values = [self.value(operand) for operand in node.values]
        if isinstance(node.op, ast.Or) and len(values) == 2 and not is_number(values[0]):
            return self.either(V.Test("truth", values[0]), values[0], values[1])
        return NUMBER if all(map(is_number, values)) else UNKNOWN

    def of_unaryop(self, node: ast.UnaryOp) -> Value:
        value = self.value(node.operand)
        if isinstance(node.op, ast.Not):
            return NUMBER
        if isinstance(node.op, ast.USub) and isinstance(value, V.Const):
            return V.Const(-value.value) if isinstance(value.value, (int, float)) else UNKNOWN
        return NUMBER if is_number(value) and not isinstance(value, V.Count) else value

    def of_compare(self, node: ast.Compare) -> Value:
        operands = [node.left, *node.comparators]
        values = [self.value(operand) for operand in operands]
        if not all(isinstance(op, _TENSOR_COMPARISONS) for op in node.ops):
            return NUMBER  # is, in
        return self.compare(node, operands, values)

    def compare(self, node: ast.expr, operands: list[ast.expr], values: list[Value]) -> Value:
        """Whether a comparison makes a mask or, of numbers and strings, only True or False."""
        if any(isinstance(value, V.Const) and isinstance(value.value, str) for value in values):
            return NUMBER
        text = self.source.segment(node) or names.text(node)
        if "arange" in text:
            return V.Mask(text, never_empty=True)
        known = list(zip(operands, values, strict=True))
        pairs = [pair for a, b in pairwise(known) for pair in ((a, b), (b, a))]
        if any(isinstance(value, V.Mask) for value in values) or any(
            not is_number(value) and names.compares_labels(labels, other)
            for (labels, value), (other, _) in pairs
        ):
            return V.Mask(text, never_empty=names.is_never_empty(text))
        if any(value is NUMBER or isinstance(value, V.Count) for value in values):
            return NUMBER
        variables = [o for o in operands if not isinstance(o, ast.Constant)]
        tensors = any(isinstance(operand, (ast.Call, ast.Subscript)) for operand in variables)
        return NUMBER if not tensors and any(map(names.is_scalar, variables)) else UNKNOWN

    def test(self, node: ast.expr) -> Value:
        """The test, where it is one that values may decide, else UNKNOWN."""
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            inner = self.test(node.operand)
            return bounded(V.Test("not", inner), inner) if inner is not UNKNOWN else UNKNOWN
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            left, right = self.value(node.left), self.value(node.comparators[0])
            op = _TESTS.get(type(node.ops[0]), "")
            known = left is not UNKNOWN and isinstance(right, V.Const)
            return bounded(V.Test(op, left, right), left) if op and known else UNKNOWN
        value = self.value(node)
        named = isinstance(node, (ast.Name, ast.Attribute)) and value is not UNKNOWN
        return bounded(V.Test("truth", value), value) if named else UNKNOWN


def decided(op: str, left: Value, right: Value) -> bool | None:
    """The outcome of a test on values, where they tell."""
    if op == "truth":
        return bool(left.value) if isinstance(left, V.Const) else None
    if isinstance(left, V.Const) and isinstance(right, V.Const):
        return (left.value == right.value) == (op == "==")
    return op == "!=" if right == NONE and left not in (UNKNOWN, FOREIGN) else None


def _slice_of(index: ast.expr) -> Value:
    """Sliced for x[..., :-1, :], x[:, :-1] and x[..., 1:], x[:, 1:]."""
    parts = index.elts if isinstance(index, ast.Tuple) else []
    for part in parts:
        if not isinstance(part, ast.Slice) or part.step is not None:
            continue
        lower = names.text(part.lower) if part.lower else ""
        upper = names.text(part.upper) if part.upper else ""
        if (lower, upper) == ("", "-1"):
            return V.Sliced(False, second=part is parts[1])
        if (lower, upper) == ("1", ""):
            return V.Sliced(True)
    return UNKNOWN
