# SPDX-License-Identifier: BSD-3-Clause
"""What objects of the whole program hold and what calls of them return."""

from __future__ import annotations

from dataclasses import replace

from masked_loss_lint import names
from masked_loss_lint import values as V
from masked_loss_lint.program import Bindings, ClassInfo, Env, FunctionInfo, Given, Module, Program
from masked_loss_lint.rules import as_loss
from masked_loss_lint.torch_losses import REDUCTIONS, SPECS, LossSpec, legacy_reduction
from masked_loss_lint.values import FOREIGN, NONE, UNKNOWN, Place, Value, is_number, join

_MODEL_METHODS = names.VIEWS | {"train", "eval", "apply", "compile", "share_memory"}
_WRAPPERS = {"compile", "script", "deepcopy", "DataParallel"}
IMPLIED = V.Const(-100)  # the ignore_index of a model of transformers
_PARTIAL = V.External("functools.partial")
_UNREDUCED = {"reduction", "reduce", "loss_reduction", "num_items_in_batch"}


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
        self.by_path = {str(module.path): module for module in program.modules}

    def resolve(self, value: Value, env: Env) -> Value:
        raise NotImplementedError

    def invoke(self, callee: V.Function, given: Given) -> Value:
        raise NotImplementedError

    def bind(self, info: FunctionInfo, given: Given, skip: int) -> Bindings:
        """The parameters of a function, but for the first `skip`, in a call."""
        params = info.params[skip:]
        values = dict(zip(params, given.args, strict=False)) | given.keywords
        if not given.term.spread:  # * and ** may hold what is not seen
            defaults = (n for n in info.defaults if n not in values)
            values |= {n: _implied(self.resolve(info.defaults[n], self.nothing)) for n in defaults}
        known = (*params, *info.keyword_only)
        return {(info, name): values[name] for name in known if name in values}

    def given(self, term: V.Called, env: Env) -> Given:
        args = tuple(self.resolve(value, env) for value in term.args)
        return Given(args, {n: self.resolve(v, env) for n, v in term.keywords}, term, env.depth)

    # Attributes

    def _member(self, term: V.Member, env: Env) -> Value:
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
            case V.Loss() if not isinstance(key, str):
                return UNKNOWN if owner.reduced else owner
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
        others = self._family(owner.info)[1]
        if name == "module" or (name in _MODEL_METHODS and others):
            return owner
        return UNKNOWN if all(map(_is_plain, others)) else FOREIGN

    def _family(self, info: ClassInfo) -> tuple[list[ClassInfo], list[Value]]:
        if info not in self._families:
            self._families[info] = [info], []  # while its bases are being found out
            resolve = lambda value: self.resolve(value, self.nothing)  # noqa: E731
            self._families[info] = self.program.family(info, resolve)
        return self._families[info]

    def _of_class(self, info: ClassInfo, name: str, receiver: Value, env: Env) -> Value:
        key = (info, receiver, name)
        if key not in self._fields:
            self._fields[key] = NONE  # while it is being found out: x = f(x) adds nothing
            self._fields[key] = self._find_in_class(info, name, receiver, env)
        return self._fields[key]

    def _find_in_class(self, info: ClassInfo, name: str, receiver: Value, env: Env) -> Value:
        result: Value | None = None
        for current in self._family(info)[0]:
            method = current.methods.get(name)
            if method is not None and result is None:
                is_object = isinstance(receiver, (V.Instance, V.Record))
                bound = V.Function(method, receiver if is_object else None)
                if not {"property", "cached_property"} & method.decorators:
                    return bound
                return self.invoke(bound, Given((), {}, _NO_CALL, env.depth))
            for value in current.fields.get(name, ()):
                known = self.resolve(value, self._inside(receiver))
                result = known if result is None else joined(result, known)
        return result or UNKNOWN

    def _inside(self, receiver: Value) -> Env:
        """Where the fields of an object are resolved: its constructor's arguments are known."""
        if not isinstance(receiver, V.Instance):
            return self.nothing
        if receiver not in self._inner:
            env = self._inner[receiver] = Env(receiver=receiver)
            init = self._initializer(receiver.info)
            if init is not None and receiver.call is not None:
                env.bindings |= self.bind(init, self.given(receiver.call, self.nothing), skip=1)
        return self._inner[receiver]

    def _initializer(self, info: ClassInfo) -> FunctionInfo | None:
        found = (c.methods["__init__"] for c in self._family(info)[0] if "__init__" in c.methods)
        return next(found, None)

    def _of_super(self, owner: V.Super, name: str) -> Value:
        for current in self._family(owner.info)[0][1:]:
            if name in current.methods:
                return V.Function(current.methods[name], owner.receiver)
        spec = self._loss_base(owner.info)
        if spec is not None and name in {"forward", "__call__"}:
            known = isinstance(owner.receiver, V.Instance)
            return self._base_module(spec, owner.receiver if known else V.Instance(owner.info))  # type: ignore[arg-type]
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

    def _called(self, term: V.Called, env: Env) -> Value:
        callee = self.resolve(term.callee, env)
        return self._call(callee, self.given(term, env), env)

    def _call(self, callee: Value, given: Given, env: Env) -> Value:
        match callee:
            case V.Function():
                return self.invoke(callee, given)
            case V.Class():
                return self.construct(callee.info, given)
            case V.LossModule():
                return self._loss_of(callee, given)
            case V.Partial():
                args = (*callee.args, *given.args)
                keywords = dict(callee.keywords) | given.keywords
                return self._call(callee.callee, replace(given, args=args, keywords=keywords), env)
            case V.Instance():
                return self._call_instance(callee, given, env)
            case V.Record():
                base = callee.base
                if isinstance(base, V.LossModule) and callee.get("reduction") is not None:
                    base = replace(base, reduction=V.text_of(callee.get("reduction")))
                return self._call(base, given, env)
            case V.Super():
                return self._trainer_loss(callee, given)
            case V.External() if callee.path in SPECS:
                module = _module(SPECS[callee.path], given.args, given.keywords, given.term.spread)
                return module if module.spec.is_module else self._loss_of(module, given)
        if callee == _PARTIAL and given.args:
            return V.Partial(given.args[0], given.args[1:], tuple(given.keywords.items()))
        strange = callee is UNKNOWN or callee is FOREIGN or isinstance(callee, V.External)
        return self._stranger(callee, given) if strange else UNKNOWN

    def _stranger(self, callee: Value, given: Given) -> Value:
        """What code outside the analysed files returns."""
        args, keywords, term = given.args, given.keywords, given.term
        last = callee.path.rpartition(".")[2] if isinstance(callee, V.External) else ""
        if keywords.get("labels", NONE) != NONE and not _UNREDUCED & keywords.keys():
            return self._model_output(term)
        if isinstance(term.callee, V.Member) and term.callee.key == "prepare" and len(args) > 1:
            return V.Tuple(args)
        model = args[term.wraps] if 0 <= term.wraps < len(args) else FOREIGN
        if model is UNKNOWN or isinstance(model, (V.Instance, V.LossModule)):
            return model  # model = DistributedDataParallel(model)
        if callee is UNKNOWN:
            return UNKNOWN
        ours = args and isinstance(args[0], (V.Instance, V.LossModule, V.Function))
        if ours and last in _WRAPPERS:
            return args[0]
        if last[:1].isupper() and any(map(names.is_loss, keywords)):
            return V.Record(FOREIGN, tuple(keywords.items()))
        return FOREIGN

    def _model_output(self, term: V.Called) -> Value:
        """A model that is given labels returns its mean loss first, as all of transformers do."""
        loss = V.Loss("the model", "mean", term.place, IMPLIED)
        by_name = self._by_name("loss", term.reader, loss)
        return V.Record(FOREIGN, (("loss", by_name), (0, by_name)))

    def _trainer_loss(self, callee: V.Super, given: Given) -> Value:
        bases = [b.path for b in self._family(callee.info)[1] if isinstance(b, V.External)]
        outputs = given.keywords.get("return_outputs", V.Const(False))
        if not any("Trainer" in path for path in bases) or not isinstance(outputs, V.Const):
            return UNKNOWN
        loss = V.Loss("compute_loss", "mean", given.term.place, IMPLIED)
        return V.Tuple((loss, UNKNOWN)) if outputs.value else loss

    def construct(self, info: ClassInfo, given: Given) -> Value:
        keywords = tuple(sorted(given.keywords.items(), key=lambda item: item[0]))
        call = replace(_NO_CALL, args=given.args, keywords=keywords, spread=given.term.spread)
        instance = V.Instance(info, call)
        if self._initializer(info) is None:
            order = [name for current in self._family(info)[0][::-1] for name in current.order]
            if order or any(map(names.is_loss, given.keywords)):
                fields = dict(zip(order, given.args, strict=False)) | given.keywords
                return V.Record(instance, tuple(fields.items()))
        return instance

    def _call_instance(self, callee: V.Instance, given: Given, env: Env) -> Value:
        for name in ("__call__", "forward"):
            method = self._of_class(callee.info, name, callee, env)
            if isinstance(method, V.Function):
                return self.invoke(method, given)
        spec = self._loss_base(callee.info)
        if spec is not None:
            return self._loss_of(self._base_module(spec, callee), given)
        return self._stranger(FOREIGN, given) if self._family(callee.info)[1] else UNKNOWN

    # Losses

    def _loss_base(self, info: ClassInfo) -> LossSpec | None:
        """The loss module of PyTorch that a class inherits from."""
        bases = (base.path for base in self._family(info)[1] if isinstance(base, V.External))
        return next((SPECS[p] for p in bases if p in SPECS and SPECS[p].is_module), None)

    def _base_module(self, spec: LossSpec, receiver: V.Instance) -> V.LossModule:
        init, env = self._initializer(receiver.info), self._inside(receiver)
        call = receiver.call if init is None or init.owner is None else init.owner.base_init
        if self._of_class(receiver.info, "reduction", receiver, env) is not UNKNOWN:
            return V.LossModule(spec, None)
        if call is None:
            return V.LossModule(spec, "mean" if init is not None else None)
        given = self.given(call, env)
        return _module(spec, given.args, given.keywords, call.spread)

    def _loss_of(self, module: V.LossModule, given: Given) -> Value:
        spec, stats = module.spec, given.keywords.get("return_stats", V.Const(False))
        if module.reduction is None or not isinstance(stats, V.Const):
            return UNKNOWN
        forward = f"masked_loss.{spec.function}" if spec.is_ours and spec.is_module else spec.path
        parameters = SPECS[forward].parameters if spec.is_ours else ()
        values = dict(zip(parameters, given.args, strict=False)) | given.keywords
        if spec.is_ours and values.get("dim", NONE) != NONE:
            return UNKNOWN  # one value for each sequence
        whole = values.get("normalizer", NONE) == NONE  # else: the count of the whole batch
        masked = spec.name == "masked_mean" or values.get("mask", NONE) != NONE
        uneven = spec.is_ours and masked and whole
        ignores = module.ignores if whole else None
        place = given.term.place
        loss = V.Loss(spec.function, module.reduction, place, ignores, uneven)
        return V.Tuple((loss, UNKNOWN)) if stats.value else loss


_NO_CALL = V.Called(UNKNOWN, (), (), Place("", 0, 0, 0), None)  # type: ignore[arg-type]


def _implied(value: Value) -> Value:
    """-100 as the default of some parameter says no more than PyTorch's own default."""
    return IMPLIED if value == IMPLIED else value


def _module(
    spec: LossSpec, args: tuple[Value, ...], keywords: dict[str, Value], spread: bool
) -> V.LossModule:
    given = dict(zip(spec.parameters, args, strict=False)) | keywords
    reduction = V.text_of(given.get("reduction", UNKNOWN if spread else V.Const("mean")))
    legacy = [given.get(name, NONE) for name in ("size_average", "reduce")]
    flags = [None if v == NONE else bool(v.value) for v in legacy if isinstance(v, V.Const)]
    if legacy != [NONE, NONE]:
        reduction = legacy_reduction(flags[0], flags[1]) if len(flags) == 2 else None
    known = reduction if reduction in REDUCTIONS else None
    return V.LossModule(spec, known, given.get("ignore_index"))


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
        paths = {v.path for v in (a, b) if isinstance(v, V.External)}
        if len(paths) == 2 and paths <= SPECS.keys():
            return a if len({SPECS[path].is_module for path in paths}) == 1 else UNKNOWN
    return join(a, b)


def _is_plain(base: Value) -> bool:
    """True for bases that add no losses to an object: nn.Module, ABC."""
    return isinstance(base, V.External) and base.path.startswith(
        ("torch.nn.", "builtins.", "abc.", "typing.", "pytorch_lightning", "lightning")
    )
