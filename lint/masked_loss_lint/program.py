# SPDX-License-Identifier: BSD-3-Clause
"""The analysed files as one program: modules, classes, functions, and how imports connect them."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from masked_loss_lint.values import NONE, Called, Class, External, Place, Value

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
Conditions = tuple[tuple[Value, bool], ...]  # tests, and what they said on the way here


@dataclass(eq=False, slots=True)
class Event:
    """Something a rule judges when all files are known.

    kind: "product" (a mask multiplies), "reduced" (a sum or mean), "chosen" (a mask selects),
    "accumulated" (divided by accumulation steps).
    """

    kind: str
    place: Place
    value: Value
    text: str  # of the mask, or of the divisor
    conditions: Conditions


@dataclass(eq=False)
class Scope:
    """The names of a function body, a class body or a module, inside another scope."""

    parent: Scope | None = None
    names: dict[str, Value] = field(default_factory=dict)  # of variables, and of paths: "out.loss"
    paths: set[str] = field(default_factory=set)  # the paths ever assigned to

    def lookup(self, name: str) -> Value | None:
        scope: Scope | None = self
        while scope is not None:
            if name in scope.names:
                return scope.names[name]
            scope = scope.parent
        return None


@dataclass(eq=False)
class FunctionInfo:
    """A function and its one summary: what it returns, and what happens in it."""

    name: str
    module: Module
    owner: ClassInfo | None = None
    params: tuple[str, ...] = ()  # positional ones
    keyword_only: tuple[str, ...] = ()
    defaults: dict[str, Value] = field(default_factory=dict)
    numbers: frozenset[str] = frozenset()  # parameters that hold one number
    decorators: frozenset[str] = frozenset()
    opaque: bool = False  # a generator or a coroutine: a call returns something else
    given_away: bool = False  # a lambda that is an argument: who takes it may give it one sample
    per_sample: bool = False  # given to vmap or map: sees one sample, whose loss is per token
    returns: Value = NONE
    events: list[Event] = field(default_factory=list)
    calls: list[tuple[Called, Conditions]] = field(default_factory=list)

    @property
    def bound(self) -> bool:
        """True when its first parameter is the object."""
        static = "staticmethod" in self.decorators
        return self.owner is not None and bool(self.params) and not static


Bindings = dict[tuple[FunctionInfo, str], Value]


@dataclass(eq=False)
class Env:
    """The arguments of one evaluation of a function; empty: nothing is known of them."""

    bindings: Bindings = field(default_factory=dict)
    receiver: Value | None = None
    depth: int = 0
    memo: dict[int, tuple[Value, Value]] = field(default_factory=dict)


@dataclass(frozen=True)
class Given:
    """The arguments of a call, and where in the program it is."""

    args: tuple[Value, ...]
    keywords: dict[str, Value]
    term: Called
    depth: int = 0


@dataclass(eq=False)
class ClassInfo:
    name: str
    module: Module
    bases: list[Value] = field(default_factory=list)
    order: list[str] = field(default_factory=list)  # annotated fields, as a dataclass has them
    methods: dict[str, FunctionInfo] = field(default_factory=dict)
    fields: dict[str, list[Value]] = field(default_factory=lambda: defaultdict(list))
    made: list[Called] = field(default_factory=list)  # the calls that construct it
    base_init: Called | None = None  # super().__init__(...)


@dataclass(eq=False)
class Module:
    path: Path
    imports: list[tuple[str, int]] = field(default_factory=list)  # dotted names, and their levels
    scope: Scope = field(default_factory=Scope)
    top: FunctionInfo = field(init=False)
    functions: list[FunctionInfo] = field(default_factory=list)
    stars: list[tuple[str, int]] = field(default_factory=list)
    stores: dict[str, list[Value]] = field(default_factory=lambda: defaultdict(list))
    fills: set[object] = field(default_factory=set)  # constants that are put into labels
    mapped: list[Value] = field(default_factory=list)  # functions given to vmap or map
    walked: bool = False

    def __post_init__(self) -> None:
        self.folder = self.path.absolute().parent.as_posix()
        self.top = FunctionInfo("<module>", self)
        self.functions.append(self.top)


class Program:
    def __init__(self, modules: Iterable[Module], walk: Callable[[Module], object]) -> None:
        self.modules = sorted(modules, key=lambda module: str(module.path))
        self._walk = walk
        self._files = {f"{m.folder}/{m.path.name}": m for m in self.modules}
        self._known_names = {part for m in self.modules for part in (m.path.stem, *m.path.parts)}
        self._above: dict[str, list[str]] = {}  # of each folder where its imports are looked for

    def walked(self, module: Module) -> Module:
        """The module with its names; one that says nothing of losses is walked when it is asked."""
        if not module.walked:
            self._walk(module)
        return module

    def find(self, dotted: str, importer: Module, level: int = 0) -> Module | None:
        """The module that `import dotted` (or `from ..dotted`) means in `importer`, or None.

        Scripts import from their own folder and from the folders above it, the nearest first.
        """
        root = dotted.partition(".")[0]
        if not level and root not in self._known_names:
            return None
        folder, inside = importer.folder, dotted.replace(".", "/")
        if level:
            folder = "/".join(folder.split("/")[: 1 - level or None])
            return self._at(f"{folder}/{inside}" if inside else folder)
        if folder not in self._above:
            parts = folder.split("/")
            above = ["/".join(parts[:n]) for n in range(len(parts), 0, -1)]
            self._above[folder] = [f"{f}{more}" for f in above for more in ("", "/src", "/lib")]
        return next((m for f in self._above[folder] if (m := self._at(f"{f}/{inside}"))), None)

    def _at(self, path: str) -> Module | None:
        return self._files.get(f"{path}.py") or self._files.get(f"{path}/__init__.py")

    def submodule(self, package: Module, name: str) -> Module | None:
        return self._at(f"{package.folder}/{name}")

    def _imported(self, module: Module) -> Iterator[Module]:
        for dotted, level in module.imports:
            found = self.find(dotted, module, level)
            if found is not None and found is not module:
                yield found

    @cached_property
    def _importers(self) -> dict[Module, int]:
        """Of each file the files that import it, directly or not, and itself, as bits."""
        masks = {module: 1 << number for number, module in enumerate(self.modules)}
        direct = {module: list(dict.fromkeys(self._imported(module))) for module in self.modules}
        pending = dict.fromkeys(self.modules)
        while pending:
            module = next(iter(pending))
            del pending[module]
            for imported in direct[module]:
                if masks[module] & ~masks[imported]:
                    masks[imported] |= masks[module]
                    pending[imported] = None
        return masks

    def met(self, a: Module, b: Module) -> bool:
        """True for files of one folder, and for two of which one, or a third, imports the other."""
        return a.folder == b.folder or bool(self._importers[a] & self._importers[b])

    # Classes

    def family(
        self, info: ClassInfo, resolve: Callable[[Value], Value]
    ) -> tuple[list[ClassInfo], list[Value]]:
        """A class with its bases, the nearest first, and its bases of other libraries."""
        found: list[ClassInfo] = []
        others: list[Value] = []
        pending: list[ClassInfo] = [info]
        while pending:
            current = pending.pop(0)
            if current in found:
                continue  # a class that is its own base, by names that resolve in a circle
            found.append(current)
            for base in map(resolve, current.bases):
                if isinstance(base, Class):
                    pending.append(base.info)
                elif not (isinstance(base, External) and base.path == "builtins.object"):
                    others.append(base)
        return found, others
