# SPDX-License-Identifier: BSD-3-Clause
"""Arithmetic of abstract tensors: what an operation on a loss, a mask or a number gives."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import TypeGuard

from masked_loss_lint import names
from masked_loss_lint.events import Division, Event, Frame, Multiplication, Reduction
from masked_loss_lint.values import (
    NUMBER,
    UNKNOWN,
    Const,
    Count,
    External,
    Loss,
    Mask,
    Number,
    Product,
    Sliced,
    Value,
    is_number,
    join,
)

_REDUCTIONS = {"sum", "mean", "nansum", "nanmean"}
_LIKE = {"ones_like", "zeros_like", "full_like"}
_COMPARISONS = {"ne", "eq", "gt", "ge", "lt", "le", "logical_not"}
_SCALING = {"abs", "neg", "nan_to_num", "clamp", "clamp_min", "clamp_max"}
_CREATION = {"arange", "linspace", "randint", "randperm", "eye"}
_ONE = {"1", "()", "(1,)", "[]", "[1]"}  # the sizes of a tensor of one element


class Tensors:
    """Computes with values, and emits an event where a loss meets something."""

    def __init__(self, emit: Callable[[Event], None]) -> None:
        self._emit = emit

    def operate(
        self,
        node: ast.expr | ast.stmt,
        op: ast.operator,
        left_node: ast.expr,
        right_node: ast.expr,
        left: Value,
        right: Value,
        frame: Frame,
    ) -> Value:
        if isinstance(op, ast.Mult):
            for loss, factor in ((left, right_node), (right, left_node)):
                if isinstance(loss, Loss) and _is_inverse(factor):
                    return self._divide(node, loss, factor.right, UNKNOWN, frame)
            if isinstance(left, Loss):
                return self._multiply(node, left, right_node, right, frame)
            if isinstance(right, Loss):
                return self._multiply(node, right, left_node, left, frame)
        if isinstance(op, ast.Div) and isinstance(left, Loss):
            return self._divide(node, left, right_node, right, frame)
        if isinstance(op, (ast.Add, ast.Sub)):
            left, right = (
                NUMBER if _is_unknown(value) and names.is_auxiliary(operand) else value
                for value, operand in ((left, left_node), (right, right_node))
            )
            return add(left, right)
        if is_number(left) and is_number(right):
            return NUMBER
        masks = [value for value in (left, right) if isinstance(value, Mask)]
        if masks and isinstance(op, (ast.Mult, ast.BitAnd, ast.BitOr, ast.BitXor)):
            return Mask(ast.unparse(node)) if isinstance(node, ast.expr) else masks[0]
        return UNKNOWN

    def compare(self, node: ast.expr, operands: list[ast.expr], values: list[Value]) -> Value:
        """Whether a comparison makes a mask or, of numbers and strings, only True or False."""
        if any(isinstance(value, Const) and isinstance(value.value, str) for value in values):
            return NUMBER
        known = list(zip(operands, values, strict=True))
        pairs = [pair for a, b in pairwise(known) for pair in ((a, b), (b, a))]
        if any(isinstance(value, Mask) for value in values) or any(
            not is_number(value) and names.compares_labels(labels, other)
            for (labels, value), (other, _) in pairs
        ):
            return Mask(ast.unparse(node))
        if any(isinstance(value, (Count, Number)) for value in values):
            return NUMBER
        variables = [o for o in operands if not isinstance(o, ast.Constant)]
        tensors = any(isinstance(operand, (ast.Call, ast.Subscript)) for operand in variables)
        return NUMBER if not tensors and any(map(names.is_scalar, variables)) else UNKNOWN

    def _multiply(
        self, node: ast.expr | ast.stmt, loss: Loss, factor: ast.expr, value: Value, frame: Frame
    ) -> Value:
        if is_number(value):
            return loss
        if isinstance(value, Loss):
            return loss if loss.reduced and value.reduced else UNKNOWN
        self._emit(Multiplication(frame, node, loss, factor, value))
        key = value.key if isinstance(value, Mask) else names.key(factor)
        return replace(loss, product=Product(key, frame.place(node)))

    def _divide(
        self, node: ast.expr | ast.stmt, loss: Loss, divisor: ast.expr, value: Value, frame: Frame
    ) -> Value:
        self._emit(Division(frame, node, loss, divisor, value))
        if loss.reduced and loss.product and loss.product.summed and loss.reduction is None:
            return replace(loss, reduction="mean", uneven=True, product=None)
        return loss if not isinstance(value, Mask) else UNKNOWN

    def torch_function(
        self, name: str, node: ast.Call, positional: list[Value], frame: Frame
    ) -> Value:
        """torch.sum(x) is x.sum(), and so on."""
        if not node.args:
            return UNKNOWN
        first = positional[0]
        if name in {"mul", "multiply", "div", "divide", "true_divide"} and len(node.args) == 2:
            left, right = node.args
            op: ast.operator = ast.Mult() if name in {"mul", "multiply"} else ast.Div()
            return self.operate(node, op, left, right, first, positional[1], frame)
        if name in _LIKE:
            return Mask(ast.unparse(node)) if names.is_labels(node.args[0]) else UNKNOWN
        if name in {"tensor", "as_tensor", "scalar_tensor"}:
            return _made_of(node.args[0], first)
        if name in _CREATION:
            return UNKNOWN
        if name in {"zeros", "ones", "full", "rand", "randn", "empty"}:
            return NUMBER if ast.unparse(node.args[0]) in _ONE else UNKNOWN
        unreduced = len(node.args) == 1 and not node.keywords
        return self.tensor_method(name, node, node.args[0], first, unreduced, frame) or UNKNOWN

    def tensor_method(
        self,
        name: str,
        node: ast.Call,
        owner: ast.expr,
        receiver: Value,
        whole: bool,
        frame: Frame,
    ) -> Value | None:
        """`owner.name(...)` or `torch.name(owner, ...)` on a tensor; `whole`: no other argument."""
        if isinstance(receiver, Loss):
            return self._loss_method(name, node, receiver, whole, frame)
        if name in _REDUCTIONS and whole:
            key = receiver.key if isinstance(receiver, (Mask, Count)) else names.key(owner)
            return Count(key) if name == "sum" else NUMBER
        if isinstance(receiver, Count):
            return receiver if name in names.VIEWS or name == "item" else NUMBER
        if is_number(receiver):
            return NUMBER
        if isinstance(receiver, Mask):
            if name in names.VIEWS:
                return receiver
            return NUMBER if whole and name not in {"size"} else UNKNOWN
        if name in {"item", "numel", "dim", "any", "all", "size", "nelement"}:
            return NUMBER if whole else UNKNOWN
        if isinstance(receiver, Sliced):
            if name == "contiguous" and not receiver.tail:
                return replace(receiver, copied=frame.place(node))
            second = receiver.second and name not in names.SHAPES
            return replace(receiver, second=second) if name in names.VIEWS else UNKNOWN
        if name == "new_tensor" and len(node.args) == 1 and receiver == UNKNOWN:
            return _made_of(node.args[0], UNKNOWN)
        if name in _COMPARISONS and receiver == UNKNOWN and node.args:
            return self.compare(node, [owner, node.args[-1]], [receiver, UNKNOWN])
        return UNKNOWN if receiver != UNKNOWN or name in names.VIEWS else None

    def _loss_method(
        self, name: str, node: ast.Call, loss: Loss, whole: bool, frame: Frame
    ) -> Value:
        if name in _REDUCTIONS:
            if loss.reduced or whole:
                self._emit(Reduction(frame, node, loss))
            if loss.reduced:
                product = loss.product and replace(loss.product, summed=name == "sum")
                return replace(loss, product=product)
            if not whole:
                return loss
            if loss.product:  # Σ w·loss becomes a mean when it is divided by Σ w
                return replace(
                    loss, reduced=True, reduction=None, product=replace(loss.product, summed=True)
                )
            return replace(
                loss, reduced=True, reduction=name[-4:].lstrip("n"), origin=frame.place(node)
            )
        if name == "view" and loss.reduced and not whole:
            argument = node.args[-1]
            return loss if ast.unparse(argument) in {"-1", "1", "()", "(1,)"} else UNKNOWN
        if name in {"expand", "expand_as", "repeat", "view_as", "reshape"} and loss.reduced:
            return UNKNOWN
        if name in {"item", "tolist", "numpy"}:
            return NUMBER if loss.reduced else UNKNOWN
        return loss if name in names.VIEWS or name in _SCALING else UNKNOWN


def _is_unknown(value: Value) -> bool:
    return value == UNKNOWN or isinstance(value, External)


def _is_inverse(node: ast.expr) -> TypeGuard[ast.BinOp]:
    """True for 1 / steps."""
    return (
        isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.Div)
        and isinstance(node.left, ast.Constant)
        and node.left.value == 1
    )


def _made_of(node: ast.expr, value: Value) -> Value:
    """torch.tensor(...) of a number, or of a list of one, is a number."""
    alone = isinstance(node, ast.List) and len(node.elts) == 1 and names.is_scalar(node.elts[0])
    return NUMBER if alone or is_number(value) or names.is_scalar(node) else UNKNOWN


def add(left: Value, right: Value) -> Value:
    if isinstance(left, Loss) and isinstance(right, Loss):
        if left.reduced == right.reduced:
            return replace(join(left, right), product=None) if left != right else left  # type: ignore[type-var]
        return right if left.reduced else left
    if isinstance(left, Loss) and is_number(right):
        return left
    if isinstance(right, Loss) and is_number(left):
        return right
    if isinstance(left, Mask) and is_number(right):
        return left  # 1 - mask
    if isinstance(right, Mask) and is_number(left):
        return right
    return NUMBER if is_number(left) and is_number(right) else UNKNOWN


def slice_of(index: ast.expr) -> Value:
    """Sliced for x[..., :-1, :], x[:, :-1] and x[..., 1:], x[:, 1:]."""
    parts = index.elts if isinstance(index, ast.Tuple) else []
    for part in parts:
        if not isinstance(part, ast.Slice) or part.step is not None:
            continue
        lower = ast.unparse(part.lower) if part.lower else ""
        upper = ast.unparse(part.upper) if part.upper else ""
        if (lower, upper) == ("", "-1"):
            return Sliced(False, second=part is parts[1])
        if (lower, upper) == ("1", ""):
            return Sliced(True)
    return UNKNOWN
