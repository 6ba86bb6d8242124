# SPDX-License-Identifier: BSD-3-Clause
"""Tensors of one file as values: methods, products, sums, quotients."""

from __future__ import annotations

import ast
from dataclasses import replace

from masked_loss_lint import local, names
from masked_loss_lint import values as V
from masked_loss_lint.expressions import Expressions
from masked_loss_lint.values import NUMBER, UNKNOWN, Value, alternatives, bounded, is_number

_REDUCTIONS = {"sum": "sum", "mean": "mean", "nansum": "sum", "nanmean": "mean"}
_COMPARISONS = {"ne", "eq", "gt", "ge", "lt", "le", "logical_not"}
_LIKE = {"ones_like", "zeros_like", "full_like"}
_SCALING = {"abs", "neg", "nan_to_num", "clamp", "clamp_min", "clamp_max", "exp", "sqrt"}
_CLAMPS = {"clamp", "clamp_min", "clip", "maximum", "clamp_", "clamp_min_"}
_ONE = {"1", "()", "(1,)", "[]", "[1]"}  # the sizes of a tensor of one element
_SHAPED = {"view", "reshape"}
_FILLS = {"masked_fill", "masked_fill_", "fill_", "full", "full_like", "new_full", "where", "pad"}
_FILLING = {"value", "fill_value", "padding_value", "constant_values", "label_pad_token_id"}


_PRODUCTS = {"mul", "mul_", "multiply", "div", "div_", "divide", "true_divide"}


class Tensors(Expressions):
    def _note_fills(self, node: ast.Call, name: str) -> None:
        """Remembers the constants that are put in the place of labels, such as -100."""
        given = [k.value for k in node.keywords if k.arg in _FILLING]
        if name in _FILLS:
            given += node.args[1:]
        for argument in given:
            self.note_fill(argument)

    def note_fill(self, node: ast.expr) -> None:
        value = self.value(node)
        if isinstance(value, V.Const) and type(value.value) is int:
            self.module.fills.add(value.value)
        elif {"ignore", "pad"} & set(names.words(names.last_name(node))):
            self.module.fills.add("any")

    def _torch(self, name: str, node: ast.Call) -> Value | None:
        """torch.sum(x) is x.sum(), and so on; None: an ordinary call."""
        if not node.args or any(isinstance(a, ast.Starred) for a in node.args):
            return None
        first, rest = node.args[0], node.args[1:]
        self._note_fills(node, name)
        if name == "einsum" and len(rest) == 2:
            product = self.operate(node, ast.Mult(), rest[0], rest[1])
            whole = isinstance(first, ast.Constant) and str(first.value).endswith("->")
            return self._reduce("sum", node, product, "") if whole else product
        if name in {"max", "min", "maximum"} and len(rest) == 1:
            values = [self.count_of(self.value(a)) for a in node.args]
            count = next((v for v in values if isinstance(v, V.Count)), None)
            if count is not None and name != "min":
                return replace(count, guarded=True)
            return NUMBER if all(map(is_number, values)) else None
        if name == "where" and len(rest) == 2:
            return self._where(node, *node.args)
        if name in _LIKE:
            return V.Mask(names.text(node)) if names.is_labels(first) else UNKNOWN
        if name in {"tensor", "as_tensor", "scalar_tensor", "FloatTensor"}:
            value = self.value(first)
            element = (
                first.elts[0] if isinstance(first, ast.List) and len(first.elts) == 1 else first
            )
            return NUMBER if is_number(value) or names.is_scalar(element) else UNKNOWN
        if name in {"zeros", "ones", "full", "rand", "randn", "empty"}:
            return NUMBER if names.text(first) in _ONE else UNKNOWN
        receiver = self.value(first)
        function = ast.copy_location(ast.Attribute(first, name, ast.Load()), node)
        method = ast.copy_location(ast.Call(function, rest, node.keywords), node)
        return self._tensor_method(method, first, name, receiver)

    def _where(self, node: ast.Call, test: ast.expr, yes: ast.expr, no: ast.expr) -> Value:
        condition, a, b = self.value(test), self.value(yes), self.value(no)
        chosen = a if is_number(b) or "zeros" in names.text(no) else b if is_number(a) else None
        if chosen is None:
            return UNKNOWN
        if self._selects(test, condition) and isinstance(chosen, V.TERMS):
            self.emit("chosen", node, chosen, names.text(test))
        return chosen

    def _tensor_method(
        self, node: ast.Call, owner: ast.expr, name: str, receiver: Value
    ) -> Value | None:
        whole = not node.args and all(k.arg == "dtype" for k in node.keywords)
        if name in _PRODUCTS and len(node.args) == 1:
            op: ast.operator = ast.Mult() if name.startswith("mul") else ast.Div()
            result = self.operate(node, op, owner, node.args[0])
            if name.endswith("_"):
                self.assign(owner, result)
            return result
        if name in {"add", "sub", "add_", "sub_"} and len(node.args) == 1 and not node.keywords:
            return self.operate(node, ast.Add(), owner, node.args[0])
        if name in {"dot", "inner", "vdot", "matmul"} and len(node.args) == 1:
            product = self.operate(node, ast.Mult(), owner, node.args[0])
            return product if name == "matmul" else self._reduce("sum", node, product, "")
        if name in _REDUCTIONS:
            given = [*node.args, *(k.value for k in node.keywords if k.arg != "dtype")]
            dims = ", ".join(map(names.text, given))
            return self._reduced(_REDUCTIONS[name], node, owner, receiver, dims)
        count = self.count_of(receiver)
        if name in _CLAMPS and isinstance(count, V.Count):
            guarded = replace(count, guarded=True)
            if name.endswith("_"):
                self.assign(owner, guarded)
            return guarded
        if name in {"masked_fill", "masked_fill_", "masked_select"} and node.args:
            self._note_fills(node, name)
            selects = self._selects(node.args[0], self.value(node.args[0]))
            if selects and isinstance(receiver, V.TERMS):
                self.emit("chosen", node, receiver, names.text(node.args[0]))
            how = "selected" if name == "masked_select" else "filled"
            known = isinstance(receiver, V.TERMS)
            return bounded(V.Changed(receiver, how), receiver) if known else UNKNOWN
        if name in _COMPARISONS and not isinstance(receiver, V.Mask) and node.args:
            other = node.args[-1]
            return self.compare(node, [owner, other], [receiver, self.value(other)])
        if name == "new_tensor" and len(node.args) == 1:
            number = is_number(self.value(node.args[0])) or names.is_scalar(node.args[0])
            return NUMBER if number else UNKNOWN
        self._note_fills(node, name)
        if name in names.VIEWS:
            return self._viewed(node, name, receiver)
        if isinstance(receiver, V.Count):
            return receiver if name == "item" else NUMBER
        if is_number(receiver) or name in {"item", "numel", "dim", "any", "all", "nelement"}:
            return NUMBER if whole else UNKNOWN
        if isinstance(receiver, V.Mask):
            return NUMBER if whole and name != "size" else UNKNOWN
        if name in _SCALING and isinstance(receiver, V.TERMS):
            return receiver
        if isinstance(receiver, V.Sliced):
            return UNKNOWN
        return None

    def _viewed(self, node: ast.Call, name: str, receiver: Value) -> Value | None:
        """The same tensor for our purpose: moved, cast, or in another shape."""
        if name == "detach" and isinstance(receiver, V.TERMS):
            return bounded(V.Changed(receiver, "detached"), receiver)
        if name in _SHAPED and isinstance(receiver, V.TERMS):
            flat = ", ".join(map(names.text, node.args)) in {"-1", "1", "()", "(1,)", "(-1,)"}
            return receiver if flat else bounded(V.Changed(receiver, "shaped"), receiver)
        if isinstance(receiver, V.Sliced):
            if name == "contiguous" and not receiver.tail:
                return replace(receiver, copied=self.place(node))
            return replace(receiver, second=receiver.second and name not in names.SHAPES)
        return receiver

    # Arithmetic

    def operate(
        self, node: ast.expr | ast.stmt, op: ast.operator, left: ast.expr, right: ast.expr
    ) -> Value:
        a, b = self.value(left), self.value(right)
        if isinstance(op, ast.Mult):
            for loss, inverse in ((a, right), (b, left)):
                if _is_inverse(inverse):
                    return self._divide(node, loss, inverse.right, UNKNOWN)  # type: ignore[attr-defined]
            return self._multiply(node, (left, a), (right, b))
        if isinstance(op, (ast.Div, ast.FloorDiv)):
            return self._divide(node, a, right, b)
        if isinstance(op, (ast.Add, ast.Sub)):
            a = NUMBER if names.is_auxiliary(left) else a
            return self.add(a, NUMBER if names.is_auxiliary(right) else b)
        if isinstance(op, ast.Pow) and isinstance(a, V.TERMS):
            return a
        if is_number(a) and is_number(b):
            return NUMBER
        masks = isinstance(a, V.Mask) or isinstance(b, V.Mask)
        joins = isinstance(op, (ast.BitAnd, ast.BitOr, ast.BitXor))
        return V.Mask(names.text(node)) if masks and joins else UNKNOWN

    def add(self, a: Value, b: Value) -> Value:
        if is_number(a) or is_number(b):
            a, b = self.count_of(a), self.count_of(b)
        for value, other in ((a, b), (b, a)):
            if is_number(other) and not (isinstance(other, V.Count) and isinstance(value, V.Const)):
                if isinstance(value, V.Count):
                    return replace(value, guarded=True)
                return NUMBER if is_number(value) else value
        for value, other in ((a, b), (b, a)):
            if isinstance(value, V.Count) and isinstance(other, V.Const):
                return replace(value, guarded=True)
        if isinstance(a, V.TERMS) and isinstance(b, V.TERMS):
            return bounded(V.Added(a, b), a, b)
        return UNKNOWN

    def factor(self, node: ast.expr, value: Value) -> V.Factor | None:
        """None for a number."""
        mask = isinstance(value, V.Mask) or (names.is_mask(node) and not is_number(value))
        if is_number(value) or (
            names.is_coefficient(node) and not mask and not isinstance(value, V.TERMS)
        ):
            return None
        kind = "mask" if mask else "weights" if names.is_weights(node) else ""
        text = names.text(node)
        lengths = isinstance(value, V.Mask) and value.never_empty
        return V.Factor(
            value, self.key(node, value), text, kind, lengths or names.is_never_empty(text)
        )

    def key(self, node: ast.expr, value: Value) -> object:
        if isinstance(value, V.Mask):
            return value.key
        return value if isinstance(value, V.TERMS) and value.depth < 4 else names.key(node)

    def _multiply(
        self, node: ast.expr | ast.stmt, a: tuple[ast.expr, Value], b: tuple[ast.expr, Value]
    ) -> Value:
        factors: list[V.Factor] = []
        for operand, value in (a, b):
            if isinstance(value, V.Product):
                factors += value.factors
            elif (factor := self.factor(operand, value)) is not None:
                factors.append(factor)
        if not factors:
            return NUMBER
        if len(factors) == 1:
            return factors[0].value
        masks = [f for f in factors if f.kind == "mask"]
        if len(masks) == len(factors):
            return V.Mask(names.text(node), any(f.never_empty for f in factors))
        if len(factors) > 12:
            return UNKNOWN
        place = self.place(node)
        product = bounded(V.Product(tuple(factors), place), *(f.value for f in factors))
        if masks and isinstance(product, V.Product):
            self.emit("product", node, product, masks[0].text)
        return product

    def _reduced(
        self, op: str, node: ast.Call, owner: ast.expr, receiver: Value, dims: str
    ) -> Value:
        if isinstance(receiver, V.TERMS) and not names.is_mask(owner):
            return self._reduce(op, node, receiver, dims, names.text(owner))
        if is_number(receiver):
            return NUMBER
        if op == "mean":
            is_loss = _is_error(owner) and not dims
            return V.Reduced(op, UNKNOWN, self.place(node), dims, is_loss) if not dims else UNKNOWN
        if isinstance(receiver, V.Mask) or names.is_mask(owner):
            key = self.key(owner, receiver)
            never = isinstance(receiver, V.Mask) and receiver.never_empty
            return V.Count(
                key, dims, never or names.is_never_empty(names.text(owner)), of_mask=True
            )
        if _is_error(owner) and not dims:
            return V.Reduced(op, UNKNOWN, self.place(node), dims, True)
        return V.Count(self.key(owner, receiver), dims)

    def _reduce(self, op: str, node: ast.Call, base: Value, dims: str, owner: str = "") -> Value:
        result = bounded(V.Reduced(op, base, self.place(node), dims), base)
        parallel = "devices" if self.frame.devices else ""
        if not dims:
            self.emit("reduced", node, result, parallel)
        return result

    def _divide(
        self, node: ast.expr | ast.stmt, left: Value, divisor: ast.expr, right: Value
    ) -> Value:
        if names.is_accumulation(divisor) and isinstance(left, V.TERMS):
            self.emit("accumulated", node, left, names.text(divisor))
            return left
        count = self.count_of(right)
        if isinstance(count, V.Count):
            sums = [v for v in alternatives(left) if isinstance(v, V.Reduced) and v.op == "sum"]
            masked = [s for s in sums if _is_masked_by(s, count)]
            if masked:
                local.unguarded_mean(self, node, divisor, masked[0], count)
            if masked or (sums and count.of_mask):
                return bounded(V.Ratio(left, self.place(node)), left) if not count.dims else UNKNOWN
        if is_number(left) and not isinstance(left, V.Count):
            return NUMBER
        return UNKNOWN if isinstance(right, V.Mask) else left

    def count_of(self, value: Value) -> Value:
        """The count that a value is: x.sum() of some x of which only a term is known, too."""
        plain = isinstance(value, V.Reduced) and isinstance(
            value.base, (V.Param, V.Member, V.Called)
        )
        if isinstance(value, V.Reduced) and value.op == "sum" and plain:
            return V.Count(value.base, value.dims)
        return value


def _is_inverse(node: ast.expr) -> bool:
    """True for 1 / steps."""
    divides = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)
    return divides and getattr(node.left, "value", None) == 1  # type: ignore[attr-defined]


def _is_error(node: ast.expr) -> bool:
    """True for (a - b) ** 2, (a - b).abs(): what a mean squared or absolute error is a mean of."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        return isinstance(node.left, ast.BinOp) and isinstance(node.left.op, ast.Sub)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        by_torch = names.text(node.func.value) == "torch" and node.args
        inner = node.args[0] if by_torch else node.func.value
        error = node.func.attr in {"abs", "pow", "square"}
        return error and isinstance(inner, ast.BinOp) and isinstance(inner.op, ast.Sub)
    return False


def _is_masked_by(total: V.Reduced, count: V.Count) -> bool:
    factors = total.base.factors if isinstance(total.base, V.Product) else ()
    for alternative in alternatives(total.base):
        if isinstance(alternative, V.Product):
            factors = alternative.factors
    return total.dims == count.dims and any(factor.key == count.key for factor in factors)
