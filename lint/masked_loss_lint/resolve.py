# SPDX-License-Identifier: BSD-3-Clause
"""Replaces terms by what other functions, classes and files say, and judges the events.

Every function is looked at once with unknown arguments, and again for calls that say more, a
bounded number of times. Nothing here depends on the order of the files.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

from masked_loss_lint import names
from masked_loss_lint import values as V
from masked_loss_lint.expressions import decided
from masked_loss_lint.objects import IMPLIED, Objects, joined
from masked_loss_lint.program import Conditions, Env, FunctionInfo, Given, Program
from masked_loss_lint.rules import Finding, as_loss, judge
from masked_loss_lint.torch_losses import SPECS
from masked_loss_lint.values import (
    NONE,
    NUMBER,
    UNKNOWN,
    Place,
    Value,
    bounded,
    is_number,
    join,
)

_MAX_CONTEXTS = 8  # evaluations of one function with different arguments
_MAX_DEPTH = 8  # of calls within calls
_MAX_NESTED = 150  # of terms within terms


_METHODS: dict[type[Value], Any] = {}
_OF_PARTS = {"Ratio", "Record", "Tuple", "Many", "Partial", "Super"}


class Resolver(Objects):
    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.findings: dict[tuple[Place, str], Finding] = {}
        self.unclear: dict[Place, str] = {}  # masks that met something nobody could identify
        self._nested = 0
        self._contexts: dict[FunctionInfo, dict[object, Value]] = {}
        self._queue: list[tuple[FunctionInfo, Env]] = []

    def run(self) -> None:
        modules = [module for module in self.program.modules if module.walked]
        for module in modules:
            for name, values in module.stores.items():
                self.stores.setdefault(name, []).append((module, values))
        for module in modules:
            for value in module.mapped:
                mapped = self.resolve(value, self.nothing)
                if isinstance(mapped, V.Function):
                    mapped.info.per_sample = True
        for module in modules:
            for function in module.functions:
                for call, _ in function.calls:
                    made = self.resolve(call.callee, self.nothing)
                    if isinstance(made, V.Class) and len(made.info.made) < _MAX_CONTEXTS:
                        made.info.made.append(call)
        for module in modules:
            for function in module.functions:
                self._standalone(function)
        while self._queue:
            self._judge(*self._queue.pop(0))

    # Functions

    def _standalone(self, function: FunctionInfo) -> None:
        """Judges a function of which no call is known: its arguments are unknown."""
        owner = function.owner
        if function.given_away or not (function.events or function.calls):
            return
        receivers: list[Value | None] = [None]
        if owner is not None and function.bound:
            calls = [self.given(call, self.nothing) for call in owner.made]
            made = [self.construct(owner, call) for call in calls]
            receivers = [*dict.fromkeys(m.base if isinstance(m, V.Record) else m for m in made)]
        for receiver in receivers or [None]:
            self._queue.append((function, Env(receiver=receiver)))

    def _judge(self, function: FunctionInfo, env: Env) -> None:
        for call, conditions in function.calls:
            if self._possible(conditions, env):
                self.resolve(call, env)
        if function.per_sample:
            return
        for event in function.events:
            if not self._possible(event.conditions, env):
                continue
            term = event.value
            for value in self._alternatives(term, env):
                found = judge(event, value, self.can_be_ignored)
                for finding in found:
                    known = self.findings.get((finding.place, finding.code))
                    if known is None or finding.message < known.message:
                        self.findings[finding.place, finding.code] = finding
                alone = env.receiver is None and not env.bindings
                if event.kind == "product" and alone and not found:
                    self._note_unclear(event.place, event.text, value)

    def _note_unclear(self, place: Place, mask: str, value: Value) -> None:
        if isinstance(value, V.Product):
            for factor in value.factors:
                if factor.value is UNKNOWN and factor.kind != "mask" and names.is_loss(factor.text):
                    self.unclear[place] = (
                        f"cannot tell what `{factor.text}` is, which `{mask}` multiplies"
                    )

    def _alternatives(self, term: Value, env: Env) -> Iterable[Value]:
        """The values of an event; of a sum, one for each thing that may be summed."""
        if isinstance(term, V.Reduced) and isinstance(term.base, V.Either):
            pending: list[Value] = [term.base]
            for _ in range(_MAX_CONTEXTS):
                if not pending:
                    break
                base = pending.pop()
                if isinstance(base, V.Either):
                    outcome = self.resolve(base.test, env)
                    if not isinstance(outcome, V.Const) or outcome.value:
                        pending.append(base.yes)
                    if not isinstance(outcome, V.Const) or not outcome.value:
                        pending.append(base.no)
                elif isinstance(base, V.Product):
                    yield self.resolve(replace(term, base=base), env)
        yield self.resolve(term, env)

    def _possible(self, conditions: Conditions, env: Env) -> bool:
        for test, outcome in conditions:
            known = self.resolve(test, env)
            if isinstance(known, V.Const) and bool(known.value) != outcome:
                return False
        return True

    def invoke(self, callee: V.Function, given: Given) -> Value:
        info, receiver = callee.info, callee.receiver
        bindings = self.bind(info, given, skip=int(info.bound and receiver is not None))
        contexts = self._contexts.setdefault(info, {})
        key = (receiver, *((name, v) for (_, name), v in bindings.items() if v is not UNKNOWN))
        if key in contexts:
            return contexts[key]
        if given.depth >= _MAX_DEPTH or len(contexts) >= _MAX_CONTEXTS:
            return UNKNOWN
        contexts[key] = NONE  # while it is being evaluated: a recursive call adds nothing
        env = Env(bindings, receiver, given.depth + 1)
        contexts[key] = UNKNOWN if info.opaque else self.resolve(info.returns, env)
        if info.events or info.calls:
            self._queue.append((info, env))
        return contexts[key]

    def can_be_ignored(self, loss: V.Loss) -> bool:
        """False where no target is ever the ignore_index: it is a number such as -1, and no file
        that meets the loss puts it into labels. -100 is named by those who use it."""
        index = -100 if loss.ignores is IMPLIED else getattr(loss.ignores, "value", None)
        sure = index == -100 and loss.ignores is not IMPLIED
        if sure or not isinstance(index, int) or index >= 0:
            return True
        home = self.by_path.get(loss.place.path)
        return any(
            {index, "any"} & module.fills
            for module in self.program.modules
            if module.fills and (home is None or self.program.met(home, module))
        )

    # Terms

    def resolve(self, value: Value, env: Env) -> Value:
        kind = type(value)
        if kind not in _METHODS:
            name = "parts" if kind.__name__ in _OF_PARTS else kind.__name__.lower()
            _METHODS[kind] = getattr(type(self), f"_{name}", None)
        method = _METHODS[kind]
        if method is None:
            return value
        known = env.memo.get(id(value))
        if known is not None:
            return known[1]
        if self._nested >= _MAX_NESTED:
            return UNKNOWN
        self._nested += 1
        try:
            result: Value = method(self, value, env)
        finally:
            self._nested -= 1
        env.memo[id(value)] = value, result
        return result

    def _param(self, term: V.Param, env: Env) -> Value:
        info = term.function
        bound = env.bindings.get((info, term.name))
        if bound is not None:
            return bound
        if info.bound and term.name == info.params[0]:
            assert info.owner is not None
            if "classmethod" in info.decorators:
                return V.Class(info.owner)
            known = isinstance(env.receiver, (V.Instance, V.Record))
            return env.receiver if known else V.Instance(info.owner)  # type: ignore[return-value]
        if term.name in info.numbers:
            return NUMBER
        default = self.resolve(info.defaults.get(term.name, UNKNOWN), self.nothing)
        is_loss = isinstance(default, (V.LossModule, V.Partial)) or (
            isinstance(default, V.External) and default.path in SPECS
        )
        return default if is_loss else UNKNOWN

    def _import(self, term: V.Import, env: Env) -> Value:
        if env is not self.nothing:
            return self.resolve(term, self.nothing)
        for path in term.paths:
            parts = path.split(".")
            for length in range(len(parts), 0, -1):
                module = self.program.find(".".join(parts[:length]), term.importer, term.level)
                if (module is not None and module is not term.importer) or (
                    module is not None and length == len(parts)
                ):
                    value: Value = V.ModuleRef(module)
                    for name in parts[length:]:
                        value = self.member(value, name, term.importer, env)
                    if value is not UNKNOWN:
                        return value
            if term.level:
                package = self.program.find("", term.importer, term.level)
                if package is not None and package is not term.importer:
                    found: Value = V.ModuleRef(package)
                    for name in parts:
                        found = self.member(found, name, term.importer, env)
                    return found
        return V.External(term.paths[-1]) if not term.level else UNKNOWN

    def _test(self, term: V.Test, env: Env) -> Value:
        left = self.resolve(term.left, env)
        if term.op == "not":
            return V.Const(not left.value) if isinstance(left, V.Const) else UNKNOWN
        outcome = decided(term.op, left, self.resolve(term.right, env))
        return UNKNOWN if outcome is None else V.Const(outcome)

    def _either(self, term: V.Either, env: Env) -> Value:
        test = self.resolve(term.test, env)
        if isinstance(test, V.Const):
            return self.resolve(term.yes if test.value else term.no, env)
        return joined(self.resolve(term.yes, env), self.resolve(term.no, env))

    def _added(self, term: V.Added, env: Env) -> Value:
        left, right = self.resolve(term.left, env), self.resolve(term.right, env)
        if is_number(left):
            return right
        if is_number(right):
            return left
        a, b = as_loss(left), as_loss(right)
        if a is None or b is None:
            return UNKNOWN
        if a.reduced == b.reduced:
            return a if a == b else join(a, b)
        return b if a.reduced else a

    def _product(self, term: V.Product, env: Env) -> Value:
        factors: list[V.Factor] = []
        for factor in term.factors:
            value = self.resolve(factor.value, env)
            if isinstance(value, V.Product):
                factors += value.factors
            elif not is_number(value) and not (
                isinstance(value, V.Reduced) and as_loss(value) is None
            ):
                kind = "mask" if isinstance(value, V.Mask) else factor.kind
                factors.append(replace(factor, value=value, kind=kind))
        if not factors:
            return NUMBER
        return factors[0].value if len(factors) == 1 else V.Product(tuple(factors[:12]), term.place)

    def _reduced(self, term: V.Reduced, env: Env) -> Value:
        base = self.resolve(term.base, env)
        if term.dims:
            if isinstance(base, V.Loss) and not base.reduced:
                return replace(base, ignores=None)
            return UNKNOWN
        if isinstance(base, V.Loss) and base.reduced:
            return base
        if isinstance(base, V.Mask):
            return V.Count(base.key, "", of_mask=True)
        return replace(term, base=base)

    def _changed(self, term: V.Changed, env: Env) -> Value:
        base = self.resolve(term.base, env)
        if not isinstance(base, V.Loss):
            return UNKNOWN if term.how == "shaped" else base
        if term.how == "selected":
            return replace(base, uneven=True, ignores=None)
        if term.how == "shaped" and base.reduced:
            return UNKNOWN  # one number has no other shape
        return replace(base, detached=True) if term.how == "detached" else base

    def _parts(self, term: Value, env: Env) -> Value:
        """The same kind of value, of resolved parts."""

        def resolved(part: Any) -> Any:
            if isinstance(part, tuple):
                return tuple(map(resolved, part))
            return self.resolve(part, env) if isinstance(part, Value) else part

        parts = [resolved(getattr(term, part.name)) for part in fields(term)]  # type: ignore[arg-type]
        return bounded(type(term)(*parts), term)
