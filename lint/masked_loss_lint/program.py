# SPDX-License-Identifier: BSD-3-Clause
"""The analysed files as one program: modules, classes, functions, and how imports connect them."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from masked_loss_lint.rules import Finding
from masked_loss_lint.source import FunctionNode, Source, fills
from masked_loss_lint.values import NONE, Function, Given, Instance, Value


@dataclass(eq=False)
class Scope:
    """The names of a function body, a class body or a module, inside another scope."""

    parent: Scope | None = None
    names: dict[str, Value] = field(default_factory=dict)

    def lookup(self, name: str) -> Value | None:
        scope: Scope | None = self
        while scope is not None:
            if name in scope.names:
                return scope.names[name]
            scope = scope.parent
        return None


@dataclass(eq=False)
class Outcome:
    """What one look at a function has shown."""

    value: Value = NONE  # what it returns
    findings: list[Finding] = field(default_factory=list)
    fields: dict[str, list[Value]] = field(default_factory=lambda: defaultdict(list))  # of self
    stored: list[tuple[str, Value]] = field(default_factory=list)  # losses, under any owner's name
    inherits: Given | None = None  # super().__init__(...)
    asked: set[str] = field(default_factory=set)  # it depends on what files store under these


@dataclass(eq=False)
class FunctionInfo:
    """A function, and what it does for the arguments it was looked at with."""

    name: str
    module: Module
    position: tuple[int, int] = (0, 0)
    owner: ClassInfo | None = None
    lambda_: ast.Lambda | None = None
    params: tuple[str, ...] = ()  # positional ones
    parameters: tuple[str, ...] = ()  # and those that only have a name
    defaults: dict[str, Value] = field(default_factory=dict)
    numbers: frozenset[str] = frozenset()  # parameters that hold one number
    decorators: frozenset[str] = frozenset()
    given_away: bool = False  # to vmap, or a lambda as an argument: may be called for each sample
    outcomes: dict[tuple[Any, ...], Outcome] = field(default_factory=dict)

    @property
    def bound(self) -> bool:
        """True when its first parameter is the object."""
        static = "staticmethod" in self.decorators
        return self.owner is not None and bool(self.params) and not static

    @property
    def of_class(self) -> bool:
        return "classmethod" in self.decorators


@dataclass(eq=False)
class ClassInfo:
    name: str
    module: Module
    bases: list[Value] = field(default_factory=list)
    order: dict[str, None] = field(
        default_factory=dict
    )  # annotated fields, as a dataclass has them
    methods: dict[str, Function] = field(default_factory=dict)
    fields: dict[str, Value] = field(default_factory=dict)
    made: list[Instance] = field(default_factory=list)  # its objects
    storing: dict[str, list[str]] | None = None  # of each field the methods that set it


@dataclass(eq=False)
class Module:
    path: Path
    parsed: Callable[[Path], Source]  # reads it again where that was long ago
    error: str = ""  # why it cannot be read
    relevant: bool = False  # it may have something to report
    silenced: dict[int, str] = field(default_factory=dict)
    imports: list[tuple[str, int]] = field(default_factory=list)  # dotted names, and their levels
    scope: Scope = field(default_factory=Scope)
    infos: dict[tuple[int, int], FunctionInfo | ClassInfo] = field(default_factory=dict)
    pending: list[Function] = field(default_factory=list)  # functions that nobody has called yet
    stars: list[tuple[str, int]] = field(default_factory=list)
    loaded: bool = False

    def __post_init__(self) -> None:
        self.folder = self.path.absolute().parent.as_posix()
        self.top = FunctionInfo("<module>", self)

    @cached_property
    def fills(self) -> frozenset[object]:
        return fills(self.path.read_text(encoding="utf-8", errors="replace"))

    def source(self) -> Source:
        return self.parsed(self.path)

    def node(self, info: FunctionInfo) -> FunctionNode | ast.Module:
        if info is self.top:
            return self.source().tree
        return info.lambda_ or self.source().definitions[info.position]


class Program:
    def __init__(self, modules: Iterable[Module]) -> None:
        self.modules = sorted(modules, key=lambda module: str(module.path))
        self.by_path = {str(module.path): module for module in self.modules}
        self._files = {f"{m.folder}/{m.path.name}": m for m in self.modules}
        self._known_names = {part for m in self.modules for part in (m.path.stem, *m.path.parts)}
        self._found = cache(self._find)

    def find(self, dotted: str, importer: Module, level: int = 0) -> Module | None:
        """The module that `import dotted` (or `from ..dotted`) means in `importer`, or None.

        Scripts import from their own folder and from the folders above it, the nearest first.
        """
        known = level or dotted.partition(".")[0] in self._known_names
        return self._found(dotted, importer.folder, level) if known else None

    def _find(self, dotted: str, folder: str, level: int) -> Module | None:
        inside, parts = dotted.replace(".", "/"), folder.split("/")
        if level:
            folder = "/".join(parts[: 1 - level or None])
            return self.at(f"{folder}/{inside}" if inside else folder)
        above = ("/".join(parts[:n]) for n in range(len(parts), 0, -1))
        places = (f"{folder}{more}/{inside}" for folder in above for more in ("", "/src", "/lib"))
        return next(filter(None, map(self.at, places)), None)

    def at(self, path: str) -> Module | None:
        return self._files.get(f"{path}.py") or self._files.get(f"{path}/__init__.py")

    @cached_property
    def _importers(self) -> dict[Module, int]:
        """Of each file the files that import it, directly or not, and itself, as bits."""
        masks = {module: 1 << number for number, module in enumerate(self.modules)}
        direct = {m: dict.fromkeys(self.find(d, m, level) for d, level in m.imports) for m in masks}
        pending = dict.fromkeys(self.modules)
        while pending:
            module = next(iter(pending))
            del pending[module]
            for imported in direct[module]:
                if imported is not None and masks[module] & ~masks[imported]:
                    masks[imported] |= masks[module]
                    pending[imported] = None
        return masks

    def met(self, a: Module, b: Module) -> bool:
        """True for files of one folder, and for two of which one, or a third, imports the other."""
        return a.folder == b.folder or bool(self._importers[a] & self._importers[b])
