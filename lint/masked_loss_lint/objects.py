# SPDX-License-Identifier: BSD-3-Clause
"""What objects of the whole program hold: members of modules, classes, instances, records."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache

from masked_loss_lint import names
from masked_loss_lint import values as V
from masked_loss_lint.program import ClassInfo, Module, Outcome, Program
from masked_loss_lint.source import statements
from masked_loss_lint.tensors import Tensors
from masked_loss_lint.torch_losses import SPECS
from masked_loss_lint.values import FOREIGN, NONE, UNKNOWN, Given, Value, as_loss, is_number, join

# Whose files are not read
_KNOWN = {"torch", "masked_loss", "random", "math", "functools", "types"}


class Objects(Tensors):
    def __init__(self, program: Program) -> None:
        self.program = program
        self.asked: set[str] = set()  # the names that were looked up in all files
        self.stores: dict[str, list[tuple[Module, Value]]] | None = None  # None: not known yet
        self._stored = cache(self._under)  # once all stores are known
        self.fields: dict[tuple[Value, str], tuple[Value, set[str]]] = {}
        self._families: dict[ClassInfo, tuple[list[ClassInfo], list[Value]]] = {}

    # What walk.py adds
    call: Callable[..., Outcome]
    load: Callable[[Module], None]
    bind: Callable[[V.Function, Given], dict[str, Value]]
    tells: Callable[[str, Value], bool]

    def member(self, owner: Value, key: str | int | None) -> Value:
        match owner:
            case V.External() if isinstance(key, str):
                if owner.path.startswith("builtins."):  # a name that nothing in the file binds
                    return self.by_name(key)
                return V.External(f"{owner.path}.{key}")
            case V.Record():
                if key is None:
                    return V.any_of([value for _, value in owner.fields] or [UNKNOWN])
                found = owner.get(key)
                return found if found not in (None, NONE) else self.member(owner.base, key)
            case V.Instance() | V.Class() if isinstance(key, str):
                return self.in_class(owner.info, key, owner)
            case V.Super() if isinstance(key, str):
                bases = self.family(owner.info)[0][1:]
                method = next((b.methods[key] for b in bases if key in b.methods), None)
                return replace(method, receiver=owner.receiver) if method else owner
            case V.ModuleRef() if isinstance(key, str):
                return self._of_module(owner.module, key)
            case V.Partial() | V.Function() if key == "forward":
                return owner
        if owner is FOREIGN:
            return FOREIGN
        return self.by_name(key) if isinstance(owner, V.Thing) and isinstance(key, str) else UNKNOWN

    # Modules

    def imported(self, term: V.Import) -> Value:
        for path in term.paths:
            parts = path.split(".") if path else []
            if parts and parts[0] in _KNOWN and not term.level:
                return V.External(path)
            for length in range(len(parts), -1 if term.level else 0, -1):
                module = self.program.find(".".join(parts[:length]), term.importer, term.level)
                if module is not None and (module is not term.importer or length == len(parts)):
                    value: Value = V.ModuleRef(module)
                    for name in parts[length:]:
                        value = self.member(value, name)
                    if value is not UNKNOWN:
                        return value
        return V.External(term.paths[-1]) if not term.level else UNKNOWN

    def _of_module(self, module: Module, name: str) -> Value:
        self.load(module)
        value = module.scope.names.get(name)
        if value is None and module.stars:
            paths = tuple(f"{dotted}.{name}" for dotted, _ in module.stars)
            value = V.Import(paths, module, module.stars[-1][1])
        if isinstance(value, V.Import):
            module.scope.names[name] = UNKNOWN  # while it is looked up
            module.scope.names[name] = self.imported(value)
            return module.scope.names[name]
        if value is not None:
            return value
        inner = self.program.at(f"{module.folder}/{name}")
        return V.ModuleRef(inner) if inner is not None else UNKNOWN

    # Classes and their objects

    def family(self, info: ClassInfo) -> tuple[list[ClassInfo], list[Value]]:
        """A class with its bases, the nearest first, and its bases of other libraries."""
        if info not in self._families:
            found: list[ClassInfo] = []
            others: list[Value] = []
            self._families[info] = [info], []  # while its bases are being found out
            pending: list[Value] = [V.Class(info)]
            while pending:
                base = pending.pop(0)
                base = self.imported(base) if isinstance(base, V.Import) else base
                if not isinstance(base, V.Class):
                    others.append(base)
                elif base.info not in found:  # else its own base, by names that resolve in a circle
                    found.append(base.info)
                    pending += base.info.bases
            self._families[info] = found, [b for b in others if b != V.External("builtins.object")]
        return self._families[info]

    def method(self, info: ClassInfo, name: str) -> V.Function | None:
        found = (c.methods[name] for c in self.family(info)[0] if name in c.methods)
        return next(found, None)

    def in_class(self, info: ClassInfo, name: str, receiver: Value) -> Value:
        """An attribute of a class or of its object: a method, or what its methods set it to."""
        key = (receiver, name)
        if key not in self.fields:
            asked, self.asked = self.asked, set()
            self.fields[key] = NONE, set()  # while it is being found out: x = f(x) adds nothing
            self.fields[key] = V.any_of(self._held(info, name, receiver)), self.asked
            self.asked = asked
        value, asked = self.fields[key]
        self.asked |= asked
        return value

    def _held(self, info: ClassInfo, name: str, receiver: Value) -> Iterable[Value]:
        family = self.family(info)[0]
        for current in family:
            if name in current.methods:
                is_object = isinstance(receiver, V.Instance)
                method = replace(current.methods[name], receiver=receiver if is_object else None)
                is_property = {"property", "cached_property"} & method.info.decorators
                yield self.call(method).value if is_property else method
                return
            if name in current.fields:
                yield current.fields[name]
            for setter in self._storing(current).get(name, ()):
                own = receiver if isinstance(receiver, V.Instance) else None
                method = replace(current.methods[setter], receiver=own)
                yield from self.initialised(method, own).fields.get(name, ())

    def initialised(self, method: V.Function, receiver: V.Instance | None) -> Outcome:
        """A method's outcome; a constructor gets the arguments that the object was made with."""
        given = receiver and receiver.given
        if not receiver or not given or method.info.name != "__init__":
            return self.call(method)
        own = self.method(receiver.info, "__init__") == replace(method, receiver=None)
        return self.call(method, self.bind(method, given) if own else None)

    def _storing(self, info: ClassInfo) -> dict[str, list[str]]:
        """The methods that set a field, or change what it holds: self.x = ..., self.x.y = ..."""
        if info.storing is None:
            info.storing = {}
            for name, method in info.methods.items():
                for node in statements(info.module.node(method.info)):
                    targets = getattr(node, "targets", [getattr(node, "target", None)])
                    for target in (t for whole in targets for t in getattr(whole, "elts", [whole])):
                        field = None
                        while isinstance(target, (ast.Attribute, ast.Subscript)):
                            field, target = getattr(target, "attr", ""), target.value
                        if field and getattr(target, "id", "") in method.info.params[:1]:
                            setters = info.storing.setdefault(field, [])
                            setters += [name] if name not in setters else []
        return info.storing

    # Objects that nobody can identify

    def by_name(self, name: str) -> Value:
        """What `x.name` is when nobody can identify x: what the program stores under that name.

        Only a loss is believed, only under a name that says so, only if all that is stored under it
        in files that imports connect with the reader agrees.
        """
        if not names.is_loss(name):
            return UNKNOWN
        self.asked.add(name)
        if self.stores is None:
            return V.ASKED
        known = self._stored(name, self.frame.info.module)
        if known == NONE:
            return V.ASKED
        return known if isinstance(known, V.Loss) and known.reduced else UNKNOWN

    def _under(self, name: str, reader: Module) -> Value:
        known: Value = NONE
        for module, value in (self.stores or {}).get(name, ()):
            logged = is_number(value) or value in (NONE, V.ASKED)  # or not there yet
            if not logged and self.program.met(reader, module):
                known = join(known, as_loss(value) or UNKNOWN)
        return known

    def loss_base(self, info: ClassInfo) -> str | None:
        """The loss module of PyTorch that a class inherits from."""
        bases = (base.path for base in self.family(info)[1] if isinstance(base, V.External))
        return next((p for p in bases if p in SPECS and SPECS[p].is_module), None)
