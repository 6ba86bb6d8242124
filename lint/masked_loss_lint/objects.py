# SPDX-License-Identifier: BSD-3-Clause
"""What objects of the whole program hold and what calls of them return."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from masked_loss_lint import names
from masked_loss_lint import values as V
from masked_loss_lint.program import ClassInfo, FunctionInfo, Module, Program
from masked_loss_lint.rules import as_loss
from masked_loss_lint.torch_losses import REDUCTIONS, SPECS, LossSpec
from masked_loss_lint.values import FOREIGN, NONE, UNKNOWN, Place, Value, is_number, join

_MODEL_METHODS = names.VIEWS | {"train", "eval", "apply", "compile", "share_memory"}
_CALLERS = ("__call__", "forward", "training_step")
_IMPLIED = V.Const(-100)  # the ignore_index of a model of transformers
_UNREDUCED = {"reduction", "reduce", "loss_reduction", "num_items_in_batch"}


@dataclass(eq=False)
class Env:
    """The arguments of one evaluation of a function; empty: nothing is known of them."""

    bindings: dict[tuple[FunctionInfo, str], Value] = field(default_factory=dict)
    receiver: Value | None = None
    depth: int = 0
    memo: dict[int, tuple[Value, Value]] = field(default_factory=dict)


class Objects:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.nothing = Env()
        self.busy: set[int] = set()
        self._fields: dict[tuple[ClassInfo, Value, str], Value] = {}
        self._inner: dict[Value, Env] = {}
        self._families: dict[ClassInfo, tuple[list[ClassInfo], list[Value]]] = {}
        self._named: dict[tuple[str, Module], Value] = {}
        self.stores: dict[str, list[tuple[Module, list[Value]]]] = {}
        self._by_path = {str(module.path): module for module in program.modules}

    def resolve(self, value: Value, env: Env) -> Value:
        raise NotImplementedError

    def invoke(
        self,
        callee: V.Function,
        args: tuple[Value, ...],
        keywords: dict[str, Value],
        spread: bool,
        depth: int,
    ) -> Value:
        raise NotImplementedError

    def all(self, values: Iterable[Value], env: Env) -> tuple[Value, ...]:
        return tuple(self.resolve(value, env) for value in values)

    # Attributes

    def member_term(self, term: V.Member, env: Env) -> Value:
        if id(term) in self.busy:
            return NONE  # self.out = f(self.out) adds nothing to what it holds
        self.busy.add(id(term))
        try:
            return self.member(self.resolve(term.owner, env), term.key, term.reader, env)
        finally:
            self.busy.discard(id(term))

    def member(self, owner: Value, key: str | int | None, reader: Module, env: Env) -> Value:
        match owner:
            case V.Record():
                return self._field(owner, key, reader, env)
            case V.Tuple() if isinstance(key, int):
                return owner.items[key] if -len(owner.items) <= key < len(owner.items) else UNKNOWN
            case V.Many():
                return owner.each
            case V.Instance() if isinstance(key, str):
                return self._attribute(owner, key, env)
            case V.Class() if isinstance(key, str):
                return self._of_class(owner.info, key, owner, env)
            case V.Super() if isinstance(key, str):
                return self._of_super(owner, key)
            case V.ModuleRef() if isinstance(key, str):
                return self._of_module(owner.module, key)
            case V.External() if isinstance(key, str):
                return V.External(f"{owner.path}.{key}")
            case V.LossModule() | V.Function() if key == "forward":
                return owner
        if owner is FOREIGN:
            return FOREIGN
        if owner is UNKNOWN and isinstance(key, str):
            return self._by_name(key, reader, None)
        return UNKNOWN

    def _field(self, owner: V.Record, key: str | int | None, reader: Module, env: Env) -> Value:
        if key is None:
            result: Value | None = None
            for _, value in owner.fields:
                result = joined(result, value) if result is not None else value
            return result or UNKNOWN
        found = owner.get(key)
        if found is not None and found != NONE:
            return found
        return self.member(owner.base, key, reader, env)

    def _attribute(self, owner: V.Instance, name: str, env: Env) -> Value:
        found = self._of_class(owner.info, name, owner, env)
        if found is not UNKNOWN:
            return found
        _, others = self._family(owner.info)
        if name == "module" or (name in _MODEL_METHODS and others):
            return owner
        return FOREIGN if others and any(not _is_plain(base) for base in others) else UNKNOWN

    def _family(self, info: ClassInfo) -> tuple[list[ClassInfo], list[Value]]:
        if info not in self._families:
            self._families[info] = [info], []  # while its bases are being found out
            self._families[info] = self.program.family(
                info, lambda v: self.resolve(v, self.nothing)
            )
        return self._families[info]

    def _of_class(self, info: ClassInfo, name: str, receiver: Value, env: Env) -> Value:
        known = self._fields.get((info, receiver, name))
        if known is None:
            self._fields[info, receiver, name] = (
                NONE  # while it is being found out: x = f(x) adds nothing
            )
            known = self._fields[info, receiver, name] = self._find_in_class(
                info, name, receiver, env
            )
        return known

    def _find_in_class(self, info: ClassInfo, name: str, receiver: Value, env: Env) -> Value:
        result: Value | None = None
        for current in self._family(info)[0]:
            method = current.methods.get(name)
            if method is not None and result is None:
                bound = V.Function(
                    method, receiver if isinstance(receiver, (V.Instance, V.Record)) else None
                )
                cached = {"property", "cached_property"} & method.decorators
                return self.invoke(bound, (), {}, False, env.depth) if cached else bound
            for value in current.fields.get(name, ()):
                known = self.resolve(value, self._inside(receiver))
                result = known if result is None else joined(result, known)
        return result or UNKNOWN

    def _inside(self, receiver: Value) -> Env:
        """Where the fields of an object are resolved: its constructor's arguments are known."""
        if not isinstance(receiver, V.Instance):
            return self.nothing
        if receiver in self._inner:
            return self._inner[receiver]
        env = self._inner[receiver] = Env(receiver=receiver)
        init = self._initializer(receiver.info)
        if init is not None and receiver.call is not None:
            params = init.params[1:]
            given = dict(zip(params, receiver.call.args, strict=False)) | dict(
                receiver.call.keywords
            )
            for name in (*params, *init.keyword_only):
                if name in given:
                    env.bindings[init, name] = given[name]
                elif name in init.defaults and not receiver.call.spread:
                    env.bindings[init, name] = self.resolve(init.defaults[name], self.nothing)
        return env

    def _initializer(self, info: ClassInfo) -> FunctionInfo | None:
        found = (c.methods["__init__"] for c in self._family(info)[0] if "__init__" in c.methods)
        return next(found, None)

    def _of_super(self, owner: V.Super, name: str) -> Value:
        classes, _ = self._family(owner.info)
        for current in classes[1:]:
            if name in current.methods:
                return V.Function(current.methods[name], owner.receiver)
        spec = self._loss_base(owner.info)
        if spec is not None and name in {"forward", "__call__"}:
            receiver = (
                owner.receiver if isinstance(owner.receiver, V.Instance) else V.Instance(owner.info)
            )
            return self._base_module(spec, receiver)
        return owner if name == "compute_loss" else UNKNOWN

    def _of_module(self, module: Module, name: str) -> Value:
        self.program.walked(module)
        value = module.scope.names.get(name)
        if value is None and module.stars:
            for dotted, level in module.stars:
                value = V.Import((f"{dotted}.{name}",), module, level)
        if value is not None:
            marker = id(value)
            if marker in self.busy:
                return UNKNOWN
            self.busy.add(marker)
            try:
                return self.resolve(value, self.nothing)
            finally:
                self.busy.discard(marker)
        inner = self.program.submodule(module, name)
        return V.ModuleRef(inner) if inner is not None else UNKNOWN

    def _by_name(self, name: str, reader: Module, default: V.Loss | None) -> Value:
        """What `x.name` is when nobody can identify x: what the program stores under that name.

        Only a loss is believed, only under a name that says so, only if all that is stored under it
        in files that imports connect with the reader agrees.
        """
        if not names.is_loss(name):
            return UNKNOWN
        known = self._named.get((name, reader))
        if known is None:
            self._named[name, reader] = NONE  # while it is being found out
            known = NONE
            for module, values in self.stores.get(name, ()):
                if self.program.met(reader, module):
                    for value in values:
                        known = self._also(known, value)
            self._named[name, reader] = known
        if known == NONE:
            return default or UNKNOWN
        return known if isinstance(known, V.Loss) and known.reduced else UNKNOWN

    def _also(self, known: Value, stored: Value) -> Value:
        value = self.resolve(stored, self.nothing)
        if is_number(value) or value == NONE:
            return known  # a loss that is logged, or not there yet
        loss = as_loss(value)
        return UNKNOWN if loss is None else join(known, loss)

    # Calls

    def called(self, term: V.Called, env: Env) -> Value:
        callee = self.resolve(term.callee, env)
        args = self.all(term.args, env)
        keywords = {name: self.resolve(value, env) for name, value in term.keywords}
        return self._call(callee, args, keywords, term, env)

    def _call(
        self,
        callee: Value,
        args: tuple[Value, ...],
        keywords: dict[str, Value],
        term: V.Called,
        env: Env,
    ) -> Value:
        match callee:
            case V.Function():
                return self.invoke(callee, args, keywords, term.spread, env.depth)
            case V.Class():
                return self._construct(callee.info, args, keywords, term)
            case V.LossModule():
                return self._loss_of(callee, keywords, term)
            case V.Partial():
                merged = dict(callee.keywords) | keywords
                return self._call(callee.callee, (*callee.args, *args), merged, term, env)
            case V.Instance():
                return self._call_instance(callee, args, keywords, term, env)
            case V.Record():
                return self._call(callee.base, args, keywords, term, env)
            case V.Super() if callee.info:
                return self._trainer_loss(callee, keywords, term)
            case V.External() if callee.path in SPECS:
                return self._call_loss(SPECS[callee.path], args, keywords, term)
        if callee is UNKNOWN or callee is FOREIGN or isinstance(callee, V.External):
            return self._stranger(callee, args, keywords, term)
        return UNKNOWN

    def _stranger(
        self, callee: Value, args: tuple[Value, ...], keywords: dict[str, Value], term: V.Called
    ) -> Value:
        """What code outside the analysed files returns."""
        last = callee.path.rpartition(".")[2] if isinstance(callee, V.External) else ""
        if "labels" in keywords and keywords["labels"] != NONE and not _UNREDUCED & keywords.keys():
            return self._model_output(term)
        if isinstance(term.callee, V.Member) and term.callee.key == "prepare" and len(args) > 1:
            return V.Tuple(args)
        if 0 <= term.wraps < len(args) and (
            args[term.wraps] is UNKNOWN or isinstance(args[term.wraps], (V.Instance, V.LossModule))
        ):
            return args[term.wraps]  # model = DistributedDataParallel(model)
        if callee is UNKNOWN:
            return UNKNOWN
        wrapped = [a for a in args if isinstance(a, (V.Instance, V.LossModule, V.Function))]
        if wrapped and last in {"compile", "script", "deepcopy", "DataParallel"}:
            return wrapped[0]
        if last[:1].isupper() and any(names.is_loss(name) for name in keywords):
            return V.Record(FOREIGN, tuple(keywords.items()))
        return FOREIGN

    def _model_output(self, term: V.Called) -> Value:
        """A model that is given labels returns its mean loss first, as all of transformers do."""
        loss = V.Loss("the model", "mean", term.place, _IMPLIED)
        by_name = self._by_name("loss", term.reader, loss)
        return V.Record(FOREIGN, (("loss", by_name), (0, by_name)))

    def _trainer_loss(self, callee: V.Super, keywords: dict[str, Value], term: V.Called) -> Value:
        _, others = self._family(callee.info)
        if not any(isinstance(base, V.External) and "Trainer" in base.path for base in others):
            return UNKNOWN
        loss = V.Loss("compute_loss", "mean", term.place, _IMPLIED)
        outputs = keywords.get("return_outputs", V.Const(False))
        if isinstance(outputs, V.Const):
            return V.Tuple((loss, UNKNOWN)) if outputs.value else loss
        return UNKNOWN

    def _construct(
        self, info: ClassInfo, args: tuple[Value, ...], keywords: dict[str, Value], term: V.Called
    ) -> Value:
        call = V.Called(
            UNKNOWN,
            args,
            tuple(sorted(keywords.items(), key=lambda item: item[0])),
            term.place,
            term.reader,
            -1,
            term.spread,
        )
        instance = V.Instance(info, replace(call, place=Place("", 0, 0, 0)))
        if self._initializer(info) is None:
            order = [name for current in self._family(info)[0][::-1] for name in current.order]
            fields = dict(zip(order, args, strict=False)) | keywords
            if order or any(map(names.is_loss, keywords)):
                return V.Record(instance, tuple(fields.items()))
        return instance

    def constructed(self, info: ClassInfo, call: V.Called, env: Env) -> Value:
        keywords = {name: self.resolve(value, env) for name, value in call.keywords}
        made = self._construct(info, self.all(call.args, env), keywords, call)
        return made.base if isinstance(made, V.Record) else made

    def _call_instance(
        self,
        callee: V.Instance,
        args: tuple[Value, ...],
        keywords: dict[str, Value],
        term: V.Called,
        env: Env,
    ) -> Value:
        for name in _CALLERS[:2]:
            method = self._of_class(callee.info, name, callee, env)
            if isinstance(method, V.Function):
                return self.invoke(method, args, keywords, term.spread, env.depth)
        spec = self._loss_base(callee.info)
        if spec is not None:
            return self._loss_of(self._base_module(spec, callee), keywords, term)
        _, others = self._family(callee.info)
        return self._stranger(FOREIGN, args, keywords, term) if others else UNKNOWN

    # Losses

    def _loss_base(self, info: ClassInfo) -> LossSpec | None:
        """The loss module of PyTorch that a class inherits from."""
        for base in self._family(info)[1]:
            if isinstance(base, V.External) and base.path in SPECS and SPECS[base.path].is_module:
                return SPECS[base.path]
        return None

    def _base_module(self, spec: LossSpec, receiver: V.Instance) -> V.LossModule:
        init = self._initializer(receiver.info)
        env = self._inside(receiver)
        if init is None:
            call = receiver.call
        else:
            assert init.owner is not None
            call = init.owner.base_init
        if call is None:
            return V.LossModule(spec, "mean" if init is not None else UNKNOWN)
        arguments = dict(zip(spec.parameters, self.all(call.args, env), strict=False))
        arguments |= {name: self.resolve(value, env) for name, value in call.keywords}
        changed = self._of_class(receiver.info, "reduction", receiver, env)
        return V.LossModule(
            spec,
            *_reduction(arguments if changed is UNKNOWN else {"reduction": UNKNOWN}, call.spread),
        )

    def _call_loss(
        self, spec: LossSpec, args: tuple[Value, ...], keywords: dict[str, Value], term: V.Called
    ) -> Value:
        given = dict(zip(spec.parameters, args, strict=False)) | keywords
        reduction, ignores = _reduction(given, term.spread)
        module = V.LossModule(spec, reduction, ignores)
        return module if spec.is_module else self._loss_of(module, keywords, term)

    def _loss_of(self, module: V.LossModule, keywords: dict[str, Value], term: V.Called) -> Value:
        if not isinstance(module.reduction, str) or "return_stats" in keywords:
            return UNKNOWN
        return V.Loss(module.spec.function, module.reduction, term.place, module.ignores)

    def can_be_ignored(self, loss: V.Loss) -> bool:
        """False where no target is ever the ignore_index: it is a number such as -1, and no file
        that meets the loss puts it into labels. -100 is named by those who use it."""
        index = -100 if loss.ignores is _IMPLIED else getattr(loss.ignores, "value", None)
        sure = index == -100 and loss.ignores is not _IMPLIED
        if sure or not isinstance(index, int) or index >= 0:
            return True
        home = self._by_path.get(loss.place.path)
        return any(
            {index, "any"} & module.fills
            for module in self.program.modules
            if module.fills and (home is None or self.program.met(home, module))
        )


def implied(ignores: Value | None) -> Value | None:
    """-100 as the default of some parameter says no more than PyTorch's own default."""
    return _IMPLIED if ignores == _IMPLIED else ignores


def _reduction(given: dict[str, Value], spread: bool) -> tuple[str | Value, Value | None]:
    ignores = implied(given.get("ignore_index"))
    legacy = [given.get(name, NONE) for name in ("size_average", "reduce")]
    if legacy != [NONE, NONE]:
        return UNKNOWN, ignores
    value = given.get("reduction", UNKNOWN if spread else V.Const("mean"))
    known = (
        isinstance(value, V.Const) and isinstance(value.value, str) and value.value in REDUCTIONS
    )
    return (str(value.value) if isinstance(value, V.Const) and known else UNKNOWN), ignores


def joined(a: Value, b: Value) -> Value:
    """`join`, of losses in whatever form they are."""
    if not isinstance(a, V.Loss) or not isinstance(b, V.Loss):
        first, second = as_loss(a), as_loss(b)
        if first is not None and second is not None:
            return join(first, second)
        if first is not None and (is_number(b) or b == NONE):
            return a if first.reduced or b == NONE else UNKNOWN
        if second is not None and (is_number(a) or a == NONE):
            return b if second.reduced or a == NONE else UNKNOWN
        if (
            isinstance(a, V.External)
            and isinstance(b, V.External)
            and {a.path, b.path} <= SPECS.keys()
        ):
            return a if SPECS[a.path].is_module == SPECS[b.path].is_module else UNKNOWN
    return join(a, b)


def _is_plain(base: Value) -> bool:
    """True for bases that add no losses to an object: nn.Module, ABC."""
    return isinstance(base, V.External) and base.path.startswith(
        ("torch.nn.", "builtins.", "abc.", "typing.", "pytorch_lightning", "lightning")
    )
