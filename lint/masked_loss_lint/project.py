# SPDX-License-Identifier: BSD-3-Clause
"""The analysed files as one program: modules, classes, functions, and how names reach them."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from pathlib import Path

from masked_loss_lint.source import Source
from masked_loss_lint.values import (
    UNKNOWN,
    External,
    Loss,
    Module,
    Value,
    join,
)

# A file without any of these words has nothing to report; it is looked into only when imported.
_RELEVANT = re.compile(r"loss|entropy|criterion|nll|mask|kl_div", re.IGNORECASE)

_LOSS = re.compile(r"loss|entropy|criterion|nll|kl_div", re.IGNORECASE)
# What a line binds: ce of `self.ce = ...`, of `import cross_entropy as ce`.
_BINDING = re.compile(r"^\s*(?:self\.)?(\w+)(?:\s*:[^=]+)?\s*=(?!=)|\bimport\b.*\bas\s+(\w+)\s*$")
_NAME = re.compile(r"[^\W\d]\w*")
# Too many functions have these for them to tell anything.
_COMMON = "forward main model out output outputs result logits labels"
_COMMON_NAMES = set(_COMMON.split())

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


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
    node: FunctionNode
    module: ModuleInfo
    owner: ClassInfo | None = None
    given_away: bool = False  # a lambda that is an argument: who takes it may give it one sample
    per_sample: bool = False  # given to vmap: sees one sample, for which the loss is per token

    @property
    def name(self) -> str:
        return getattr(self.node, "name", "<lambda>")

    @cached_property
    def text(self) -> str:
        return "\n".join(self.module.source.lines[self.node.lineno - 1 : self.node.end_lineno])

    @cached_property
    def relevant(self) -> bool:
        """False for a function in which no loss and no mask is named: it has nothing to report."""
        if self.name == "__init__" or _RELEVANT.search(self.text):
            return True
        return not self.module.aliases.isdisjoint(_NAME.findall(self.text))

    @cached_property
    def is_generator(self) -> bool:
        found = "yield" in self.text
        return found and any(isinstance(n, (ast.Yield, ast.YieldFrom)) for n in _own(self.node))

    def decorated(self, name: str) -> bool:
        decorators = getattr(self.node, "decorator_list", [])
        return any(ast.unparse(d).split("(")[0].endswith(name) for d in decorators)


@dataclass(eq=False)
class ClassInfo:
    node: ast.ClassDef
    module: ModuleInfo
    bases: list[Value] = field(default_factory=list)
    subclasses: list[ClassInfo] = field(default_factory=list)
    methods: dict[str, FunctionInfo] = field(default_factory=dict)
    attributes: dict[str, Value] = field(default_factory=dict)  # what was assigned to self.name
    fields: list[str] = field(default_factory=list)  # annotated names, as of a dataclass
    constructed: bool = False  # a call in the analysed files makes one

    def ancestors(self) -> list[ClassInfo]:
        """This class and its bases among the analysed files, nearest first."""
        found = [self]
        for base in self.bases:
            info = getattr(base, "info", None)
            if isinstance(info, ClassInfo) and info not in found:
                found += [a for a in info.ancestors() if a not in found]
        return found

    def descendants(self) -> list[ClassInfo]:
        found: list[ClassInfo] = []
        for child in self.subclasses:
            found += [child, *child.descendants()]
        return found

    def method(self, name: str) -> FunctionInfo | None:
        return next((c.methods[name] for c in self.ancestors() if name in c.methods), None)

    def overrides(self, name: str) -> list[FunctionInfo]:
        return [c.methods[name] for c in self.descendants() if name in c.methods]

    def attribute(self, name: str) -> Value | None:
        """What `self.name` is in this class or, as self may be one, in a subclass."""
        found = next((c.attributes[name] for c in self.ancestors() if name in c.attributes), None)
        for child in self.descendants():
            if name in child.attributes:
                found = join(found, child.attributes[name])
        return found

    def external_base(self) -> External | None:
        """The first base that is not among the analysed files: torch.nn.CrossEntropyLoss."""
        for info in self.ancestors():
            for base in info.bases:
                if isinstance(base, External):
                    return base
        return None


@dataclass(eq=False)
class ModuleInfo:
    source: Source
    scope: Scope = field(default_factory=Scope)
    functions: list[FunctionInfo] = field(default_factory=list)
    classes: dict[ast.ClassDef, ClassInfo] = field(default_factory=dict)
    imports: list[ast.Import | ast.ImportFrom] = field(default_factory=list)
    imported_losses: set[str] = field(default_factory=set)  # functions that name a loss
    by_node: dict[ast.AST, FunctionInfo] = field(default_factory=dict)
    relevant: bool = True
    done: int = 0  # the last pass that evaluated it

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """The path as an importer sees it: a/b/__init__.py and a/b.py both end in a, b."""
        parts = self.source.path.absolute().with_suffix("").parts
        return parts[:-1] if parts[-1] == "__init__" else parts

    @cached_property
    def aliases(self) -> set[str]:
        """Other names of losses: ce of `cross_entropy as ce`, of functions that compute one."""
        found = {f.name for f in self.functions if _LOSS.search(f.text)} | self.imported_losses
        for line in self.source.lines:
            match = _BINDING.search(line) if _LOSS.search(line) else None
            if match:
                found.add(match[1] or match[2])
        return found - _COMMON_NAMES

    @property
    def package(self) -> tuple[str, ...]:
        """The folder that `from . import` means."""
        return self.source.path.absolute().parent.parts


class Project:
    """All modules, found by the dotted names under which others import them."""

    def __init__(self, sources: list[Source]) -> None:
        self.modules = [ModuleInfo(source) for source in sources]
        self._by_parts: dict[tuple[str, ...], ModuleInfo] = {}
        self._by_last_name: dict[str, list[ModuleInfo]] = defaultdict(list)
        self._attributes: dict[str, Value] = {}
        self.changes = 0  # how often something new was learned of an attribute
        for module in self.modules:
            if module.source.path.suffix == ".py":
                self._by_parts[module.parts] = module
                self._by_last_name[module.parts[-1]].append(module)
            self._collect(module)
        self._note_imported_losses()

    def _note_imported_losses(self) -> None:
        losses = {
            f.name
            for m in self.modules
            for f in m.functions
            if not f.owner and _LOSS.search(f.text)
        }
        for module in self.modules:
            for statement in module.imports:
                if isinstance(statement, ast.ImportFrom):
                    names = {a.asname or a.name for a in statement.names if a.name in losses}
                    module.imported_losses |= names - _COMMON_NAMES
            if not module.imported_losses:
                module.relevant = _RELEVANT.search(module.source.text) is not None

    def _collect(self, module: ModuleInfo) -> None:
        """Records the classes and functions of a module, also those inside others."""
        body = module.source.tree.body
        pending: list[tuple[ast.stmt, ClassInfo | None]] = [(s, None) for s in reversed(body)]
        while pending:  # a thousand elif are a thousand levels
            statement, owner = pending.pop()
            if isinstance(statement, ast.ClassDef):
                owner = module.classes[statement] = ClassInfo(statement, module)
            elif isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
                function = FunctionInfo(statement, module, owner)
                module.functions.append(function)
                module.by_node[statement] = function
                if owner is not None:
                    owner.methods[statement.name] = function
                owner = None
            elif isinstance(statement, (ast.Import, ast.ImportFrom)):
                module.imports.append(statement)
            else:
                match statement:
                    case ast.AnnAssign(target=ast.Name(id=name)) if owner is not None:
                        owner.fields.append(name)
            pending += [(inner, owner) for inner in reversed(list(_blocks(statement)))]

    def resolve(self, dotted: str, importer: ModuleInfo, level: int = 0) -> ModuleInfo | None:
        """The module that `import dotted` (or `from ..dotted`) means in `importer`, or None.

        Scripts import from their own folder and from the root they are run in, so any file whose
        path ends in the dotted name will do; of several, the one nearest to the importer.
        """
        parts = tuple(dotted.split(".")) if dotted else ()
        if level:
            package = importer.package
            return self._by_parts.get((*package[: len(package) - level + 1], *parts))
        if not parts or parts[0] in {"torch", "numpy", "typing"}:
            return None
        named = self._by_last_name.get(parts[-1], [])
        found = [module for module in named if module.parts[-len(parts) :] == parts]
        return max(found, key=lambda m: _shared(m.parts, importer.parts), default=None)

    def submodule(self, package: ModuleInfo, name: str) -> ModuleInfo | None:
        return self._by_parts.get((*package.parts, name))

    def import_value(self, dotted: str, importer: ModuleInfo) -> Value:
        module = self.resolve(dotted, importer)
        return Module(module) if module is not None else External(dotted)

    def remember_attribute(self, name: str, value: Value) -> None:
        """Notes that some object's `.name` was set to `value`."""
        self._learn(self._attributes, name, value)

    def remember_member(self, info: ClassInfo, name: str, value: Value) -> None:
        """Notes that `self.name` was set to `value` in an object of this class."""
        self._learn(info.attributes, name, value)

    def _learn(self, known: dict[str, Value], name: str, value: Value) -> None:
        joined = join(known.get(name), value)
        if known.get(name) != joined:
            known[name] = joined
            self.changes += 1

    def attribute_by_name(self, name: str, reader: ModuleInfo) -> Value:
        """What `x.name` must be when nothing is known of x.

        Only a loss is believed, only under a name that says so, only if every object in the
        analysed files that has this attribute agrees, and only if one can get here.
        """
        value = self._attributes.get(name, UNKNOWN)
        if "loss" not in name.lower() or not isinstance(value, Loss):
            return UNKNOWN
        return value if self._meet(reader, value.origin.source) else UNKNOWN

    def _meet(self, reader: ModuleInfo, source: Source) -> bool:
        """True for files of one folder, and for two of which one, or a third, imports the other."""
        if reader.source.path.parent == source.path.parent:
            return True
        return any(
            {reader.source.path, source.path} <= imported for imported in self._imported.values()
        )

    @cached_property
    def _imported(self) -> dict[Path, set[Path]]:
        """The files that each file imports, directly or not, and itself."""
        direct = {module.source.path: set(self._imports(module)) for module in self.modules}
        found: dict[Path, set[Path]] = {}
        for start in direct:
            seen, pending = {start}, [start]
            while pending:
                new = direct[pending.pop()] - seen
                seen |= new
                pending += new
            found[start] = seen
        return found

    def _imports(self, module: ModuleInfo) -> Iterator[Path]:
        for statement in module.imports:
            level = statement.level if isinstance(statement, ast.ImportFrom) else 0
            inside = statement.module or "" if isinstance(statement, ast.ImportFrom) else ""
            for alias in statement.names:
                for dotted in {inside, f"{inside}.{alias.name}".strip(".")}:
                    found = self.resolve(dotted, module, level)
                    if found is not None:
                        yield found.source.path


def _blocks(statement: ast.stmt) -> Iterator[ast.stmt]:
    """The statements inside a statement, one level down."""
    for name in ("body", "handlers", "orelse", "finalbody", "cases"):
        for inner in getattr(statement, name, ()):
            yield from (inner,) if isinstance(inner, ast.stmt) else inner.body


def _own(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a body without those of functions inside it."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)):
            yield from _own(child)


def _shared(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
