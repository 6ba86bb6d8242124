# SPDX-License-Identifier: BSD-3-Clause
"""Tensors as values: methods, products, sums, quotients."""

from __future__ import annotations

import ast
from dataclasses import replace
from typing import Any

from masked_loss_lint import names, rules
from masked_loss_lint import values as V
from masked_loss_lint.expressions import METADATA, Expressions
from masked_loss_lint.local import is_guarded
from masked_loss_lint.values import NUMBER, UNKNOWN, Value, as_loss, is_number

_REDUCTIONS = {"sum": "sum", "mean": "mean", "nansum": "sum", "nanmean": "mean"}
_COMPARISONS = {"ne", "eq", "gt", "ge", "lt", "le", "logical_not"}
_CLAMPS = {"clamp", "clamp_min", "clip", "maximum"}
_SCALING = {"abs", "neg", "nan_to_num", "clamp", "clamp_min", "clamp_max", "exp", "sqrt"}
_ONE = {"1", "()", "(1,)", "[]", "[1]"}  # the sizes of a tensor of one element
_MADE = {"zeros", "ones", "full", "rand", "randn", "empty", "eye", "arange", "randint"}
_SELECTING = {"masked_fill", "masked_select"}
_NUMERIC = {"item", "numel", "dim", "any", "all", "nelement"}
_OPERATORS: dict[str, type[ast.operator]] = {
    **dict.fromkeys(("mul", "multiply", "dot", "inner", "vdot", "matmul"), ast.Mult),
    **dict.fromkeys(("div", "divide", "true_divide"), ast.Div),
    **dict.fromkeys(("add", "sub"), ast.Add),
}


class Tensors(Expressions):
    def torch(self, name: str, node: ast.Call) -> Value | None:
        """torch.sum(x) is x.sum(), and so on; None: an ordinary call."""
        if not node.args or any(isinstance(a, ast.Starred) for a in node.args):
            return None
        first, *rest = node.args
        if name == "einsum" and len(rest) == 2:
            product = self.operate(node, ast.Mult(), *rest)
            whole = isinstance(first, ast.Constant) and str(first.value).endswith("->")
            return self.reduce("sum", node, product, "", node) if whole else product
        if name == "where" and len(rest) == 2:
            return self._where(node, *node.args)
        if name in {"tensor", "as_tensor"}:
            alone = isinstance(first, ast.List) and len(first.elts) == 1
            element = first.elts[0] if alone else first  # type: ignore[attr-defined]
            return NUMBER if is_number(self.value(first)) or names.is_scalar(element) else UNKNOWN
        if name in _MADE:
            return NUMBER if names.text(first) in _ONE else UNKNOWN
        function = ast.copy_location(ast.Attribute(first, name, ast.Load()), node)
        method = ast.copy_location(ast.Call(function, rest, node.keywords), node)
        return self.tensor_method(method, first, name, self.value(first))

    def _where(self, node: ast.Call, test: ast.expr, yes: ast.expr, no: ast.expr) -> Value:
        condition, a, b = self.value(test), self.value(yes), self.value(no)
        chosen = a if is_number(b) or "zeros" in names.text(no) else b if is_number(a) else UNKNOWN
        if self.selects(test, condition) and as_loss(chosen) is not None:
            self.selected(node, chosen, test)
        return chosen

    def tensor_method(
        self, node: ast.Call, owner: ast.expr, name: str, base: Value
    ) -> Value | None:
        """What a method of a tensor returns, and does in place; None: an ordinary call."""
        result = self._computed(node, owner, name.rstrip("_"), base)
        if name.endswith("_") and result is not None:
            self.assign(owner, result)
        return result

    def _computed(
        self, node: ast.Call, owner: ast.expr, name: str, receiver: Value
    ) -> Value | None:
        alone = len(node.args) == 1
        if name in _OPERATORS and alone and (_OPERATORS[name] != ast.Add or not node.keywords):
            result = self.operate(node, _OPERATORS[name](), owner, node.args[0])
            summed = name in {"dot", "inner", "vdot"}
            return self.reduce("sum", node, result, "", node) if summed else result
        if name in _REDUCTIONS:
            given = [*node.args, *(k.value for k in node.keywords if k.arg != "dtype")]
            dims = ", ".join(map(names.text, given))
            return self.reduce(_REDUCTIONS[name], node, receiver, dims, owner)
        if name in _CLAMPS and isinstance(receiver, V.Total) and receiver.counts:
            return replace(receiver, guarded=True)
        if name in _SELECTING and node.args:
            mask = self.selects(node.args[0], self.value(node.args[0]))
            left = self.selected(node, receiver, node.args[0]) if mask else receiver
            return left if name == "masked_select" else receiver
        if name in _COMPARISONS and not isinstance(receiver, V.Mask) and node.args:
            other = node.args[-1]
            return self.compare(node, [owner, other], [receiver, self.value(other)])
        if name in names.VIEWS:
            return self._viewed(node, name, receiver)
        if name in METADATA:
            return NUMBER
        if is_number(receiver) or isinstance(receiver, V.Mask) or name in _NUMERIC:
            return UNKNOWN if node.args else NUMBER
        if isinstance(receiver, V.TENSORS):
            return receiver if name in _SCALING else UNKNOWN
        return UNKNOWN if isinstance(receiver, V.Sliced) else None

    def _viewed(self, node: ast.Call, name: str, receiver: Value) -> Value:
        """The same tensor for our purpose: moved, cast, or in another shape."""
        if isinstance(receiver, V.Sliced):
            if name == "contiguous" and not receiver.tail:
                return replace(receiver, copied=self.place(node))
            return replace(receiver, second=receiver.second and name not in names.SHAPES)
        loss = as_loss(receiver)
        if loss is not None and name == "detach":
            return replace(loss, detached=True)
        return receiver

    # Arithmetic

    def operate(self, node: Any, op: ast.operator, left: ast.expr, right: ast.expr) -> Value:
        a, b = self.value(left), self.value(right)
        if isinstance(op, ast.Mult):
            for loss, inverse in ((a, right), (b, left)):
                if isinstance(inverse, ast.BinOp) and _is_inverse(inverse):
                    return self._divide(node, loss, inverse.right, UNKNOWN)
            return self._multiply(node, (left, a), (right, b))
        if isinstance(op, (ast.Div, ast.FloorDiv)):
            return self._divide(node, a, right, b)
        if isinstance(op, (ast.Add, ast.Sub)):
            a = NUMBER if names.is_auxiliary(left) else a
            return self._add(a, NUMBER if names.is_auxiliary(right) else b)
        if isinstance(op, ast.Pow) and isinstance(a, V.TENSORS) and not V.is_count(a):
            return a
        masks = isinstance(a, V.Mask) or isinstance(b, V.Mask)
        joins = isinstance(op, (ast.BitAnd, ast.BitOr, ast.BitXor))
        return V.Mask() if masks and joins else UNKNOWN

    def _add(self, a: Value, b: Value) -> Value:
        for value, other in ((a, b), (b, a)):
            if is_number(other) and not V.is_count(other):
                return replace(value, guarded=True) if isinstance(value, V.Total) else value
        first, second = as_loss(a), as_loss(b)
        if first is None or second is None:
            return UNKNOWN
        return second if first.reduced else first

    def key(self, node: ast.expr, value: Value) -> object:
        known = isinstance(value, V.TENSORS) or (isinstance(value, V.Thing) and value.key)
        return value if known else names.key(node)

    def _factors(self, node: ast.expr, value: Value) -> tuple[V.Factor, ...]:
        """Of a product its own; none of a number."""
        if isinstance(value, V.Product):
            return value.factors
        mask = isinstance(value, V.Mask) or (names.is_mask(node) and not is_number(value))
        number = names.is_coefficient(node) and isinstance(value, V.Thing) and not mask
        if number or V.is_scalar(value):
            return ()
        text, known = names.text(node), not isinstance(value, V.Thing)
        never_empty = getattr(value, "never_empty", False) or names.is_never_empty(text)
        return (V.Factor(as_loss(value), self.key(node, value), text, mask, never_empty, known),)

    def _multiply(self, node: Any, a: tuple[ast.expr, Value], b: tuple[ast.expr, Value]) -> Value:
        one, two = self._factors(*a), self._factors(*b)
        if not one or not two:
            rest = b[1] if two or is_number(a[1]) else a[1]
            return rest if isinstance(rest, (V.Mask, V.Thing, *V.TENSORS)) else NUMBER
        factors = (*one, *two)
        masks = [f for f in factors if f.mask]
        if len(masks) == len(factors):
            return V.Mask(any(f.never_empty for f in factors))
        place = self.place(node)
        self.report(rules.masked(factors, place, place))
        for factor in factors if masks else ():
            if not factor.known and not factor.mask and names.is_loss(factor.text):
                text = f"cannot tell what `{factor.text}` is, which `{masks[0].text}` multiplies"
                self.report(rules.Finding(place, rules.NOTE, text, place))
        return V.Product(factors, place)

    def reduce(self, op: str, node: ast.Call, base: Value, dims: str, owner: ast.expr) -> Value:
        """The sum or mean of a value; `owner` is how it is written."""
        if isinstance(base, V.Either):
            results = [self.reduce(op, node, option, dims, owner) for option in base.options]
            return V.any_of(results)
        place = self.place(node)
        total = V.Total(op, place, dims)
        if isinstance(base, V.Product):
            self.report(rules.masked(base.factors, base.place, place, summed=not dims))
            loss = next((f.loss for f in base.factors if f.loss is not None), None)
            return replace(total, factors=base.factors, loss=_reduced(loss, total))
        loss = base if isinstance(base, V.Loss) else as_loss(base)
        if loss is not None and not names.is_mask(owner):
            if dims:
                return UNKNOWN if loss.reduced else replace(loss, ignores=None)
            if op == "mean" and isinstance(base, V.Loss):
                self.report(rules.counted_ignored(loss, place))
            return _reduced(loss, total) or UNKNOWN
        mask = isinstance(base, V.Mask) or names.is_mask(owner)
        never = getattr(base, "never_empty", False) or names.is_never_empty(names.text(owner))
        key = self.key(owner, base) if op == "sum" else None
        return replace(total, key=key, of_mask=mask, never_empty=mask and never)

    def _divide(self, node: Any, left: Value, divisor: ast.expr, count: Value) -> Value:
        if isinstance(left, V.Either):
            return V.any_of(self._divide(node, o, divisor, count) for o in left.options)
        loss, place, text = as_loss(left), self.place(node), names.text(divisor)
        if names.is_accumulation(divisor) and isinstance(left, (V.Loss, V.Total)):
            if isinstance(left, V.Total) and left.op == "ratio" and not left.dims:
                loss = loss or V.Loss("sum", "mean", left.place, uneven=True)
            self.report(rules.accumulated(loss, text, place) if loss else None)
            return left
        if isinstance(count, V.Total) and count.counts:
            total = left if isinstance(left, V.Total) and left.op == "sum" else V.Total("", place)
            same = [f for f in total.factors if f.key == count.key and total.dims == count.dims]
            weighs = (
                count.of_mask or any(f.mask for f in same) or any(f.loss for f in total.factors)
            )
            if same and weighs and not self._is_guarded(count, same, divisor):
                self.report(rules.unguarded(place, text))
            if same or (count.of_mask and (total.op or (loss and loss.reduction == "sum"))):
                mean = loss and V.Loss(loss.function, "mean", place, uneven=True)
                return UNKNOWN if total.dims or count.dims else V.Total("ratio", place, loss=mean)
        return left

    def _is_guarded(self, count: V.Total, same: list[V.Factor], divisor: ast.expr) -> bool:
        """Whether something excludes a mask without a token; else 0 / 0 is NaN for any x."""
        if count.guarded or count.never_empty or any(f.never_empty for f in same):
            return True
        keys = {names.key(ast.parse(f.text, mode="eval").body) for f in same if f.text}
        return is_guarded(self.frame.info.module.node(self.frame.info), keys, divisor)


def _reduced(loss: V.Loss | None, total: V.Total) -> V.Loss | None:
    """The sum or mean of a loss; of one that is reduced, itself."""
    if loss is None or loss.reduced:
        return loss
    uneven = loss.uneven and total.op == "mean"
    return V.Loss(loss.function, total.op, total.place, None, uneven)


def _is_inverse(node: ast.BinOp) -> bool:
    """True for 1 / steps."""
    return isinstance(node.op, ast.Div) and getattr(node.left, "value", None) == 1
