# SPDX-License-Identifier: BSD-3-Clause
"""What an expression is, as far as a loss and its mask are concerned.

`walk` makes values from one file alone. What another function, class or file decides is a *term*
there (`Param`, `Import`, `Member`, `Called`, ...), which `resolve` replaces when all are known.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from masked_loss_lint.program import ClassInfo, FunctionInfo, Module
    from masked_loss_lint.torch_losses import LossSpec

_DEEPEST = 24  # terms inside terms; a program that nests more is not understood


@dataclass(frozen=True, order=True)
class Place:
    """Where an expression begins; line and column count from 1, line from the start of a cell."""

    path: str
    cell: int  # of a notebook, else 0
    line: int
    column: int
    lines: tuple[int, int] = field(default=(0, 0), compare=False)  # first and last, of the text

    def __str__(self) -> str:
        cell = f"cell {self.cell}:" if self.cell else ""
        return f"{self.path}:{cell}{self.line}"


class Value:
    """Base of all values; itself the value of which nothing is known."""

    __slots__ = ("_depth",)

    @property
    def depth(self) -> int:
        return getattr(self, "_depth", 0)


V = TypeVar("V", bound=Value)


def bounded(value: V, *inside: Value) -> V | Value:
    """`value`, or UNKNOWN where the terms inside it are nested too deeply."""
    depth = 1 + max((v.depth for v in inside), default=0)
    if depth > _DEEPEST:
        return UNKNOWN
    object.__setattr__(value, "_depth", depth)
    return value


UNKNOWN = Value()
FOREIGN = Value()  # an object of another library: what its attributes hold is nobody's guess
NUMBER = Value()  # a number, or a tensor of one element


@dataclass(frozen=True, slots=True)
class Const(Value):
    """None, a string, a bool, a number."""

    value: object


NONE = Const(None)


# Losses, masks and what is computed from them


@dataclass(frozen=True, slots=True)
class Loss(Value):
    """What a loss function returned, or a number made of it."""

    function: str
    reduction: str  # "none", "mean", "sum"
    place: Place
    ignores: Value | None = None  # its ignore_index, if the program names one
    uneven: bool = False  # a mean over those tokens only that a mask selects
    detached: bool = False

    @property
    def reduced(self) -> bool:
        return self.reduction != "none"


@dataclass(frozen=True, slots=True)
class Mask(Value):
    """A tensor of zeros and ones, known by how it was computed."""

    key: str
    never_empty: bool = False  # made of lengths or of padding: a sequence has a token


@dataclass(frozen=True, slots=True)
class Count(Value):
    """The sum of a tensor; `guarded` where it cannot be 0."""

    key: object
    dims: str
    never_empty: bool = False
    guarded: bool = False
    of_mask: bool = False


@dataclass(frozen=True, slots=True)
class Sliced(Value):
    """x[..., :-1, :], or x[..., 1:] (the tail); `copied`: by contiguous(), where."""

    tail: bool
    second: bool = False  # it is the second dimension that was sliced
    copied: Place | None = None


@dataclass(frozen=True, slots=True)
class Factor:
    value: Value
    key: object  # equal keys: the same tensor
    text: str
    kind: str  # "mask", "weights" by its name, or ""
    never_empty: bool = False


@dataclass(frozen=True, slots=True)
class Product(Value):
    factors: tuple[Factor, ...]
    place: Place


@dataclass(frozen=True, slots=True)
class Reduced(Value):
    """base.sum() or base.mean(); over `dims` only, if these are given."""

    op: str
    base: Value
    place: Place
    dims: str = ""
    is_loss: bool = False  # its name, or that of its function, says so


@dataclass(frozen=True, slots=True)
class Ratio(Value):
    """A sum divided by the sum of a mask."""

    base: Value
    place: Place
    is_loss: bool = False


# Terms


@dataclass(frozen=True, slots=True)
class Param(Value):
    function: FunctionInfo
    name: str


@dataclass(frozen=True, slots=True)
class Import(Value):
    paths: tuple[str, ...]  # of which the first that exists is meant
    importer: Module
    level: int = 0


@dataclass(frozen=True, slots=True)
class Member(Value):
    """owner.key, owner["key"] or owner[0]; key None: any of its elements."""

    owner: Value
    key: str | int | None
    reader: Module


@dataclass(frozen=True, slots=True)
class Called(Value):
    callee: Value
    args: tuple[Value, ...]
    keywords: tuple[tuple[str, Value], ...]
    place: Place
    reader: Module
    wraps: int = -1  # which argument is a model by its name: a library may give it back
    spread: bool = False  # *args or **kwargs may hold anything


@dataclass(frozen=True, slots=True)
class Either(Value):
    test: Value
    yes: Value
    no: Value


@dataclass(frozen=True, slots=True)
class Test(Value):
    op: str  # "==", "truth", "not"
    left: Value
    right: Value = NONE


@dataclass(frozen=True, slots=True)
class Changed(Value):
    """A loss that is "detached", "selected" from by a mask, or "shaped" as one number cannot be."""

    base: Value
    how: str


@dataclass(frozen=True, slots=True)
class Added(Value):
    left: Value
    right: Value


# Objects


@dataclass(frozen=True, slots=True)
class External(Value):
    """Something of torch, masked_loss or Python by its full name."""

    path: str


@dataclass(frozen=True, slots=True)
class ModuleRef(Value):
    module: Module


@dataclass(frozen=True, slots=True)
class Function(Value):
    info: FunctionInfo
    receiver: Value | None = None


@dataclass(frozen=True, slots=True)
class Class(Value):
    info: ClassInfo


@dataclass(frozen=True, slots=True)
class Instance(Value):
    info: ClassInfo
    call: Called | None = None  # how it was made, if known


@dataclass(frozen=True, slots=True)
class Super(Value):
    info: ClassInfo
    receiver: Value


@dataclass(frozen=True, slots=True)
class LossModule(Value):
    spec: LossSpec
    reduction: str | None  # None: not known
    ignores: Value | None = None


@dataclass(frozen=True, slots=True)
class Partial(Value):
    callee: Value
    args: tuple[Value, ...]
    keywords: tuple[tuple[str, Value], ...]


@dataclass(frozen=True, slots=True)
class Record(Value):
    """Named fields over a base: an output object, a dictionary."""

    base: Value
    fields: tuple[tuple[str | int, Value], ...]

    def get(self, key: str | int) -> Value | None:
        return next((value for name, value in self.fields if name == key), None)

    def set(self, key: str | int, value: Value) -> Value:
        others = tuple(f for f in self.fields if f[0] != key)
        return bounded(
            Record(self.base, (*others, (key, value))), self.base, *(v for _, v in others), value
        )


@dataclass(frozen=True, slots=True)
class Tuple(Value):
    items: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class Many(Value):
    """A list of values of one kind."""

    each: Value


TERMS = (Param, Import, Member, Called, Either, Changed, Added, Product, Reduced, Ratio)


def text_of(value: Value | None) -> str | None:
    """The string that a value is known to be."""
    return value.value if isinstance(value, Const) and isinstance(value.value, str) else None


def is_number(value: Value) -> bool:
    if isinstance(value, Const):
        return isinstance(value.value, (int, float))
    return value is NUMBER or isinstance(value, Count)


def same(a: Value, b: Value) -> bool:
    """Equality, and False for terms that are too large to compare."""
    return a is b or (type(a) is type(b) and a.depth < 8 and b.depth < 8 and a == b)


def alternatives(value: Value) -> Iterator[Value]:
    """The values that the branches of a program leave."""
    pending = [value]
    for _ in range(16):
        if not pending:
            return
        current = pending.pop()
        if isinstance(current, Either):
            pending += [current.no, current.yes]
        else:
            yield current


def join(a: Value | None, b: Value | None) -> Value:
    """What is known of something that is either a or b."""
    if a is None or b is None:
        return a or b or UNKNOWN
    if a is b or a == NONE or (is_number(a) and isinstance(b, Loss) and b.reduced):
        return b
    if b == NONE or (is_number(b) and isinstance(a, Loss) and a.reduced):
        return a
    if is_number(a) and is_number(b):
        return a if a == b else NUMBER
    match a, b:
        case Loss(), Loss():
            if a.reduced != b.reduced:
                return UNKNOWN
            first = min(a, b, key=lambda loss: loss.place)
            return replace(first, uneven=a.uneven and b.uneven)
        case LossModule(), LossModule():
            known = None not in (a.reduction, b.reduction)
            return a if known and (a.reduction == "none") == (b.reduction == "none") else UNKNOWN
        case Mask(), Mask():
            return a
        case Tuple(), Tuple() if len(a.items) == len(b.items):
            return Tuple(tuple(map(join, a.items, b.items)))
        case Many(), Many():
            return Many(join(a.each, b.each))
        case Instance(), Instance() if a.info is b.info:
            return a if a.call == b.call else Instance(a.info)
        case (Record(), _) | (_, Record()):
            return _join_records(a, b)
    return a if a.depth < 8 and type(a) is type(b) and a == b else UNKNOWN


def _join_records(a: Value, b: Value) -> Value:
    """The fields of both: what one branch adds to an object, the other may have too."""
    a, b = (v if isinstance(v, Record) else Record(v, ()) for v in (a, b))
    if isinstance(a.base, LossModule) or isinstance(b.base, LossModule):
        return UNKNOWN  # criterion.reduction = ... on one of them
    names = dict.fromkeys([name for name, _ in (*a.fields, *b.fields)])
    fields = tuple((name, join(a.get(name), b.get(name))) for name in names)
    return Record(a.base if a.base is b.base else join(a.base, b.base), fields)
