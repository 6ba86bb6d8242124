# SPDX-License-Identifier: BSD-3-Clause
"""The rules, one function each: an event of the interpreter in, a finding or None out."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

from masked_loss_lint import names
from masked_loss_lint.events import (
    Division,
    Event,
    Frame,
    LossCall,
    Multiplication,
    Reduction,
    arguments_of,
)
from masked_loss_lint.fix import Fix, rewrite_legacy
from masked_loss_lint.torch_losses import legacy_reduction
from masked_loss_lint.values import Count, Loss, Mask, Place, Sliced

SUMMARIES = {
    "ML001": "a mask meets a loss that is already a scalar",
    "ML002": "size_average and reduce are deprecated",
    "ML003": "a masked mean without a guard: NaN when everything is masked",
    "ML004": "a mean loss divided by accumulation steps weighs micro-batches unequally",
    "ML005": "shifted logits are copied only to compute the loss",
}


@dataclass(frozen=True, order=True)
class Finding:
    """One thing found, where, and how to repair it if that is known exactly."""

    place: Place
    code: str
    message: str
    met: Place = field(compare=False)  # where the rule saw it: after `place`, maybe in another file
    fix: Fix | None = field(default=None, compare=False)

    @property
    def silenced(self) -> bool:
        return self.place.silences(self.code) or self.met.silences(self.code)


def _finding(
    code: str,
    frame: Frame,
    node: ast.expr | ast.stmt,
    message: str,
    place: Place | None = None,
    fix: Fix | None = None,
) -> Finding:
    met = frame.place(node)
    return Finding(place or met, code, message, met, fix)


def reduced_loss(event: Event) -> Finding | None:
    """ML001: a value that came from a reduced loss is multiplied by a mask or weight tensor.

    The factor counts as a mask when it is known to be one or is named as one, and, whatever its
    name, when what follows shows that it holds many elements: sum(loss * w) / sum(w).
    """
    if not isinstance(event, (Multiplication, Reduction, Division)) or not event.loss.reduced:
        return None
    loss = event.loss
    if event.frame.per_sample or loss.reduction is None:
        return None
    if isinstance(event, Multiplication):
        if not (isinstance(event.value, Mask) or names.is_mask(event.factor)):
            return None
        place, factor = event.frame.place(event.node), ast.unparse(event.factor)
    elif loss.product is None:
        return None
    elif isinstance(event, Reduction):
        factor = loss.product.key
        if not names.is_weights(ast.parse(factor, mode="eval").body):
            return None
        place = loss.product.place
    else:
        same = isinstance(event.value, Count) and event.value.key == loss.product.key
        if not (same and loss.product.summed):
            return None
        place, factor = loss.product.place, loss.product.key
    message = (
        f"`{factor}` multiplies a loss that {_origin(loss, event.frame)} already reduced to a "
        f'scalar ({loss.reduction}): the mask has no effect; use reduction="none" there, or '
        "masked_loss.masked_cross_entropy(logits, target, mask)"
    )
    return _finding("ML001", event.frame, event.node, message, place)


def _origin(loss: Loss, frame: Frame) -> str:
    here = not loss.origin.cell and frame.module.source is loss.origin.source
    where = f"line {loss.origin.line}" if here else str(loss.origin)
    return f"{loss.function} at {where}"


def legacy_arguments(event: Event) -> Finding | None:
    """ML002: size_average / reduce, with the reduction= that means the same."""
    if not isinstance(event, LossCall) or (event.constructs != event.spec.is_module):
        return None
    given = arguments_of(event.spec, event.node)
    if given is None:
        given = {k.arg: k.value for k in event.node.keywords if k.arg}
    legacy: dict[str, ast.expr] = {
        name: given[name] for name in ("size_average", "reduce") if name in given
    }
    if not legacy or all(_passes_through(name, node) for name, node in legacy.items()):
        return None
    what = " and ".join(legacy) + (" are" if len(legacy) > 1 else " is")
    constants = {n: v.value for n, v in legacy.items() if isinstance(v, ast.Constant)}
    fix: Fix | None = None
    reduction: str | None = None
    source = event.frame.module.source
    if len(constants) == len(legacy):
        flags = [constants.get(name) for name in ("size_average", "reduce")]
        if flags == [None, None]:
            advice = "None is their default: leave out"
        else:
            reduction = legacy_reduction(*(None if f is None else bool(f) for f in flags))
            advice = f'this call means reduction="{reduction}"'
        if not source.cells:
            fix = rewrite_legacy(event.spec, event.node, reduction, source)
    else:
        advice = f"this call means reduction={_expression(legacy)}"
    message = f"{event.spec.name}: {what} deprecated: {advice}"
    return _finding("ML002", event.frame, event.node, message, fix=fix)


def _passes_through(name: str, node: ast.expr) -> bool:
    """True for a wrapper's size_average=size_average: its caller chose."""
    return isinstance(node, ast.Name) and node.id == name


def _expression(legacy: dict[str, ast.expr]) -> str:
    def text(name: str) -> str:
        return ast.unparse(legacy[name]) if name in legacy else "True"

    average, reduce = text("size_average"), text("reduce")
    mean = {"True": '"mean"', "None": '"mean"', "False": '"sum"'}.get(
        average, f'"mean" if {average} else "sum"'
    )
    if reduce in {"True", "None"}:
        return mean
    return '"none"' if reduce == "False" else f'({mean}) if {reduce} else "none"'


def unguarded_mean(event: Event) -> Finding | None:
    """ML003: (loss * mask).sum() / mask.sum() where nothing excludes a mask without a token."""
    if not isinstance(event, Division) or not isinstance(event.value, Count):
        return None
    product = event.loss.product
    if product is None or not product.summed or product.key != event.value.key:
        return None
    if event.frame.per_sample or _is_guarded(event.frame, product.key, event.divisor):
        return None
    count = ast.unparse(event.divisor)
    message = (
        f"dividing by `{count}` gives NaN for a batch whose every token is masked; use "
        f"`{count}.clamp(min=1)`, or masked_loss.masked_cross_entropy, which returns 0"
    )
    return _finding("ML003", event.frame, event.node, message)


def accumulated_mean(event: Event) -> Finding | None:
    """ML004: a mean over the tokens that count, divided by the number of accumulation steps."""
    if not isinstance(event, Division) or not names.is_accumulation(event.divisor):
        return None
    loss = event.loss
    if not (loss.reduced and loss.reduction == "mean" and loss.uneven):
        return None
    message = (
        f"the mean of {_origin(loss, event.frame)} is over this micro-batch's own tokens: divided "
        f"by `{ast.unparse(event.divisor)}`, short micro-batches weigh as much as long ones; "
        "sum, and divide by the token count of the whole batch (masked_loss: normalizer=)"
    )
    return _finding("ML004", event.frame, event.node, message)


def copied_logits(event: Event) -> Finding | None:
    """ML005: logits[..., :-1, :].contiguous(), read by nothing but the loss."""
    if not isinstance(event, LossCall) or event.constructs or len(event.args) < 2:
        return None
    logits, target = event.args
    if not (isinstance(logits, Sliced) and isinstance(target, Sliced)):
        return None
    if logits.tail or not target.tail or logits.copied is None:
        return None
    if event.spec.function not in {"cross_entropy", "nll_loss", "masked_cross_entropy"}:
        return None
    if logits.second and event.spec.function != "masked_cross_entropy":
        return None
    given = [*event.node.args, *(k.value for k in event.node.keywords)]
    root = _root(given[0])
    if root is None or (root and _is_read_elsewhere(event.frame.node, root, event.node)):
        return None
    message = (
        "shifting the logits with .contiguous() copies the largest tensor of the step; "
        "masked_loss.masked_cross_entropy(logits, target, shift=True) needs no copy"
    )
    return _finding("ML005", event.frame, event.node, message, logits.copied)


RULES: dict[str, Callable[[Event], Finding | None]] = {
    "ML001": reduced_loss,
    "ML002": legacy_arguments,
    "ML003": unguarded_mean,
    "ML004": accumulated_mean,
    "ML005": copied_logits,
}


# What a function says besides the expression in question


@dataclass(frozen=True)
class _Guards:
    tested: frozenset[str]  # names compared or tested for truth
    counted: frozenset[str]  # x of a tested x.any(), x.sum(), len(x)
    repairs: bool  # NaN is looked for or replaced


@lru_cache(maxsize=4096)
def _guards(node: ast.AST) -> _Guards:
    tested: set[str] = set()
    counted: set[str] = set()
    repairs = False
    for inner in ast.walk(node):
        if isinstance(inner, ast.Call):
            name = _called(inner)
            repairs |= name in {"nan_to_num", "nan_to_num_", "isnan", "isfinite", "isinf"}
            if name == "where" and inner.args:
                _note_test(inner.args[0], tested, counted)
        if isinstance(inner, ast.Compare):
            repairs |= ast.unparse(inner.left) == ast.unparse(inner.comparators[0])  # loss != loss
            if not all(isinstance(op, (ast.Is, ast.IsNot)) for op in inner.ops):
                tested |= {ast.unparse(inner.left)}  # count[count == 0] = 1
        if isinstance(inner, (ast.If, ast.While, ast.IfExp, ast.Assert)):
            _note_test(inner.test, tested, counted)
    return _Guards(frozenset(tested), frozenset(counted), repairs)


def _note_test(test: ast.expr, tested: set[str], counted: set[str]) -> None:
    if isinstance(test, ast.Compare) and all(isinstance(o, (ast.Is, ast.IsNot)) for o in test.ops):
        return  # `mask is not None` says nothing of what it holds
    if isinstance(test, ast.BoolOp):
        for value in test.values:
            _note_test(value, tested, counted)
        return
    for inner in ast.walk(test):
        if isinstance(inner, (ast.Name, ast.Attribute)):
            tested.add(ast.unparse(inner))
        if isinstance(inner, ast.Call):
            if _called(inner) not in {"any", "all", "sum", "count_nonzero", "numel", "len"}:
                continue
            counted |= {names.key(argument) for argument in inner.args}
            if isinstance(inner.func, ast.Attribute):
                counted.add(names.key(inner.func.value))


def _called(node: ast.Call) -> str:
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _is_guarded(frame: Frame, key: str, divisor: ast.expr) -> bool:
    guards = _guards(frame.node)
    name = ast.unparse(divisor)
    if guards.repairs or key in guards.counted or name in guards.tested:
        return True
    caller = frame.caller
    while caller is not None:
        if _guards(caller.node).counted:
            return True
        caller = caller.caller
    return False


def _root(node: ast.expr) -> str | None:
    """x of x.view(-1, V).float(), "" where there is no name, None where an object keeps it."""
    while isinstance(node, (ast.Call, ast.Subscript)):
        if isinstance(node, ast.Subscript):
            if names.path(node):
                return None
            node = node.value
        elif isinstance(node.func, ast.Attribute):
            node = node.func.value
        else:
            return ""
    if isinstance(node, ast.Attribute):
        return None
    return node.id if isinstance(node, ast.Name) else ""


_METADATA = {"size", "shape", "device", "dtype", "dim", "ndim", "numel"}


def _is_read_elsewhere(body: ast.AST, name: str, call: ast.Call) -> bool:
    """True when `name`, after the copy, serves more than this loss."""
    excused: set[ast.AST] = set(ast.walk(call))
    assigned = False
    for node in ast.walk(body):
        if isinstance(node, ast.Assign) and any(ast.unparse(t) == name for t in node.targets):
            assigned = True
            if len(node.targets) > 1:
                return True
            excused |= set(ast.walk(node.value))
        if isinstance(node, ast.Attribute) and node.attr in _METADATA:
            excused |= set(ast.walk(node.value))
    if not assigned:
        return False  # sliced and copied inside the call: nobody else sees the copy
    return any(
        isinstance(node, ast.Name)
        and node.id == name
        and isinstance(node.ctx, ast.Load)
        and node not in excused
        for node in ast.walk(body)
    )
