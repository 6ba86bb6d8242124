# SPDX-License-Identifier: BSD-3-Clause
"""Looks at the functions of a program: alone, as they are called, and for each object.

Nothing of the analysed program is executed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from masked_loss_lint import names
from masked_loss_lint import values as V
from masked_loss_lint.calls import IMPLIED
from masked_loss_lint.expressions import Frame
from masked_loss_lint.program import ClassInfo, FunctionInfo, Module, Outcome, Scope
from masked_loss_lint.rules import LOCAL, Finding
from masked_loss_lint.source import FunctionNode, UnreadableError
from masked_loss_lint.statements import Statements
from masked_loss_lint.torch_losses import REDUCTIONS, SPECS
from masked_loss_lint.values import NONE, NUMBER, UNKNOWN, Given, Value

_MAX_CONTEXTS = 8  # looks at one function with different arguments
_MAX_DEPTH = 8  # of calls within calls
_TELLING = V.Instance, V.Class, V.Function, V.Partial, V.Record, *V.TENSORS
_FLAGS = {"reduce", "reduction", "average", "mean", "sum", "loss", "token", "sample", "return"}


class Walker(Statements):
    depth = 0

    # The program

    def look_at_all(self) -> None:
        """Looks at all functions, at methods of the objects made, then at what asked for names."""
        self._look_at_modules()
        self.stores = {}
        for module, info in self._infos():
            for (_, receiver, telling), outcome in info.outcomes.items():
                for name, value in outcome.stored if (receiver, telling) == (None, ()) else ():
                    self.stores.setdefault(name, []).append((module, value))
        known = {n for n, stored in self.stores.items() if any(V.as_loss(v) for _, v in stored)}
        self.fields = {k: (v, asked) for k, (v, asked) in self.fields.items() if not asked & known}
        for module, info in self._infos():
            info.outcomes = {k: o for k, o in info.outcomes.items() if not o.asked & known}
            module.loaded &= bool(module.top.outcomes)
        self._look_at_modules()

    def _look_at_modules(self) -> None:
        for module in self.program.modules:
            self.load(module)
            self._look_at(module.pending if module.relevant else [])
        infos = [info for module in self.program.modules for info in module.infos.values()]
        for info in infos:
            if isinstance(info, ClassInfo):
                for receiver, method in product(info.made, info.methods.values()):
                    self.initialised(replace(method, receiver=receiver), receiver)

    def _look_at(self, functions: list[V.Function]) -> None:
        """Of their arguments nothing is known."""
        for function in functions:
            self.call(function)

    def _infos(self) -> list[tuple[Module, FunctionInfo]]:
        return [
            (module, info)
            for module in self.program.modules
            for info in (module.top, *module.infos.values())
            if isinstance(info, FunctionInfo)
        ]

    def findings(self) -> Iterator[Finding]:
        for _, info in self._infos():
            for (_, _, telling), outcome in info.outcomes.items():
                for f in outcome.findings:
                    given_away = info.given_away and not telling and f.code not in LOCAL
                    if not given_away and (f.loss is None or self._can_be_ignored(f.loss)):
                        yield f

    def _can_be_ignored(self, loss: V.Loss) -> bool:
        """False where no target is ever the ignore_index: it is a number such as -1, and no file
        that meets the loss puts it into labels. -100 is named by those who use it."""
        index = -100 if loss.ignores is IMPLIED else getattr(loss.ignores, "value", None)
        sure = index == -100 and loss.ignores is not IMPLIED
        if sure or not isinstance(index, int) or index >= 0:
            return True
        home = self.program.by_path[loss.place.path]
        filled = (m for m in self.program.modules if {index, "any"} & m.fills)
        return any(self.program.met(home, module) for module in filled)

    # Functions

    def load(self, module: Module) -> None:
        """Looks at the top level of a file, once."""
        if module.loaded or self.depth >= _MAX_DEPTH:
            return
        module.loaded = True
        try:
            source = module.source()
        except UnreadableError as error:
            module.error = str(error)
            return
        module.relevant, module.imports = source.relevant, source.imports
        module.silenced = source.silenced
        module.pending.clear()
        self.call(V.Function(module.top, module.scope))

    def call(self, function: V.Function, given: dict[str, Value] | None = None) -> Outcome:
        """What a function does with these arguments; None: nothing is known of them."""
        info = function.info
        known = given or {}
        tell = any(self.tells(name, value) for name, value in known.items())
        telling = tuple((n, v) for n, v in known.items() if tell and not isinstance(v, V.Thing))
        plain = info.owner is not None and function.receiver == V.Instance(info.owner)
        key = (function.scope, None if plain else function.receiver, telling)
        if key in info.outcomes:
            self.asked |= info.outcomes[key].asked
            return info.outcomes[key]
        if self.depth >= _MAX_DEPTH or (telling and len(info.outcomes) >= _MAX_CONTEXTS):
            return Outcome(UNKNOWN)
        outcome = info.outcomes[key] = Outcome()  # a recursive call adds nothing
        asked, self.asked = self.asked, set()
        outside = getattr(self, "frame", None)
        scope = function.scope
        if info is not info.module.top:
            scope = Scope(scope, self._arguments(function, dict(telling)))
        self.frame = Frame(info, scope, outcome)
        self.depth += 1
        try:
            self._body(info.module.node(info))
        except RecursionError:  # an expression far deeper than people write
            outcome.value = UNKNOWN
        self.depth -= 1
        self.frame = outside  # type: ignore[assignment]
        outcome.asked = self.asked
        self.asked = asked | outcome.asked
        return outcome

    def tells(self, name: str, value: Value) -> bool:
        """True for an argument that may decide what a loss is."""
        if isinstance(value, V.Const):
            flag = isinstance(value.value, bool) and bool(_FLAGS & set(names.words(name)))
            return flag or value.value in REDUCTIONS
        if isinstance(value, V.External):
            return value.path in SPECS
        return isinstance(value, _TELLING) and not V.is_number(value)

    def _arguments(self, function: V.Function, given: dict[str, Value]) -> dict[str, Value]:
        """What the parameters are; of an unknown one only a default that is a loss is believed."""
        info = function.info
        found: dict[str, Value] = {name: V.Thing((info, name)) for name in info.parameters}
        found |= dict.fromkeys(info.numbers, NUMBER)
        for name, default in info.defaults.items():
            loss = isinstance(default, V.External) and default.path in SPECS
            if loss or isinstance(default, V.Partial) or default == IMPLIED:
                found[name] = default
        if info.owner is not None and info.bound:
            receiver = function.receiver or V.Instance(info.owner)
            found[info.params[0]] = V.Class(info.owner) if info.of_class else receiver
        return found | given

    def bind(self, function: V.Function, given: Given) -> dict[str, Value]:
        """The parameters of a function in a call."""
        info = function.info
        skip = info.bound and (function.receiver is not None or info.of_class)
        values = given.by(info.params[int(skip) :])
        if not given.spread:  # -100 as a default says no more than PyTorch's own default
            defaults = {n: IMPLIED if v == IMPLIED else v for n, v in info.defaults.items()}
            values = defaults | values
        return {name: values[name] for name in info.parameters if name in values}

    def _body(self, node: FunctionNode | ast.Module) -> None:
        frame = self.frame
        if isinstance(node, ast.Lambda):
            frame.outcome.value = self.value(node.body)
            return
        ended = self.block(node.body)
        generator = isinstance(node, ast.AsyncFunctionDef) or frame.opaque
        values = frame.returns if ended else [*frame.returns, NONE]
        frame.outcome.value = UNKNOWN if generator else V.any_of(values or [NONE])
        frame.outcome.findings += [f for f in frame.copies if f.place not in frame.read]
        if frame.info is not frame.info.module.top:
            self._look_at(frame.pending)
