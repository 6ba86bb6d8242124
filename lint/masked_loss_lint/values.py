# SPDX-License-Identifier: BSD-3-Clause
"""What an expression is, as far as a loss and its mask are concerned."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import TYPE_CHECKING, Any

from masked_loss_lint.torch_losses import SPECS

if TYPE_CHECKING:
    from masked_loss_lint.program import ClassInfo, FunctionInfo, Module, Scope

_NO_CALL = ast.Call(ast.Name("?"), [], [])
_DEEPEST = 7  # values inside values; what nests deeper is not understood


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
    """Base of all values."""

    depth = 0


@dataclass(frozen=True)
class Thing(Value):
    """Something of which nothing is known; equal keys: the same thing."""

    key: object = None


UNKNOWN = Thing()
ASKED = Thing("asked")  # what files store under a name, before all of them were looked at
FOREIGN = Value()  # an object of another library: what its attributes hold is nobody's guess
NUMBER = Value()  # a number, or a tensor of one element


@dataclass(frozen=True)
class Const(Value):
    """None, a string, a bool, a number."""

    value: object


NONE = Const(None)


# Losses, masks and what is computed from them


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Mask(Value):
    """A tensor of zeros and ones, known by how it was computed."""

    never_empty: bool = False  # made of lengths or of padding: a sequence has a token


@dataclass(frozen=True)
class Sliced(Value):
    """x[..., :-1, :], or x[..., 1:] (the tail); `copied`: by contiguous(), where."""

    tail: bool
    second: bool = False  # it is the second dimension that was sliced
    copied: Place | None = None


@dataclass(frozen=True)
class Factor:
    loss: Loss | None
    key: object  # equal keys: the same tensor
    text: str
    mask: bool  # by its value or by its name
    never_empty: bool = False
    known: bool = True


@dataclass(frozen=True)
class Product(Value):
    factors: tuple[Factor, ...]
    place: Place


@dataclass(frozen=True)
class Total(Value):
    """A sum or a mean, over `dims` only if these are given; a loss, where it is one.

    One of something else than a product or a loss is a count, known by its `key`.
    """

    op: str
    place: Place
    dims: str = ""
    loss: Loss | None = None
    factors: tuple[Factor, ...] = ()  # of the product that was summed
    key: object = None
    of_mask: bool = False
    never_empty: bool = False
    guarded: bool = False  # cannot be 0

    @property
    def counts(self) -> bool:
        return self.op == "sum" and self.key is not None


@dataclass(frozen=True)
class Either(Value):
    """Tensors that the branches of a program leave."""

    options: tuple[Value, ...]


TENSORS = (Loss, Product, Total, Either)


# Objects


@dataclass(frozen=True)
class External(Value):
    """Something of torch, masked_loss, Python or another library by its full name."""

    path: str


@dataclass(frozen=True)
class Import(Value):
    """A name of a file, looked up when it is used."""

    paths: tuple[str, ...]  # of which the first that exists is meant
    importer: Module
    level: int = 0


@dataclass(frozen=True)
class ModuleRef(Value):
    module: Module


@dataclass(frozen=True)
class Function(Value):
    info: FunctionInfo
    scope: Scope  # where it is defined
    receiver: Value | None = None


@dataclass(frozen=True)
class Class(Value):
    info: ClassInfo


@dataclass(frozen=True)
class Given:
    """The arguments of a call; `spread`: * and ** may hold what is not seen."""

    args: tuple[Value, ...] = ()
    keywords: tuple[tuple[str, Value], ...] = ()
    spread: bool = False
    node: ast.Call = field(default=_NO_CALL, compare=False)

    def by(self, parameters: Iterable[str]) -> dict[str, Value]:
        """They and their names."""
        return dict(zip(parameters, self.args, strict=False)) | dict(self.keywords)

    def get(self, name: str, default: Value) -> Value:
        return dict(self.keywords).get(name, default)


@dataclass(frozen=True)
class Instance(Value):
    info: ClassInfo
    given: Given | None = None  # to its constructor, if that tells something


@dataclass(frozen=True)
class Super(Value):
    info: ClassInfo
    receiver: Value


@dataclass(frozen=True)
class Partial(Value):
    """A function some of whose arguments are known; a loss module is one of its function."""

    callee: Value
    given: Given


@dataclass(frozen=True)
class Record(Value):
    """Named fields over a base: an output object, a dictionary; a list or tuple has 0, 1, ..."""

    base: Value
    fields: tuple[tuple[str | int, Value], ...]

    def get(self, key: str | int) -> Value | None:
        return next((value for name, value in self.fields if name == key), None)

    def set(self, key: str | int, value: Value) -> Value:
        others = tuple(f for f in self.fields if f[0] != key)
        return bounded(Record(self.base, (*others, (key, value))), self.base, value, self)


def bounded(value: Value, *inside: Value) -> Value:
    """`value`, or UNKNOWN where the values inside it are nested too deeply."""
    depth = 1 + max((v.depth for v in inside), default=0)
    object.__setattr__(value, "depth", depth)
    return value if depth <= _DEEPEST else UNKNOWN


def record(base: Value, fields: Mapping[Any, Value]) -> Value:
    return bounded(Record(base, tuple(fields.items())), base, *fields.values())


def items(values: Iterable[Value]) -> Value:
    return record(NUMBER, dict(enumerate(values)))


def any_of(values: Iterable[Value]) -> Value:
    """What is known of something that is one of these."""
    found = list(values)
    return reduce(join, found) if found else UNKNOWN


def text_of(value: Value | None) -> str | None:
    """The string that a value is known to be."""
    return value.value if isinstance(value, Const) and isinstance(value.value, str) else None


def is_count(value: Value) -> bool:
    return isinstance(value, Total) and value.counts


def is_number(value: Value) -> bool:
    if isinstance(value, Const):
        return isinstance(value.value, (int, float))
    counts = is_count(value) and (not value.dims or value.of_mask)  # type: ignore[attr-defined]
    return value is NUMBER or counts


def is_scalar(value: Value) -> bool:
    """True for numbers, and for sums and means that are no losses."""
    plain = isinstance(value, Total) and value.loss is None and not value.dims
    return plain or is_number(value)


def as_loss(value: Value) -> Loss | None:
    """The loss that a value is."""
    if isinstance(value, Total):
        return None if value.dims else value.loss
    return value if isinstance(value, Loss) else None


def join(a: Value, b: Value) -> Value:
    """What is known of something that is either a or b."""
    for one, other in ((a, b), (b, a)):
        loss = as_loss(other)
        if one in (NONE, other) or (is_number(one) and loss is not None and loss.reduced):
            return other
    match a, b:
        case Loss(), Loss():
            if a.reduced != b.reduced:
                return UNKNOWN
            return replace(min(a, b, key=lambda loss: loss.place), uneven=a.uneven and b.uneven)
        case Partial(), Partial():
            kinds = [text_of(p.given.get("reduction", UNKNOWN)) for p in (a, b)]
            return a if None not in kinds and len({k == "none" for k in kinds}) == 1 else UNKNOWN
        case External(), External() if a.path in SPECS and b.path in SPECS:
            return a if SPECS[a.path].is_module == SPECS[b.path].is_module else UNKNOWN
        case Instance(), Instance() if a.info is b.info:
            return Instance(a.info)
        case (Record(), _) | (_, Record()):
            return _join_records(a, b)
        case (Product() | Total() | Either(), _) | (_, Product() | Total() | Either()):
            options = [o for v in (a, b) for o in (v.options if isinstance(v, Either) else (v,))]
            return Either(tuple(dict.fromkeys(options))[:4])
    return UNKNOWN


def _join_records(a: Value, b: Value) -> Value:
    """The fields of both: what one branch adds to an object, the other may have too."""
    a, b = (v if isinstance(v, Record) else Record(v, ()) for v in (a, b))
    names = dict.fromkeys(name for name, _ in (*a.fields, *b.fields))
    fields = {name: join(a.get(name) or NONE, b.get(name) or NONE) for name in names}
    return record(a.base if a.base == b.base else join(a.base, b.base), fields)
