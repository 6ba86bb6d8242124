# SPDX-License-Identifier: BSD-3-Clause
"""The rules that one function alone decides: ML002, ML003, ML005."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from masked_loss_lint import names
from masked_loss_lint import values as V
from masked_loss_lint.rules import Finding, unguarded
from masked_loss_lint.torch_losses import LossSpec, arguments_of, legacy_reduction
from masked_loss_lint.values import Place, Value, alternatives

if TYPE_CHECKING:
    from masked_loss_lint.expressions import Expressions


def _report(
    walker: Expressions,
    code: str,
    node: ast.expr | ast.stmt,
    message: str,
    place: Place | None = None,
    fixable: bool = False,
) -> Finding:
    met = walker.place(node)
    return Finding(place or met, code, message, met, fixable)


def legacy_arguments(
    walker: Expressions, node: ast.Call, spec: LossSpec, partial: bool = False
) -> None:
    """ML002: size_average / reduce, with the reduction= that means the same."""
    hidden = arguments_of(spec, node) is None
    positional = {} if hidden else dict(zip(spec.parameters, node.args, strict=False))
    keywords = {k.arg: k.value for k in node.keywords if k.arg}
    given = positional | keywords
    legacy: dict[str, ast.expr] = {
        name: given[name] for name in ("size_average", "reduce") if name in given
    }
    constants = {n: v.value for n, v in legacy.items() if isinstance(v, ast.Constant)}
    placeholders = [n for n, v in constants.items() if v is None and n in positional]
    if len(placeholders) == len(legacy):
        return  # kl_div(p, q, None, None, "sum"): None only holds their place
    if all(isinstance(v, ast.Name) and v.id == n for n, v in legacy.items()):
        return  # a wrapper's size_average=size_average: its caller chose
    named = [n for n in legacy if n not in placeholders]
    what = " and ".join(named) + (" are" if len(named) > 1 else " is")
    fixable = not (hidden or partial or walker.source.cells) and len(constants) == len(legacy)
    odd = [n for n, v in constants.items() if v is not None and not isinstance(v, (bool, int))]
    if len(constants) < len(legacy):
        advice = f"this call means reduction={_expression(legacy)}"
    elif all(value is None for value in constants.values()):
        advice = "None is their default: leave out"
    else:
        flags = [constants.get(name) for name in ("size_average", "reduce")]
        meant = legacy_reduction(*(None if f is None else bool(f) for f in flags))
        advice = f'this call means reduction="{meant}"'
        if odd:
            value = constants[odd[0]]
            advice += (
                f", for {odd[0]}={value!r} only counts as true; was reduction={value!r} meant?"
            )
    message = f"{spec.name}: {what} deprecated: {advice}"
    walker.findings.append(_report(walker, "ML002", node, message, fixable=fixable and not odd))


def _expression(legacy: dict[str, ast.expr]) -> str:
    average, reduce = (
        names.text(legacy[n]) if n in legacy else "True" for n in ("size_average", "reduce")
    )
    mean = {"True": '"mean"', "None": '"mean"', "False": '"sum"'}.get(
        average, f'"mean" if {average} else "sum"'
    )
    if reduce in {"True", "None"}:
        return mean
    return '"none"' if reduce == "False" else f'({mean}) if {reduce} else "none"'


def unguarded_mean(
    walker: Expressions,
    node: ast.expr | ast.stmt,
    divisor: ast.expr,
    total: V.Reduced,
    count: V.Count,
) -> None:
    """ML003: (x * mask).sum() / mask.sum() where nothing excludes a mask without a token.

    It is 0 / 0 for any x. Weights that are not masks count where x is known to be a loss.
    """
    products = [v for v in alternatives(total.base) if isinstance(v, V.Product)]
    factors = [f for product in products for f in product.factors]
    masks = [f for f in factors if f.key == count.key]
    if count.guarded or count.never_empty or any(f.never_empty for f in masks):
        return
    is_mask = count.of_mask or any(f.kind == "mask" or isinstance(f.value, V.Mask) for f in masks)
    text = names.text(divisor)
    if _is_guarded(_guards(walker.frame.node), masks[0].text, text):
        return
    if is_mask:
        walker.findings.append(unguarded(walker.place(node), text))
    else:
        walker.emit("unguarded", node, products[0], text)


def copied_logits(
    walker: Expressions, node: ast.Call, spec: LossSpec, inputs: list[Value], reads: int
) -> None:
    """ML005: logits[..., :-1, :].contiguous(), read by nothing but the loss."""
    frame = walker.frame
    logits, target = [*inputs[:2], None, None][:2]
    if not (isinstance(logits, V.Sliced) and isinstance(target, V.Sliced)):
        return
    if logits.tail or not target.tail or logits.copied is None:
        return
    ours = spec.function == "masked_cross_entropy"
    if (spec.function not in {"cross_entropy", "nll_loss"} and not ours) or (
        logits.second and not ours
    ):
        return
    frame.read[reads:] = [place for place in frame.read[reads:] if place != logits.copied]
    message = (
        "shifting the logits with .contiguous() copies the largest tensor of the step: shift the "
        "labels instead (labels = F.pad(labels, (0, 1), value=-100)[..., 1:]), or call "
        "masked_loss.masked_cross_entropy(logits, target, shift=True)"
    )
    finding = _report(walker, "ML005", node, message, logits.copied)
    frame.copies.append((logits.copied, finding))


def unread_copies(walker: Expressions) -> None:
    """Reports the copies of a function that has ended, but for those that something else read."""
    frame = walker.frame
    walker.findings += [finding for copied, finding in frame.copies if copied not in frame.read]


# What a function says of a count besides the division


@dataclass(frozen=True)
class _Guards:
    tested: frozenset[str]  # names compared or tested for truth
    counted: frozenset[str]  # x of a tested x.any(), x.sum(), len(x)
    repairs: bool  # NaN is looked for or replaced


@lru_cache(maxsize=4)
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
            repairs |= names.text(inner.left) == names.text(inner.comparators[0])  # loss != loss
            if not all(isinstance(op, (ast.Is, ast.IsNot)) for op in inner.ops):
                tested |= {names.text(inner.left)}  # count[count == 0] = 1
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
            tested.add(names.text(inner))
        if isinstance(inner, ast.Call):
            if _called(inner) not in {"any", "all", "sum", "count_nonzero", "numel", "len"}:
                continue
            counted |= {names.key(argument) for argument in inner.args}
            if isinstance(inner.func, ast.Attribute):
                counted.add(names.key(inner.func.value))


def _called(node: ast.Call) -> str:
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _is_guarded(guards: _Guards, mask: str, divisor: str) -> bool:
    key = names.key(ast.parse(mask, mode="eval").body) if mask else ""
    return guards.repairs or key in guards.counted or divisor in guards.tested
