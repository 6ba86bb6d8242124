# SPDX-License-Identifier: BSD-3-Clause
"""Runs the analysed files on abstract values, and tells the rules what it meets.

Every function body is evaluated once with unknown arguments, and again for each call whose
arguments are known, so a loss can be followed through parameters, returns, closures and objects.
Nothing of the analysed program is executed. Loops are walked once, branches one by one and then
joined; a test whose outcome is known takes one branch only.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import replace

from masked_loss_lint import names
from masked_loss_lint.events import Event, Frame, LossCall, arguments_of
from masked_loss_lint.project import (
    ClassInfo,
    FunctionInfo,
    FunctionNode,
    ModuleInfo,
    Project,
    Scope,
)
from masked_loss_lint.tensors import Tensors, add, slice_of
from masked_loss_lint.torch_losses import SPECS, LossSpec, legacy_reduction
from masked_loss_lint.values import (
    NONE,
    NUMBER,
    UNKNOWN,
    Class,
    Const,
    Count,
    External,
    Function,
    Instance,
    Loss,
    Losses,
    LossModule,
    Mask,
    Module,
    Number,
    Partial,
    Place,
    Record,
    Sliced,
    Tuple,
    Value,
    is_number,
    join,
)

_PASSES = 3  # until nothing new is learned of attributes and globals, but no more than this
_MAX_DEPTH = 8  # of calls within calls
_MAX_CONTEXTS = 8  # evaluations of one function with different arguments

_CONVENTIONS = {"F": "torch.nn.functional", "nn": "torch.nn", "torch": "torch"}
# The model that comes out is the model that went in.
_WRAPPERS = {
    "compile",
    "DistributedDataParallel",
    "DataParallel",
    "FullyShardedDataParallel",
    "DDP",
}
_WRAPPERS |= {"FSDP", "script", "deepcopy", "prepare", "unwrap_model", "convert_sync_batchnorm"}
_MODELS = {"model", "module", "net", "network", "engine", "self"}
_SELF_METHODS = names.VIEWS | {"train", "eval", "apply", "compile", "share_memory"}
_NUMERIC_CALLS = {"float", "int", "len", "bool", "round", "max", "min"}


class Interpreter:
    """Evaluates a project and hands every event of the last pass to `report`.

    A statement that is nested too deeply to be evaluated is left out; `too_deep` is told where.
    """

    def __init__(
        self,
        project: Project,
        report: Callable[[Event], None],
        too_deep: Callable[[Place], None],
    ) -> None:
        self.project = project
        self._report = report
        self._too_deep = too_deep
        self._events: list[Event] = []
        self._pass = 0
        self._results: dict[FunctionInfo, dict[object, Value | None]] = {}
        self._closures: dict[FunctionInfo, Scope] = {}
        self._depth = 0
        self.tensors = Tensors(self._emit)

    def run(self) -> None:
        for number in range(1, _PASSES + 1):
            self._pass = number
            self._results.clear()
            self._events.clear()
            before = self.project.changes
            relevant = [module for module in self.project.modules if module.relevant]
            for module in relevant:
                self._run_module(module)
            for module in relevant:
                for function in module.functions:
                    if function.relevant:
                        self._standalone(function)
            if number > 1 and self.project.changes == before:
                break
        for event in self._events:
            self._report(event)

    def _emit(self, event: Event) -> None:
        if event.frame.module.relevant:
            self._events.append(event)

    # Modules, classes and functions

    def _run_module(self, module: ModuleInfo) -> None:
        if module.done == self._pass:
            return
        module.done = self._pass
        depth, self._depth = self._depth, 0
        tree = module.source.tree
        before = dict(module.scope.names)
        self._block(tree.body, Frame(module, module.scope, tree))
        self.project.changes += module.scope.names != before
        self._depth = depth

    def _standalone(self, function: FunctionInfo) -> None:
        """Evaluates a function of which no call is known: its arguments are unknown."""
        if function.given_away:
            return
        owner = function.owner
        if owner is not None and function.name == "__init__" and owner.constructed:
            return  # judged by the calls that construct it
        receiver = Instance(owner) if owner is not None else None
        scope = self._closures.get(function, function.module.scope)
        try:
            self._invoke(Function(function, scope, receiver), {}, None, defaults=False)
        except RecursionError:  # in a lambda, which has no statement to leave out
            self._too_deep(Frame(function.module, scope, function.node).place(function.node))

    def _invoke(
        self, callee: Function, given: dict[str, Value], caller: Frame | None, defaults: bool = True
    ) -> Value:
        """The value that a function of the analysed files returns for these arguments."""
        info, arguments = callee.info, callee.info.node.args
        positional = [*arguments.posonlyargs, *arguments.args]
        bound: dict[str, Value] = {a.arg: UNKNOWN for a in [*positional, *arguments.kwonlyargs]}
        pairs = list(zip(reversed(positional), reversed(arguments.defaults), strict=False))
        if defaults:
            bound |= {a.arg: self._constant(d) for a, d in pairs}
            keyword = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=False)
            bound |= {a.arg: self._constant(d) for a, d in keyword if d is not None}
        else:
            bound |= {a.arg: NUMBER for a, d in pairs if _is_switch(a, d)}
        if not info.relevant and not any(isinstance(v, _CARRIERS) for v in given.values()):
            bound, given = dict.fromkeys(bound, UNKNOWN), {}  # one evaluation is enough
        bound |= {name: value for name, value in given.items() if name in bound}
        for argument in [*positional, *arguments.kwonlyargs]:
            if bound[argument.arg] == UNKNOWN and _is_number_annotation(argument.annotation):
                bound[argument.arg] = NUMBER
        if callee.receiver is not None and positional and not info.decorated("staticmethod"):
            bound[positional[0].arg] = callee.receiver

        key = (callee.scope, tuple(bound.items()))
        results = self._results.setdefault(info, {})
        if key in results:
            return results[key] or UNKNOWN  # None: it is being evaluated now (recursion)
        if self._depth >= _MAX_DEPTH or len(results) >= _MAX_CONTEXTS:
            return UNKNOWN
        results[key] = None
        self._run_globals(info.module)
        scope = Scope(callee.scope, bound)
        per_sample = info.per_sample or info.decorated("vmap") or bool(caller and caller.per_sample)
        frame = Frame(info.module, scope, info.node, info.owner, per_sample, caller)
        self._depth += 1
        try:
            if isinstance(info.node, ast.Lambda):
                result = self.value(info.node.body, frame)
            else:
                self._block(info.node.body, frame)
                result = self._returned(info, frame)
        finally:
            self._depth -= 1
        results[key] = result
        return result

    def _run_globals(self, module: ModuleInfo) -> None:
        if module.done == 0:
            self._run_module(module)

    def _constant(self, node: ast.expr) -> Value:
        return Const(node.value) if isinstance(node, ast.Constant) else UNKNOWN

    def _returned(self, info: FunctionInfo, frame: Frame) -> Value:
        if isinstance(info.node, ast.AsyncFunctionDef) or info.is_generator:
            return UNKNOWN
        result: Value | None = None
        for value in frame.returns:
            result = join(result, value)
        return result or NONE

    def _construct(self, info: ClassInfo, node: ast.Call, frame: Frame) -> Value:
        info.constructed = True
        base = info.external_base()
        init = info.method("__init__")
        if init is not None:
            function = Function(init, init.module.scope, Instance(info))
            self._call_function(function, node, frame)
            return Instance(info)
        if base is not None and base.path in SPECS:
            module = self._loss_module(SPECS[base.path], node, frame)
            self.project.remember_member(info, "<loss>", module)
            return Instance(info)
        arguments = [self.value(a, frame) for a in node.args]
        fields = dict(zip(info.fields, arguments, strict=False))
        fields |= {k.arg: self.value(k.value, frame) for k in node.keywords if k.arg}
        if info.fields:
            return self._record(fields)
        return Instance(info)

    def _record(self, fields: dict[str, Value]) -> Record:
        for name, value in fields.items():
            self.project.remember_attribute(name, value)
        return Record(tuple(fields.items()))

    # Statements: each returns True when control does not go past it

    def _block(self, body: list[ast.stmt], frame: Frame) -> bool:
        return any(self._statement(statement, frame) for statement in body)

    def _statement(self, node: ast.stmt, frame: Frame) -> bool:
        method = getattr(self, f"_do_{type(node).__name__.lower()}", None)
        try:
            if method is not None:
                return bool(method(node, frame))
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.expr):
                    self.value(child, frame)
        except RecursionError:
            self._too_deep(frame.place(node))
            for inner in ast.walk(node):
                if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
                    frame.scope.names[inner.id] = UNKNOWN
        return False

    def _do_return(self, node: ast.Return, frame: Frame) -> bool:
        frame.returns.append(NONE if node.value is None else self.value(node.value, frame))
        return True

    def _do_raise(self, node: ast.Raise, frame: Frame) -> bool:
        return True

    _do_continue = _do_break = _do_raise

    def _do_assign(self, node: ast.Assign, frame: Frame) -> None:
        value = self.value(node.value, frame)
        for target in node.targets:
            if value == UNKNOWN and names.is_mask(target) and names.is_scalar(node.value):
                value = NUMBER
            self._assign(target, value, frame)

    def _do_annassign(self, node: ast.AnnAssign, frame: Frame) -> None:
        if node.value is not None:
            self._assign(node.target, self.value(node.value, frame), frame)

    def _do_augassign(self, node: ast.AugAssign, frame: Frame) -> None:
        left = self.value(node.target, frame)
        right = self.value(node.value, frame)
        value = self.tensors.operate(node, node.op, node.target, node.value, left, right, frame)
        self._assign(node.target, value, frame)

    def _do_functiondef(self, node: ast.FunctionDef | ast.AsyncFunctionDef, frame: Frame) -> None:
        info = frame.module.by_node.get(node)
        if not isinstance(info, FunctionInfo):
            return
        for decorator in node.decorator_list:
            self.value(decorator, frame)
        function = Function(info, frame.scope)
        frame.scope.names[node.name] = UNKNOWN if info.decorated("contextmanager") else function
        self._closures[info] = frame.scope

    _do_asyncfunctiondef = _do_functiondef

    def _do_classdef(self, node: ast.ClassDef, frame: Frame) -> None:
        info = frame.module.classes[node]
        info.bases = [self.value(base, frame) for base in node.bases]
        for base in info.bases:
            if isinstance(base, Class) and info not in base.info.subclasses:
                base.info.subclasses.append(info)
        frame.scope.names[node.name] = Class(info)
        body = Scope(frame.scope)
        inner = replace(frame, scope=body, owner=info)
        self._block([s for s in node.body if not isinstance(s, _DEFINITIONS)], inner)
        for name, value in body.names.items():
            if not isinstance(value, (Function, Class)):
                self.project.remember_member(info, name, value)

    def _do_import(self, node: ast.Import, frame: Frame) -> None:
        for alias in node.names:
            if alias.asname:
                value = self.project.import_value(alias.name, frame.module)
                frame.scope.names[alias.asname] = value
            else:
                root = alias.name.split(".")[0]
                frame.scope.names[root] = self.project.import_value(root, frame.module)

    def _do_importfrom(self, node: ast.ImportFrom, frame: Frame) -> None:
        dotted = node.module or ""
        module = self.project.resolve(dotted, frame.module, node.level)
        for alias in node.names:
            name = alias.asname or alias.name
            if module is None:
                inner = self.project.resolve(
                    f"{dotted}.{alias.name}".strip("."), frame.module, node.level
                )
                path = f"{dotted}.{alias.name}"
                if alias.name != "*":
                    frame.scope.names[name] = Module(inner) if inner else External(path)
                continue
            self._run_module(module)
            if alias.name == "*":
                frame.scope.names |= module.scope.names
            else:
                frame.scope.names[name] = self._member(module, alias.name)

    def _member(self, module: ModuleInfo, name: str) -> Value:
        self._run_module(module)
        if name in module.scope.names:
            return module.scope.names[name]
        inner = self.project.submodule(module, name)
        return Module(inner) if inner is not None else UNKNOWN

    def _do_if(self, node: ast.If, frame: Frame) -> bool:
        self.value(node.test, frame)
        outcome = self._truth(node.test, frame)
        if outcome is not None:
            return self._block(node.body if outcome else node.orelse, frame)
        return self._branches([node.body, node.orelse], frame)

    def _branches(self, blocks: list[list[ast.stmt]], frame: Frame) -> bool:
        """Walks each block from the same start and joins where those that go on meet again."""
        scope, start = frame.scope, frame.scope.names
        ends: list[dict[str, Value]] = []
        for block in blocks:
            scope.names = dict(start)
            if not self._block(block, frame):
                ends.append(scope.names)
        if not ends:
            scope.names = start
            return True
        merged = ends[0]
        for other in ends[1:]:
            everything = {**merged, **other}
            merged = {name: join(merged.get(name), other.get(name)) for name in everything}
        scope.names = merged
        return False

    def _do_for(self, node: ast.For | ast.AsyncFor, frame: Frame) -> None:
        self.value(node.iter, frame)
        self._assign_elements(node.target, node.iter, frame)
        self._branches([node.body, []], frame)
        self._block(node.orelse, frame)

    _do_asyncfor = _do_for

    def _do_while(self, node: ast.While, frame: Frame) -> None:
        self.value(node.test, frame)
        self._branches([node.body, []], frame)
        self._block(node.orelse, frame)

    def _do_with(self, node: ast.With | ast.AsyncWith, frame: Frame) -> bool:
        for item in node.items:
            value = self.value(item.context_expr, frame)
            if item.optional_vars is not None:
                known = value if isinstance(value, External) else UNKNOWN
                self._assign(item.optional_vars, known, frame)
        return self._block(node.body, frame)

    _do_asyncwith = _do_with

    def _do_try(self, node: ast.Try, frame: Frame) -> bool:
        handlers = [handler.body for handler in node.handlers]
        ended = self._branches([[*node.body, *node.orelse], *handlers], frame)
        return self._block(node.finalbody, frame) or ended

    _do_trystar = _do_try

    def _do_match(self, node: ast.Match, frame: Frame) -> bool:
        self.value(node.subject, frame)
        return self._branches([*(case.body for case in node.cases), []], frame)

    def _do_global(self, node: ast.Global, frame: Frame) -> None:
        for name in node.names:
            frame.scope.names[name] = frame.module.scope.names.get(name, UNKNOWN)

    def _do_delete(self, node: ast.Delete, frame: Frame) -> None:
        for target in node.targets:
            self._assign(target, UNKNOWN, frame)

    # Assignment

    def _assign(self, target: ast.expr, value: Value, frame: Frame) -> None:
        scope = frame.scope.names
        if isinstance(target, ast.Name):
            for path in frame.scope.paths:
                if path.startswith((f"{target.id}.", f"{target.id}[")):
                    scope.pop(path, None)
            scope[target.id] = value
        elif isinstance(target, (ast.Tuple, ast.List)):
            items = value.items if isinstance(value, Tuple) else ()
            if len(items) != len(target.elts):
                items = (UNKNOWN,) * len(target.elts)
            for element, item in zip(target.elts, items, strict=False):
                self._assign(element, item, frame)
        elif isinstance(target, ast.Starred):
            self._assign(target.value, UNKNOWN, frame)
        elif isinstance(target, ast.Attribute):
            self._assign_attribute(target, value, frame)
        elif isinstance(target, ast.Subscript):
            self._assign_item(target, value, frame)

    def _assign_attribute(self, target: ast.Attribute, value: Value, frame: Frame) -> None:
        owner = self.value(target.value, frame)
        if target.attr == "reduction":  # criterion.reduction = "none"
            known = value.value if isinstance(value, Const) else None
            text = known if isinstance(known, str) else None
            if isinstance(owner, LossModule):
                self._assign(target.value, replace(owner, reduction=text), frame)
                return
            if isinstance(owner, Instance) and "<loss>" in owner.info.attributes:
                owner.info.attributes["<loss>"] = UNKNOWN
        if isinstance(owner, Instance):
            self.project.remember_member(owner.info, target.attr, value)
        if not isinstance(owner, (Module, LossModule)):
            self.project.remember_attribute(target.attr, value)
        self._assign_path(target, value, frame)

    def _set_attribute(self, node: ast.Call, value: Value, frame: Frame) -> None:
        """setattr(owner, name, value); a name that is not known may be that of the reduction."""
        owner, name, _ = node.args
        known = isinstance(name, ast.Constant) and isinstance(name.value, str)
        attribute = str(name.value) if isinstance(name, ast.Constant) and known else "reduction"
        target = ast.copy_location(ast.Attribute(owner, attribute, ast.Store()), node)
        self._assign_attribute(target, value if known else UNKNOWN, frame)

    def _assign_path(self, target: ast.expr, value: Value, frame: Frame) -> None:
        """Remembers what `out.loss` or `out["loss"]` is for the rest of this function."""
        path = names.path(target)
        if path:
            frame.scope.names[path] = value
            frame.scope.paths.add(path)

    def _assign_item(self, target: ast.Subscript, value: Value, frame: Frame) -> None:
        index = target.slice
        if not isinstance(index, ast.Constant) or not isinstance(index.value, str):
            return
        owner = self.value(target.value, frame)
        if isinstance(owner, Record) and isinstance(target.value, (ast.Name, ast.Attribute)):
            frame.scope.names[names.path(target.value)] = owner.set(index.value, value)
        else:
            self._assign_path(target, value, frame)

    def _assign_elements(self, target: ast.expr, iterable: ast.expr, frame: Frame) -> None:
        """Binds a loop's variables. Elements of zipped tensors may be scalars."""
        unwrapped = iterable
        while isinstance(unwrapped, ast.Call) and ast.unparse(unwrapped.func) in {
            "enumerate",
            "tqdm",
        }:
            if not unwrapped.args:
                break
            unwrapped = unwrapped.args[0]
        self._assign(target, UNKNOWN, frame)
        zipped = isinstance(unwrapped, ast.Call) and ast.unparse(unwrapped.func) == "zip"
        if zipped or names.is_mask(unwrapped):
            loaders = "load" in ast.unparse(unwrapped).lower()
            for node in () if loaders else ast.walk(target):
                if isinstance(node, ast.Name):
                    frame.scope.names[node.id] = NUMBER

    # Expressions

    def value(self, node: ast.expr, frame: Frame) -> Value:
        method = getattr(self, f"_of_{type(node).__name__.lower()}", None)
        if method is not None:
            result = method(node, frame)
            assert isinstance(result, Value)
            return result
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self.value(child, frame)
        return UNKNOWN

    def _of_constant(self, node: ast.Constant, frame: Frame) -> Value:
        return Const(node.value)

    def _of_name(self, node: ast.Name, frame: Frame) -> Value:
        found = frame.scope.lookup(node.id)
        if found is None:
            path = _CONVENTIONS.get(node.id)
            return External(path) if path else External(f"builtins.{node.id}")
        return found

    def _of_attribute(self, node: ast.Attribute, frame: Frame) -> Value:
        stored = frame.scope.lookup(names.path(node))
        if stored is not None:
            return stored
        owner = self.value(node.value, frame)
        name = node.attr
        if isinstance(owner, External):
            if owner.path.startswith("builtins."):  # a name that nothing in the file binds
                return self.project.attribute_by_name(name, frame.module)
            return External(f"{owner.path}.{name}")
        if isinstance(owner, Module):
            return self._member(owner.info, name)
        if isinstance(owner, Record):
            return owner.get(name)
        if isinstance(owner, (Instance, Class)):
            return self._instance_attribute(owner, name, frame)
        if isinstance(owner, (Loss, Mask)) and name in {"T", "mT", "data"}:
            return owner
        if name in {"ndim"}:
            return NUMBER
        return self.project.attribute_by_name(name, frame.module)

    def _instance_attribute(self, owner: Instance | Class, name: str, frame: Frame) -> Value:
        info = owner.info
        method = info.method(name)
        if method is not None:
            function = Function(method, method.module.scope, owner)
            return (
                self._call_info(function, {}, frame) if method.decorated("property") else function
            )
        found = info.attribute(name)
        if found is not None:
            return found
        return owner if name == "module" else UNKNOWN

    def _call_info(self, function: Function, given: dict[str, Value], frame: Frame) -> Value:
        """Calls a function and, where subclasses override it, those too: self may be one."""
        result = self._invoke(function, given, frame)
        receiver = function.receiver
        if isinstance(receiver, Instance) and function.info.owner is not None:
            for other in receiver.info.overrides(function.info.name):
                override = Function(other, other.module.scope, receiver)
                outcome = self._invoke(override, given, frame)
                abstract = _raises_only(function.info.node)
                result = outcome if abstract else join(result, outcome)
        return result

    def _of_subscript(self, node: ast.Subscript, frame: Frame) -> Value:
        index = node.slice
        self.value(index, frame)
        if isinstance(index, ast.Constant) and isinstance(index.value, str):
            stored = frame.scope.lookup(names.path(node))
            if stored is not None:
                return stored
        owner = self.value(node.value, frame)
        if isinstance(index, ast.Constant):
            if isinstance(owner, Record) and isinstance(index.value, str):
                return owner.get(index.value)
            if isinstance(owner, Tuple) and isinstance(index.value, int):
                inside = -len(owner.items) <= index.value < len(owner.items)
                return owner.items[index.value] if inside else UNKNOWN
        if isinstance(owner, Record) and owner.fields:
            return self._any_of([value for _, value in owner.fields])
        if isinstance(owner, Mask):
            return owner if names.slices_time(index) else NUMBER
        if isinstance(owner, Loss):
            if owner.reduced:
                return UNKNOWN
            selects = isinstance(self.value(index, frame), Mask) or names.is_mask(index)
            return replace(owner, uneven=owner.uneven or selects)
        if owner == UNKNOWN or isinstance(owner, (External, Sliced)):
            return NUMBER if self._is_element(node, frame) else slice_of(index)
        return UNKNOWN

    def _is_element(self, node: ast.Subscript, frame: Frame) -> bool:
        """True for mask[i]: one number, if the mask has one dimension."""
        index = node.slice
        if names.slices_time(index) or isinstance(self.value(index, frame), Mask):
            return False
        if names.is_labels(index):  # weights[labels]: one for each of them
            return False
        if isinstance(index, ast.Constant) and isinstance(index.value, str):
            return False
        return names.is_mask(node.value) or names.is_weights(node.value)

    def _any_of(self, values: list[Value]) -> Value:
        result: Value | None = None
        for value in values:
            if value == UNKNOWN:
                return UNKNOWN
            result = join(result, value)
        return result or UNKNOWN

    def _of_tuple(self, node: ast.Tuple, frame: Frame) -> Value:
        return Tuple(tuple(self.value(element, frame) for element in node.elts))

    def _of_list(self, node: ast.List, frame: Frame) -> Value:
        return _losses([self.value(element, frame) for element in node.elts])

    def _of_dict(self, node: ast.Dict, frame: Frame) -> Value:
        fields: dict[str, Value] = {}
        for key, item in zip(node.keys, node.values, strict=False):
            value = self.value(item, frame)
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                fields[key.value] = value
        return Record(tuple(fields.items()))

    def _of_ifexp(self, node: ast.IfExp, frame: Frame) -> Value:
        self.value(node.test, frame)
        outcome = self._truth(node.test, frame)
        if outcome is not None:
            return self.value(node.body if outcome else node.orelse, frame)
        return join(self.value(node.body, frame), self.value(node.orelse, frame))

    def _of_namedexpr(self, node: ast.NamedExpr, frame: Frame) -> Value:
        value = self.value(node.value, frame)
        self._assign(node.target, value, frame)
        return value

    def _of_lambda(self, node: ast.Lambda, frame: Frame) -> Value:
        info = frame.module.by_node.get(node)
        if not isinstance(info, FunctionInfo):
            info = FunctionInfo(node, frame.module)
            frame.module.by_node[node] = info
            frame.module.functions.append(info)
        self._closures[info] = frame.scope
        return Function(info, frame.scope)

    def _of_await(self, node: ast.Await, frame: Frame) -> Value:
        self.value(node.value, frame)
        return UNKNOWN

    def _comprehension(
        self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp, frame: Frame
    ) -> Value:
        inner = replace(frame, scope=Scope(frame.scope))
        for generator in node.generators:
            self.value(generator.iter, inner)
            self._assign_elements(generator.target, generator.iter, inner)
            for name in ast.walk(generator.target):
                if isinstance(name, ast.Name):  # an element: it may be a scalar
                    inner.scope.names[name.id] = NUMBER
            for condition in generator.ifs:
                self.value(condition, inner)
        parts = (node.key, node.value) if isinstance(node, ast.DictComp) else (node.elt,)
        values = [self.value(part, inner) for part in parts]
        return UNKNOWN if isinstance(node, ast.DictComp) else _losses(values)

    _of_listcomp = _of_setcomp = _of_generatorexp = _of_dictcomp = _comprehension

    def _of_unaryop(self, node: ast.UnaryOp, frame: Frame) -> Value:
        value = self.value(node.operand, frame)
        if isinstance(node.op, ast.Not):
            return NUMBER
        if isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
            number = node.operand.value
            return Const(-number) if isinstance(number, (int, float)) else UNKNOWN
        return NUMBER if is_number(value) else value

    def _of_compare(self, node: ast.Compare, frame: Frame) -> Value:
        operands = [node.left, *node.comparators]
        values = [self.value(operand, frame) for operand in operands]
        if not all(isinstance(op, _TENSOR_COMPARISONS) for op in node.ops):
            return NUMBER  # is, in
        return self.tensors.compare(node, operands, values)

    def _of_boolop(self, node: ast.BoolOp, frame: Frame) -> Value:
        values = [self.value(operand, frame) for operand in node.values]
        return NUMBER if all(is_number(value) for value in values) else UNKNOWN

    def _of_binop(self, node: ast.BinOp, frame: Frame) -> Value:
        left, right = self.value(node.left, frame), self.value(node.right, frame)
        return self.tensors.operate(node, node.op, node.left, node.right, left, right, frame)

    # Calls

    def _of_call(self, node: ast.Call, frame: Frame) -> Value:
        function = node.func
        if isinstance(function, ast.Attribute):
            receiver = self.value(function.value, frame)
            if _is_super(function.value):
                return self._call_super(node, function.attr, frame)
            result = self._method(node, function, receiver, frame)
            if result is not None:
                return result
        callee = self.value(function, frame)
        return self._call(callee, node, frame)

    def _call(self, callee: Value, node: ast.Call, frame: Frame) -> Value:
        if isinstance(callee, Partial):
            merged = ast.Call(node.func, [*callee.args, *node.args], _merged(callee, node))
            return self._call(callee.callee, ast.copy_location(merged, node), frame)
        if isinstance(callee, Function):
            return self._call_function(callee, node, frame)
        if isinstance(callee, Class):
            return self._construct(callee.info, node, frame)
        if isinstance(callee, LossModule):
            return self._compute_loss(callee.spec, node, frame, callee)
        if isinstance(callee, Instance):
            return self._call_instance(callee, node, frame)
        if isinstance(callee, External):
            return self._call_external(callee, node, frame)
        self._arguments(node, frame)
        return UNKNOWN

    def _arguments(self, node: ast.Call, frame: Frame) -> tuple[list[Value], dict[str, Value]]:
        positional = [self.value(argument, frame) for argument in node.args]
        keywords = {k.arg or "**": self.value(k.value, frame) for k in node.keywords}
        for value in (*positional, *keywords.values()):
            if isinstance(value, Function) and isinstance(value.info.node, ast.Lambda):
                value.info.given_away = True
        return positional, keywords

    def _call_function(self, callee: Function, node: ast.Call, frame: Frame) -> Value:
        positional, given = self._arguments(node, frame)
        parameters = callee.info.node.args
        targets = [a.arg for a in [*parameters.posonlyargs, *parameters.args]]
        if callee.receiver is not None and not callee.info.decorated("staticmethod"):
            targets = targets[1:]
        for name, argument, value in zip(targets, node.args, positional, strict=False):
            if isinstance(argument, ast.Starred):
                return self._spread(callee, given, frame)
            given[name] = value
        if "**" in given:
            return self._spread(callee, given, frame)
        return self._call_info(callee, given, frame)

    def _spread(self, callee: Function, given: dict[str, Value], frame: Frame) -> Value:
        """A call with *args or **kwargs: parameters that are not given may hold anything."""
        return self._invoke(callee, given, frame, defaults=False)

    def _call_instance(self, callee: Instance, node: ast.Call, frame: Frame) -> Value:
        for name in ("__call__", "forward"):
            method = callee.info.method(name)
            if method is not None:
                return self._call_function(
                    Function(method, method.module.scope, callee), node, frame
                )
        return self._call_base_loss(callee.info, node, frame)

    def _call_base_loss(self, info: ClassInfo, node: ast.Call, frame: Frame) -> Value:
        """forward() of a loss module that a class of the analysed files inherits from."""
        module = info.attribute("<loss>")
        if isinstance(module, LossModule):
            return self._compute_loss(module.spec, node, frame, module)
        self._arguments(node, frame)
        return UNKNOWN

    def _call_super(self, node: ast.Call, name: str, frame: Frame) -> Value:
        owner = frame.owner
        if owner is None:
            self._arguments(node, frame)
            return UNKNOWN
        for info in owner.ancestors()[1:]:
            if name in info.methods:
                receiver = Instance(owner)
                function = Function(info.methods[name], info.module.scope, receiver)
                return self._call_function(function, node, frame)
        base = owner.external_base()
        if base is not None and base.path in SPECS:
            if name == "__init__":
                module = self._loss_module(SPECS[base.path], node, frame)
                self.project.remember_member(owner, "<loss>", module)
                return NONE
            if name in {"forward", "__call__"}:
                return self._call_base_loss(owner, node, frame)
        self._arguments(node, frame)
        return UNKNOWN

    def _call_external(self, callee: External, node: ast.Call, frame: Frame) -> Value:
        path, last = callee.path, callee.path.rsplit(".", 1)[-1]
        spec = SPECS.get(path)
        if spec is not None and spec.is_module:
            return self._loss_module(spec, node, frame)
        if spec is not None:
            return self._compute_loss(spec, node, frame, None)
        positional, keywords = self._arguments(node, frame)
        first = positional[0] if positional else UNKNOWN
        if last == "partial" and node.args:
            return Partial(first, tuple(node.args[1:]), tuple(node.keywords))
        if last in {"vmap", "vmap_"} or path in {"builtins.map", "itertools.starmap"}:
            self._mark_per_sample(node, frame)
            return UNKNOWN
        if last in _WRAPPERS and isinstance(first, (Instance, LossModule, Function, External)):
            return first
        if path in {"builtins.dict", "types.SimpleNamespace"} and "**" not in keywords:
            return self._record(keywords)
        if last[:1].isupper() and any("loss" in name.lower() for name in keywords):
            return self._record(keywords)
        if path == "torch.nn.ModuleDict" and isinstance(first, Record):
            return first
        if path == "builtins.sum" and isinstance(first, Losses):
            return first.each
        if path == "builtins.setattr" and len(node.args) == 3:
            self._set_attribute(node, positional[2], frame)
        if path.startswith("builtins."):
            return NUMBER if last in _NUMERIC_CALLS and not isinstance(first, Loss) else UNKNOWN
        if path.startswith(("random.", "math.")) or (path == "numpy.random.rand" and not node.args):
            return NUMBER
        if path.startswith("torch."):
            if last.endswith("_") and isinstance(first, Count):
                self._assign(node.args[0], NUMBER, frame)
            return self.tensors.torch_function(last, node, positional, frame)
        values = [*positional, *(keywords[keyword.arg or "**"] for keyword in node.keywords)]
        foreign = _makes_foreign(path, node, values)
        return External(f"{path}()") if foreign else UNKNOWN

    def _method(
        self, node: ast.Call, function: ast.Attribute, receiver: Value, frame: Frame
    ) -> Value | None:
        """A method call on a value that is no object of the analysed files; None: not handled."""
        name = function.attr
        if isinstance(receiver, (Module, Class, External)):
            if not isinstance(receiver, External) or not receiver.is_object:
                return None
            result = self._method(node, function, UNKNOWN, frame)
            return receiver if result == UNKNOWN and "()" in receiver.path else result
        if isinstance(receiver, Instance):
            known = receiver.info.method(name) or receiver.info.attribute(name)
            if known is None and name in _SELF_METHODS:
                return receiver
            return None
        if isinstance(receiver, LossModule):
            if name in {"forward", "__call__"}:
                return self._compute_loss(receiver.spec, node, frame, receiver)
            return receiver if name in _SELF_METHODS else None
        if isinstance(receiver, Record):
            return self._record_method(node, name, receiver, frame)
        positional, _ = self._arguments(node, frame)
        if isinstance(receiver, Losses):  # append() of who knows what
            self._assign(function.value, UNKNOWN, frame)
            return UNKNOWN
        if name == "prepare" and positional:
            return positional[0] if len(positional) == 1 else Tuple(tuple(positional))
        if name in {"unwrap_model"} and positional:
            return positional[0]
        if name == "__setitem__" and len(node.args) == 2 and isinstance(node.args[0], ast.Constant):
            self.project.remember_attribute(str(node.args[0].value), positional[1])
            return NONE
        if (
            name in {"mul", "mul_", "multiply", "div", "div_", "true_divide"}
            and len(node.args) == 1
        ):
            op: ast.operator = ast.Mult() if name.startswith("mul") else ast.Div()
            result = self.tensors.operate(
                node, op, function.value, node.args[0], receiver, positional[0], frame
            )
            if name.endswith("_"):
                self._assign(function.value, result, frame)
            return result
        if name in {"add", "sub"} and len(node.args) == 1 and not node.keywords:
            return add(receiver, positional[0])
        whole = not node.args and not node.keywords
        outcome = self.tensors.tensor_method(name, node, function.value, receiver, whole, frame)
        if name.endswith("_") and isinstance(receiver, Count):  # n.clamp_(min=1)
            self._assign(function.value, outcome or UNKNOWN, frame)
        return outcome

    def _record_method(
        self, node: ast.Call, name: str, receiver: Record, frame: Frame
    ) -> Value | None:
        """dict.get, dict.pop and dict.update."""
        positional, keywords = self._arguments(node, frame)
        if name in {"get", "pop"} and node.args and isinstance(node.args[0], ast.Constant):
            return receiver.get(str(node.args[0].value))
        if name == "__setitem__" and len(node.args) == 2 and isinstance(node.args[0], ast.Constant):
            assert isinstance(node.func, ast.Attribute)
            changed = receiver.set(str(node.args[0].value), positional[1])
            self._assign(node.func.value, changed, frame)
            return NONE
        if name == "update" and isinstance(node.func, ast.Attribute):
            for key, value in keywords.items():
                receiver = receiver.set(key, value)
            for argument in positional:
                if not isinstance(argument, Record):
                    self._assign(node.func.value, UNKNOWN, frame)
                    return NONE
                for key, value in argument.fields:
                    receiver = receiver.set(key, value)
            self._assign(node.func.value, receiver, frame)
            return NONE
        return None

    def _mark_per_sample(self, node: ast.Call, frame: Frame) -> None:
        for inner in ast.walk(node):
            if isinstance(inner, (ast.Name, ast.Lambda, ast.Attribute)):
                value = self.value(inner, frame)
                if isinstance(value, Function):
                    value.info.per_sample = True

    # Losses

    def _loss_module(self, spec: LossSpec, node: ast.Call, frame: Frame) -> LossModule:
        self._arguments(node, frame)
        self._emit(LossCall(frame, node, spec, (), True))
        reduction, uneven = self._reduction(spec, node, frame)
        return LossModule(spec, reduction, uneven)

    def _compute_loss(
        self, spec: LossSpec, node: ast.Call, frame: Frame, module: LossModule | None
    ) -> Value:
        positional, keywords = self._arguments(node, frame)
        if module is None:
            reduction, uneven = self._reduction(spec, node, frame)
        else:
            reduction, uneven = module.reduction, module.uneven
        names_of_inputs = ("input", "target") if module else spec.parameters[:2]
        inputs = [*positional, *(keywords[n] for n in names_of_inputs if n in keywords)]
        self._emit(LossCall(frame, node, spec, tuple(inputs[:2]), False))
        if spec.is_ours:
            uneven = (uneven or _is_masked(spec, positional, keywords)) and (
                keywords.get("normalizer", NONE) == NONE  # else: the count of the whole batch
            )
        if reduction not in {"none", "mean", "sum", "elementwise_mean", "batchmean"}:
            return UNKNOWN
        reduced = reduction != "none"
        kind = reduction if reduced else None
        loss = Loss(reduced, kind, spec.function, frame.place(node), uneven and reduced)
        if "return_stats" in keywords:
            return Tuple((loss, UNKNOWN))
        return loss

    def _reduction(self, spec: LossSpec, node: ast.Call, frame: Frame) -> tuple[str | None, bool]:
        """The reduction a call asks for, or None; and whether it skips targets it ignores."""
        given = arguments_of(spec, node)
        if given is None:
            only = {k.arg: k.value for k in node.keywords if k.arg == "reduction"}
            if not only:
                return None, False
            given = only
        uneven = "ignore_index" in given
        if spec.name == "masked_mean":
            return "mean", True
        legacy = {name: given[name] for name in ("size_average", "reduce") if name in given}
        values = {name: self.value(argument, frame) for name, argument in legacy.items()}
        if any(value != NONE for value in values.values()):
            flags = [values.get(name, NONE) for name in ("size_average", "reduce")]
            known = [flag.value for flag in flags if isinstance(flag, Const)]
            if len(known) < 2:
                return None, uneven
            first, second = (None if flag is None else bool(flag) for flag in known)
            return legacy_reduction(first, second), uneven
        if "reduction" not in given:
            return "mean", uneven
        value = self.value(given["reduction"], frame)
        text = value.value if isinstance(value, Const) else None
        return (text if isinstance(text, str) else None), uneven

    # Tests

    def _truth(self, test: ast.expr, frame: Frame) -> bool | None:
        """The outcome of a test where it is known, else None."""
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            outcome = self._truth(test.operand, frame)
            return None if outcome is None else not outcome
        if isinstance(test, ast.Compare) and len(test.ops) == 1:
            left = self.value(test.left, frame)
            right = self.value(test.comparators[0], frame)
            return _compare(test.ops[0], left, right)
        if isinstance(test, ast.Name):
            value = self.value(test, frame)
            if isinstance(value, Const):
                return bool(value.value)
        return None


_CARRIERS = (Loss, LossModule, Partial, Tuple, Record)
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_TENSOR_COMPARISONS = (ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE)


def _is_masked(spec: LossSpec, positional: list[Value], keywords: dict[str, Value]) -> bool:
    """True when a loss of masked_loss is given a mask."""
    parameters = spec.parameters
    if spec.is_module:
        first = ["hidden", "weight"] if spec.function == "linear_cross_entropy" else ["logits"]
        parameters = (*first, "target", "mask")
    given = dict(zip(parameters, positional, strict=False)) | keywords
    return given.get("mask", NONE) != NONE


def _compare(op: ast.cmpop, left: Value, right: Value) -> bool | None:
    if right == NONE and isinstance(op, (ast.Is, ast.IsNot)):
        known = isinstance(left, (Const, Loss, Mask, Number, Tuple, Instance, LossModule, Function))
        return (left == NONE) == isinstance(op, ast.Is) if known else None
    if not isinstance(left, Const) or not isinstance(right, Const):
        return None
    if isinstance(op, (ast.Eq, ast.Is)):
        return left.value == right.value
    if isinstance(op, (ast.NotEq, ast.IsNot)):
        return left.value != right.value
    return None


def _merged(partial: Partial, node: ast.Call) -> list[ast.keyword]:
    later = {keyword.arg for keyword in node.keywords}
    return [*(k for k in partial.keywords if k.arg not in later), *node.keywords]


def _makes_foreign(path: str, node: ast.Call, values: list[Value]) -> bool:
    """True where code outside the analysed files makes an object without one of theirs inside."""
    given = [*node.args, *(keyword.value for keyword in node.keywords)]
    for argument, value in zip(given, values, strict=True):
        if isinstance(value, (Instance, Class, Function)):
            return False
        if value == UNKNOWN and _MODELS & set(names.words(names.last_name(argument))):
            return False
    if "()" in path or any(part[:1].isupper() for part in path.split(".")):
        return True
    return all(isinstance(value, (Const, External)) for value in values)


def _losses(values: list[Value]) -> Value:
    each: Value | None = None
    for value in values:
        each = join(each, value)
    return Losses(replace(each, product=None)) if isinstance(each, Loss) else UNKNOWN


def _is_super(node: ast.expr) -> bool:
    return (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"
    )


def _is_number_annotation(annotation: ast.expr | None) -> bool:
    return isinstance(annotation, ast.Name) and annotation.id in {"float", "int", "bool"}


def _is_switch(argument: ast.arg, default: ast.expr) -> bool:
    """True for mask=1.0: one number is enough for what is called a mask here."""
    number = isinstance(default, ast.Constant) and type(default.value) in (int, float)
    return number and names.is_mask(ast.Name(argument.arg))


def _raises_only(node: FunctionNode) -> bool:
    """True for an abstract method: its body only raises, or is empty."""
    if isinstance(node, ast.Lambda):
        return False
    kinds = (ast.Raise, ast.Pass, ast.Expr)
    return all(isinstance(statement, kinds) for statement in node.body)
