# SPDX-License-Identifier: BSD-3-Clause
"""Calls: of losses, of Python's own functions, of functions and objects of the program."""

from __future__ import annotations

import ast
import builtins
from dataclasses import replace

from masked_loss_lint import names
from masked_loss_lint import values as V
from masked_loss_lint.local import legacy_arguments
from masked_loss_lint.objects import Objects
from masked_loss_lint.program import ClassInfo
from masked_loss_lint.rules import Finding
from masked_loss_lint.torch_losses import REDUCTIONS, SPECS, LossSpec, legacy_reduction
from masked_loss_lint.values import FOREIGN, NONE, NUMBER, UNKNOWN, Given, Value, text_of

_MODELS = {"model", "module", "net", "network", "engine", "self"}
_MODEL_METHODS = {"train", "eval", "apply", "compile", "share_memory", *names.VIEWS}
_MAPPERS = {"map", "vmap", "starmap", "grad"}
_NUMERIC = {"float", "int", "len", "bool"}
_SOME_LOSS = {"torch.nn": "CrossEntropyLoss", "torch.nn.functional": "cross_entropy"}
_UNREDUCED = {"reduction", "reduce", "loss_reduction", "num_items_in_batch"}
_SHIFTED = {"cross_entropy", "nll_loss", "masked_cross_entropy"}
_COPIED = (
    "shifting the logits with .contiguous() copies the largest tensor of the step: shift the "
    "labels instead (labels = F.pad(labels, (0, 1), value=-100)[..., 1:]), or call "
    "masked_loss.masked_cross_entropy(logits, target, shift=True)"
)
IMPLIED = V.Const(-100)  # the ignore_index of a model of transformers


class Calls(Objects):
    def of_call(self, node: ast.Call) -> Value:
        function, reads = node.func, len(self.frame.read)
        receiver: Value = UNKNOWN
        if isinstance(function, ast.Attribute):
            receiver = self.value(function.value)
            result = self._method(node, function, receiver)
            if result is not None:
                return result
            callee = self.member(receiver, function.attr)
        else:
            callee = self.value(function)
        last, path = names.last_name(function), getattr(callee, "path", "")
        if path.startswith("torch.") and path not in SPECS:
            result = self.torch(last, node)
            if result is not None:
                return result
        given = self._given(node)
        for value in given.args if last in _MAPPERS else ():
            if isinstance(value, V.Function):
                value.info.given_away = True
        for name, value in given.keywords if last[:1].isupper() or last == "dict" else ():
            self.store(name, value)
        self._note_copy(callee, given, reads)
        if isinstance(callee, V.Super):
            return self._of_base(callee, last, given)
        return self.invoke(callee, given)

    def _given(self, node: ast.Call) -> Given:
        args = tuple(self.value(argument) for argument in node.args)
        keywords = tuple((k.arg or "", self.value(k.value)) for k in node.keywords)
        for value in (*args, *(value for _, value in keywords)):
            if isinstance(value, V.Function) and value.info.lambda_:
                value.info.given_away = True
        spread = any(isinstance(a, ast.Starred) for a in node.args) or "" in dict(keywords)
        return Given(args, tuple(k for k in keywords if k[0]), spread, node)

    def _note_copy(self, callee: Value, given: Given, reads: int) -> None:
        """ML005: logits[..., :-1, :].contiguous(), read by nothing but the loss."""
        path = getattr(callee.callee if isinstance(callee, V.Partial) else callee, "path", "")
        inputs = given.by(("input", "target"))
        logits, target = inputs.get("input"), inputs.get("target")
        if path not in SPECS or not (isinstance(logits, V.Sliced) and isinstance(target, V.Sliced)):
            return
        function = SPECS[path].function
        fits = function in _SHIFTED and not (logits.second and not SPECS[path].is_ours)
        if fits and logits.copied and target.tail and not logits.tail:
            read, met = self.frame.read, self.place(given.node)
            read[reads:] = [place for place in read[reads:] if place != logits.copied]
            self.frame.copies.append(Finding(logits.copied, "ML005", _COPIED, met))

    def _method(self, node: ast.Call, function: ast.Attribute, receiver: Value) -> Value | None:
        """A method of a tensor, list or dictionary; None: something else is called."""
        name, owner = function.attr, function.value
        match receiver:
            case V.Instance() if name in _MODEL_METHODS and not self.method(receiver.info, name):
                return receiver
            case V.Record() if name == "append" and len(node.args) == 1:
                number = len(receiver.fields)
                self.assign(owner, receiver.set(min(number, 7), self.value(node.args[0])))
                return NONE
        if name == "__setitem__" and len(node.args) == 2:
            item = ast.Subscript(owner, node.args[0], ast.Store())
            self.assign(ast.copy_location(item, node), self.value(node.args[1]))
            return NONE
        if isinstance(
            receiver, (V.External, V.Function, V.Class, V.ModuleRef, V.Instance, V.Super)
        ):
            return None
        return self.tensor_method(node, owner, name, receiver)

    # What a call returns

    def invoke(self, callee: Value, given: Given) -> Value:
        match callee:
            case V.Function():
                return self.call(callee, self.bind(callee, given)).value
            case V.Class():
                return self._construct(callee.info, given)
            case V.Partial():
                args, keywords = callee.given.args + given.args, callee.given.keywords
                given = replace(given, args=args, keywords=keywords + given.keywords)
                return self.invoke(callee.callee, given)
            case V.Instance():
                for name in ("__call__", "forward"):
                    method = self.in_class(callee.info, name, callee)
                    if isinstance(method, V.Function):
                        return self.invoke(method, given)
                base = self._criterion(callee)
                return self.invoke(base, given) if base else self._stranger(FOREIGN, given)
            case V.Record():
                return self.invoke(callee.base, given)
            case V.External():
                return self._external(callee, given)
        return self._stranger(callee, given)

    def _external(self, callee: V.External, given: Given) -> Value:
        path, last, args, node = callee.path, callee.path.rpartition(".")[2], given.args, given.node
        first = args[0] if args else UNKNOWN
        owner, params = self.frame.info.owner, self.frame.info.params
        if path == "builtins.super" and owner is not None:
            return V.Super(owner, (params and self.frame.scope.lookup(params[0])) or UNKNOWN)
        if path in SPECS:
            self._legacy(SPECS[path], node, 0)
            return self._loss(SPECS[path], given)
        if path == "functools.partial" and args:
            if isinstance(first, V.External) and first.path in SPECS:
                self._legacy(SPECS[first.path], node, 1)
            return V.bounded(V.Partial(first, replace(given, args=args[1:])), *args)
        if path == "builtins.getattr" and len(args) > 1:
            return self._getattr(node, first, args[1])
        if path == "builtins.setattr" and len(args) == 3:
            name = text_of(args[1])  # one that is not known may be that of the reduction
            target = ast.Attribute(node.args[0], name or "reduction", ast.Store())
            self.assign(ast.copy_location(target, node), args[2] if name else UNKNOWN)
        if path == "builtins.sum":
            return self.member(first, None) if isinstance(first, V.Record) else UNKNOWN
        if path.startswith("builtins.") and hasattr(builtins, last):
            return NUMBER if last in _NUMERIC or V.is_number(first) else UNKNOWN
        if path.startswith(("random.", "math.")):
            return NUMBER
        if path.endswith(("ModuleDict", "ModuleList")) and isinstance(first, V.Record):
            return first
        return self._stranger(UNKNOWN if path.startswith("builtins.") else callee, given)

    def _legacy(self, spec: LossSpec, node: ast.Call, skip: int) -> None:
        found = legacy_arguments(spec, node, skip)
        if found is not None:
            place = self.place(node)
            self.report(Finding(place, "ML002", found[0], place, found[1] and not place.cell))

    def _getattr(self, node: ast.Call, owner: Value, name: Value) -> Value:
        text, path = text_of(name), getattr(owner, "path", "")
        if text is not None:
            return self.member(owner, text)
        if path in _SOME_LOSS and names.is_loss(names.text(node.args[1])):
            return V.External(f"{path}.{_SOME_LOSS[path]}")  # a loss of torch, whichever it is
        return UNKNOWN

    def _stranger(self, callee: Value, given: Given) -> Value:
        """What code outside the analysed files returns."""
        keywords = dict(given.keywords)
        if keywords.get("labels", NONE) != NONE and not _UNREDUCED & keywords.keys():
            return self._model_output(given)
        for value, argument in zip(given.args, given.node.args, strict=False):
            if _MODELS & set(names.last_words(argument)) and not isinstance(value, V.External):
                return value  # model = DistributedDataParallel(model)
        return FOREIGN if callee is FOREIGN or isinstance(callee, V.External) else UNKNOWN

    def _model_output(self, given: Given) -> Value:
        """A model that is given labels returns its mean loss first, as all of transformers do."""
        known = V.Loss("the model", "mean", self.place(given.node), IMPLIED)
        return V.record(FOREIGN, {"loss": known, 0: known})

    def _construct(self, info: ClassInfo, given: Given) -> Value:
        init, made = self.method(info, "__init__"), V.Instance(info, given)
        bound = self.bind(init, given) if init else {}
        telling = any(self.tells(*item) for item in bound.items())
        instance: Value = V.Instance(info)
        if telling or (not init and self.loss_base(info)):
            instance = V.bounded(made, *given.args, *dict(given.keywords).values())
            if instance is made and made not in info.made and len(info.made) < 8:
                info.made.append(made)
        order = [name for base in self.family(info)[0][::-1] for name in base.order]
        fields = given.by(order)
        if init is None and (order or any(map(names.is_loss, fields))):
            return V.record(instance, fields)  # a dataclass, a named tuple
        return instance

    # Losses

    def _of_base(self, callee: V.Super, method: str, given: Given) -> Value:
        """super().__init__(...), .forward(...), .compute_loss(...) of a base that is not read."""
        bases = [getattr(base, "path", "") for base in self.family(callee.info)[1]]
        if method == "compute_loss" and "Trainer" in "".join(bases):
            loss = V.Loss(method, "mean", self.place(given.node), IMPLIED)
            return V.items([loss, UNKNOWN]) if "return_outputs" in dict(given.keywords) else loss
        if method == "__init__":
            self.frame.outcome.inherits = given
        receiver = callee.receiver
        own = receiver if isinstance(receiver, V.Instance) else V.Instance(callee.info)
        base = self._criterion(own) if method in {"forward", "__call__"} else None
        return self.invoke(base, given) if base else UNKNOWN

    def _criterion(self, receiver: V.Instance) -> Value | None:
        """The loss module that an object of a derived class is, with its settings."""
        path, init = self.loss_base(receiver.info), self.method(receiver.info, "__init__")
        if path is None:
            return None
        given = receiver.given or Given(spread=True)
        if init is not None:
            given = self.initialised(replace(init, receiver=receiver), receiver).inherits or Given()
        return self._loss(SPECS[path], given)

    def _loss(self, spec: LossSpec, given: Given) -> Value:
        values = given.by(spec.parameters)
        values.setdefault("reduction", UNKNOWN if given.spread else V.Const("mean"))
        legacy = [values.pop(name, NONE) for name in ("size_average", "reduce")]
        if legacy != [NONE, NONE]:
            flags = [None if v == NONE else bool(v.value) for v in legacy if isinstance(v, V.Const)]
            known = len(flags) == 2
            values["reduction"] = V.Const(legacy_reduction(*flags)) if known else UNKNOWN
        if spec.is_module:
            return V.Partial(V.External(spec.forward), Given((), tuple(values.items())))
        reduction, stats = text_of(values["reduction"]), values.get("return_stats", V.Const(False))
        by_sequence = spec.is_ours and values.get("dim", NONE) != NONE
        if reduction not in REDUCTIONS or not isinstance(stats, V.Const) or by_sequence:
            return UNKNOWN
        whole = values.get("normalizer", NONE) == NONE  # else: the count of the whole batch
        masked = spec.name == "masked_mean" or values.get("mask", NONE) != NONE
        ignores = values.get("ignore_index") if whole else None
        uneven = masked and whole
        loss = V.Loss(spec.name, reduction, self.place(given.node), ignores, uneven)
        return V.items([loss, UNKNOWN]) if stats.value else loss
