# SPDX-License-Identifier: BSD-3-Clause
"""Expressions as values: names, attributes, items, comparisons, literals."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from masked_loss_lint import names
from masked_loss_lint import values as V
from masked_loss_lint.program import FunctionInfo, Outcome, Program, Scope
from masked_loss_lint.rules import Finding, no_effect
from masked_loss_lint.values import NONE, NUMBER, UNKNOWN, Place, Value, is_number, join

_METHODS: dict[type[ast.AST], Any] = {}
_DEEPEST = 90  # expressions and blocks inside others, in one function
_LONGEST = 8  # elements of a list that are looked at
_CONVENTIONS = {"F": "torch.nn.functional", "nn": "torch.nn", "torch": "torch"}
METADATA = {"size", "shape", "device", "dtype", "dim", "ndim", "numel"}
_EQUAL = {ast.Eq: True, ast.Is: True, ast.NotEq: False, ast.IsNot: False}
_TENSOR_COMPARISONS = (ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE)


@dataclass(eq=False)
class Frame:
    """What is known while one function, or a module's top level, is looked at."""

    info: FunctionInfo
    scope: Scope
    outcome: Outcome
    returns: list[Value] = field(default_factory=list)
    read: list[Place] = field(default_factory=list)  # copies of logits that something has read
    copies: list[Finding] = field(default_factory=list)
    pending: list[V.Function] = field(default_factory=list)  # functions defined in it
    nested: int = 0
    opaque: bool = False  # a generator or a coroutine: a call returns something else


class Expressions:
    program: Program
    frame: Frame

    # What calls.py, objects.py and walk.py add
    assign: Callable[[ast.expr, Value], None]
    operate: Callable[[Any, ast.operator, ast.expr, ast.expr], Value]
    bind_elements: Callable[[ast.expr, ast.expr, bool], None]
    member: Callable[[Value, str | int | None], Value]
    imported: Callable[[V.Import], Value]

    def place(self, node: Any) -> Place:
        return self.frame.info.module.source().place(node)

    def report(self, finding: Finding | None) -> None:
        if finding is not None:
            self.frame.outcome.findings.append(finding)

    def value(self, node: ast.expr) -> Value:
        if self.frame.nested >= _DEEPEST:
            return UNKNOWN
        self.frame.nested += 1
        result: Value = self.handle(node)
        self.frame.nested -= 1
        return result

    def handle(self, node: ast.AST) -> Any:
        kind = type(node)
        if kind not in _METHODS:
            name = f"of_{kind.__name__.lower()}"
            _METHODS[kind] = getattr(type(self), name, type(self).of_parts)
        return _METHODS[kind](self, node)

    def of_parts(self, node: ast.AST) -> Value:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self.value(child)
        return UNKNOWN

    def of_joinedstr(self, _: ast.JoinedStr) -> Value:
        return UNKNOWN  # what a message prints does not matter

    def of_constant(self, node: ast.Constant) -> Value:
        return V.Const(node.value)

    def of_name(self, node: ast.Name) -> Value:
        found = self.frame.scope.lookup(node.id)
        if found is None:
            default = f"builtins.{node.id}"
            module = self.frame.info.module
            if module.stars and not hasattr(builtins, node.id):
                paths = tuple(f"{dotted}.{node.id}" for dotted, _ in module.stars)
                return self.imported(V.Import((*paths, default), module, module.stars[-1][1]))
            return V.External(_CONVENTIONS.get(node.id, default))
        if isinstance(found, V.Sliced) and found.copied:
            self.frame.read.append(found.copied)
        return self.imported(found) if isinstance(found, V.Import) else found

    # Attributes and items

    def of_attribute(self, node: ast.Attribute) -> Value:
        reads = len(self.frame.read)
        owner = self.value(node.value)
        if node.attr in METADATA:
            del self.frame.read[reads:]  # it looks at a tensor, but not into it
            return NUMBER
        return self.member(owner, node.attr)

    def of_subscript(self, node: ast.Subscript) -> Value:
        index = node.slice
        owner, which = self.value(node.value), self.value(index)
        if isinstance(index, ast.Constant) and isinstance(index.value, str):
            return self.member(owner, index.value)
        if self.selects(index, which):
            return self.selected(node, owner, index)
        if owner is NUMBER:
            return NUMBER  # x.shape[0]
        if isinstance(owner, V.Mask) or names.is_mask(node.value):
            several = names.slices_time(index) or isinstance(which, V.Mask)
            if not several and not names.is_labels(index):
                return NUMBER  # mask[i]: one number, if the mask has one dimension
            return owner if isinstance(owner, V.Mask) else UNKNOWN
        if isinstance(index, ast.Constant) and isinstance(index.value, int):
            return self.member(owner, index.value)
        if names.slices_time(index):
            return _slice_of(index)
        return self.member(owner, None) if isinstance(owner, (V.Record, *V.TENSORS)) else UNKNOWN

    def selects(self, index: ast.expr, value: Value) -> bool:
        return isinstance(value, V.Mask) or (names.is_mask(index) and not is_number(value))

    def selected(self, node: ast.expr, owner: Value, mask: ast.expr) -> Value:
        """What is left of `owner` where a mask chooses from it."""
        loss = V.as_loss(owner)
        if loss is None:
            return UNKNOWN if isinstance(owner, V.TENSORS) else owner
        if loss.reduced:
            place = self.place(node)
            self.report(no_effect(loss, f"`{names.text(mask)}` selects from", place, place))
        return replace(loss, uneven=True, ignores=None)

    # Literals, choices, comprehensions

    def of_tuple(self, node: ast.Tuple | ast.List | ast.Set) -> Value:
        values = [self.value(element) for element in node.elts]
        starred = any(isinstance(element, ast.Starred) for element in node.elts)
        return UNKNOWN if starred else V.items(values[:_LONGEST])

    of_list = of_set = of_tuple

    def of_dict(self, node: ast.Dict) -> Value:
        fields: dict[str | int, Value] = {}
        for key, item in zip(node.keys, node.values, strict=True):
            value = self.value(item)
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                fields[key.value] = value
                self.store(key.value, value)
        return V.record(NUMBER, fields)

    def store(self, name: str, value: Value) -> None:
        """Notes that some object's `.name` was set to `value`."""
        if names.is_loss(name):
            self.frame.outcome.stored.append((name, value))

    def of_ifexp(self, node: ast.IfExp) -> Value:
        outcome = self.test(node.test)
        if outcome is not None:
            return self.value(node.body if outcome else node.orelse)
        return join(self.value(node.body), self.value(node.orelse))

    def of_namedexpr(self, node: ast.NamedExpr) -> Value:
        value = self.value(node.value)
        self.assign(node.target, value)
        return value

    def of_yield(self, node: ast.Yield | ast.YieldFrom) -> Value:
        self.frame.opaque = True
        return self.of_parts(node)

    of_yieldfrom = of_yield

    def of_listcomp(self, node: Any) -> Value:
        """All elements are alike."""
        outside, self.frame.scope = self.frame.scope, Scope(self.frame.scope)
        for generator in node.generators:
            self.bind_elements(generator.target, generator.iter, True)
            for condition in generator.ifs:
                self.value(condition)
        value = self.value(node.value if isinstance(node, ast.DictComp) else node.elt)
        self.frame.scope = outside
        return V.items([value])

    of_setcomp = of_generatorexp = of_dictcomp = of_listcomp

    # Operators

    def of_binop(self, node: ast.BinOp) -> Value:
        return self.operate(node, node.op, node.left, node.right)

    def of_unaryop(self, node: ast.UnaryOp) -> Value:
        value = self.value(node.operand)
        if isinstance(node.op, ast.USub) and isinstance(value, V.Const):
            return V.Const(-value.value) if isinstance(value.value, (int, float)) else UNKNOWN
        return NUMBER if isinstance(node.op, ast.Not) else value

    def of_compare(self, node: ast.Compare) -> Value:
        operands = [node.left, *node.comparators]
        values = [self.value(operand) for operand in operands]
        if not all(isinstance(op, _TENSOR_COMPARISONS) for op in node.ops):
            return NUMBER  # is, in
        return self.compare(node, operands, values)

    def compare(self, node: ast.expr, operands: list[ast.expr], values: list[Value]) -> Value:
        """Whether a comparison makes a mask or, of numbers and strings, only True or False."""
        known = list(zip(operands, values, strict=True))
        pairs = [pair for a, b in pairwise(known) for pair in ((a, b), (b, a))]
        labels = [
            not is_number(value) and names.compares_labels(labels, other)
            for (labels, value), (other, _) in pairs
        ]
        calls = any(isinstance(operand, (ast.Call, ast.Subscript)) for operand in operands)
        made = calls and "arange" in names.text(node)
        if made or any(labels) or any(isinstance(value, V.Mask) for value in values):
            text = names.text(node)
            return V.Mask(made or names.is_never_empty(text))
        return NUMBER if any(value is NUMBER or V.is_count(value) for value in values) else UNKNOWN

    def test(self, node: ast.expr) -> bool | None:
        """The outcome of a test, where what is known decides it."""
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            inner = self.test(node.operand)
            return None if inner is None else not inner
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            left, right = self.value(node.left), self.value(node.comparators[0])
            same = _EQUAL.get(type(node.ops[0]))
            if same is None or not isinstance(right, V.Const):
                return None
            if isinstance(left, V.Const):
                return (left.value == right.value) == same
            unknown = isinstance(left, V.Thing) or left is V.FOREIGN
            return not same if right == NONE and not unknown else None
        value = self.value(node)
        named = isinstance(node, (ast.Name, ast.Attribute)) and isinstance(value, V.Const)
        return bool(value.value) if named else None  # type: ignore[attr-defined]


def _slice_of(index: ast.expr) -> Value:
    """Sliced for x[..., :-1, :], x[:, :-1] and x[..., 1:], x[:, 1:]."""
    parts = index.elts if isinstance(index, ast.Tuple) else []
    for part in parts:
        if isinstance(part, ast.Slice) and part.step is None:
            bounds = tuple(names.text(bound) if bound else "" for bound in (part.lower, part.upper))
            if bounds in {("", "-1"), ("1", "")}:
                tail = bounds == ("1", "")
                return V.Sliced(tail, second=not tail and part is parts[1])
    return UNKNOWN
