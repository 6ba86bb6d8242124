# SPDX-License-Identifier: BSD-3-Clause
"""Abstract values: what an expression is, as far as a loss and its mask are concerned.

The analyser computes with these in place of tensors. A value says what is *known*; where two
paths of a program disagree, their `join` is UNKNOWN, and a rule stays silent.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from masked_loss_lint.project import ClassInfo, FunctionInfo, ModuleInfo, Scope
    from masked_loss_lint.source import Source
    from masked_loss_lint.torch_losses import LossSpec


@dataclass(frozen=True, order=True)
class Place:
    """Where an expression begins; line and column count from 1, line from the start of a cell."""

    path: str
    cell: int  # of a notebook, else 0
    line: int
    column: int
    source: Source = field(compare=False, repr=False)
    lines: tuple[int, int] = field(compare=False)  # first and last, in the text of `source`

    @property
    def file(self) -> str:
        return f"{self.path}:cell {self.cell}" if self.cell else self.path

    def silences(self, code: str) -> bool:
        """True when a `# noqa` comment on its first or last line covers `code`."""
        return self.source.silences(*self.lines, code)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class Value:
    """Base of all abstract values; itself the value of which nothing is known."""

    __slots__ = ()


UNKNOWN = Value()


@dataclass(frozen=True)
class Const(Value):
    """A constant: None, a string, a bool, a number."""

    value: object


@dataclass(frozen=True)
class Number(Value):
    """A number or a tensor of one element: multiplying by it only scales."""


@dataclass(frozen=True)
class External(Value):
    """Something outside the analysed files, by its canonical name: torch.nn.functional.

    What it returns has () in its name: an object of which only this is known.
    """

    path: str

    @property
    def is_object(self) -> bool:
        """False for what is called by its name: a module, a class, a function."""
        return "()" in self.path or self.path.startswith("builtins.")


@dataclass(frozen=True)
class Module(Value):
    info: ModuleInfo


@dataclass(frozen=True)
class Class(Value):
    info: ClassInfo


@dataclass(frozen=True)
class Instance(Value):
    """An object of a class in the analysed files."""

    info: ClassInfo


@dataclass(frozen=True)
class Function(Value):
    """A function of the analysed files, with the scope it closes over and its bound `self`."""

    info: FunctionInfo
    scope: Scope | None = None
    receiver: Value | None = None


@dataclass(frozen=True)
class Partial(Value):
    """functools.partial: a callable with arguments already given."""

    callee: Value
    args: tuple[ast.expr, ...]
    keywords: tuple[ast.keyword, ...]


@dataclass(frozen=True)
class LossModule(Value):
    """nn.CrossEntropyLoss(...): calling it computes a loss. `reduction` None means not known."""

    spec: LossSpec
    reduction: str | None
    uneven: bool


@dataclass(frozen=True)
class Product:
    """The factor a loss was multiplied with, and where."""

    key: str
    place: Place
    summed: bool = False


@dataclass(frozen=True)
class Loss(Value):
    """A loss: one number if `reduced`, else one number per token or sample."""

    reduced: bool
    reduction: str | None  # "mean", "sum": how it became a scalar; None: per token, or mixed
    function: str  # cross_entropy
    origin: Place
    uneven: bool = False  # its mean counts only some tokens, so micro-batches weigh differently
    product: Product | None = None


@dataclass(frozen=True)
class Mask(Value):
    """A tensor that holds a weight for each token; `key` names it across views and casts."""

    key: str


@dataclass(frozen=True)
class Count(Value):
    """`x.sum()`: a scalar, and zero when x is a mask that masks everything."""

    key: str


@dataclass(frozen=True)
class Sliced(Value):
    """`x[..., :-1, :]` (head) or `x[..., 1:]` (tail); `copied` is its .contiguous()."""

    tail: bool
    copied: Place | None = None
    second: bool = False  # it is dimension 1 still, which cross_entropy takes for the classes


@dataclass(frozen=True)
class Tuple(Value):
    items: tuple[Value, ...]


@dataclass(frozen=True)
class Losses(Value):
    """A list or a generator of losses that are all like this one."""

    each: Loss


@dataclass(frozen=True)
class Record(Value):
    """A dict, a dataclass or a model's output: values by name."""

    fields: tuple[tuple[str, Value], ...]

    def get(self, name: str) -> Value:
        return dict(self.fields).get(name, UNKNOWN)

    def set(self, name: str, value: Value) -> Record:
        return Record(tuple({**dict(self.fields), name: value}.items()))


NONE = Const(None)
NUMBER = Number()


def is_number(value: Value) -> bool:
    """True for what can only scale a loss: a number, a count, a one-element tensor."""
    if isinstance(value, Const):
        return isinstance(value.value, (int, float))
    return isinstance(value, (Number, Count))


def _either(left: Product | None, right: Product | None) -> Product | None:
    """The factor of two paths, one of which may not have multiplied."""
    if left is None or right is None:
        return left or right
    return left if left == right else None


def join(left: Value | None, right: Value | None) -> Value:
    """What is known when the value is `left` on one path and `right` on another.

    A path on which the value is None or not yet assigned says nothing: the program could not
    multiply it. A loss accumulator that starts from 0 is a loss.
    """
    if left is None or left == NONE:
        return NONE if right is None else right
    if right is None or right == NONE or left == right:
        return left
    if isinstance(left, Loss) and isinstance(right, Loss) and left.reduced == right.reduced:
        return replace(
            left,
            reduction=left.reduction if left.reduction == right.reduction else None,
            uneven=left.uneven and right.uneven,
            product=_either(left.product, right.product),
        )
    if isinstance(left, Loss) and is_number(right):
        return left
    if isinstance(right, Loss) and is_number(left):
        return right
    if is_number(left) and is_number(right):
        return NUMBER
    if isinstance(left, Mask) and isinstance(right, Mask):
        return left
    if isinstance(left, LossModule) and isinstance(right, LossModule):
        same = left.reduction == right.reduction
        return replace(left, reduction=left.reduction if same else None, uneven=False)
    if isinstance(left, Tuple) and isinstance(right, Tuple):
        if len(left.items) != len(right.items):
            return UNKNOWN
        return Tuple(tuple(join(a, b) for a, b in zip(left.items, right.items, strict=True)))
    if isinstance(left, Record) and isinstance(right, Record):
        names = [*dict(left.fields), *(n for n, _ in right.fields if n not in dict(left.fields))]
        a, b = dict(left.fields), dict(right.fields)
        return Record(tuple((name, join(a.get(name), b.get(name))) for name in names))
    return UNKNOWN
