# SPDX-License-Identifier: BSD-3-Clause
"""The rules that follow a loss through the program: ML001, ML004, ML006. `local` has the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from masked_loss_lint import values as V
from masked_loss_lint.program import Event
from masked_loss_lint.values import UNKNOWN, Place, Value, is_number

RULES = {
    "ML001": "a mask meets a loss that is already a scalar",
    "ML002": "size_average and reduce are deprecated",
    "ML003": "a masked mean without a guard: NaN when everything is masked",
    "ML004": "a mean loss divided by accumulation steps weighs micro-batches unequally",
    "ML005": "shifted logits are copied only to compute the loss",
    "ML006": "a mean that counts the targets that ignore_index leaves out",
}


@dataclass(frozen=True, order=True)
class Finding:
    """One thing found, where, and whether it is known how to repair it."""

    place: Place
    code: str
    message: str
    met: Place = field(compare=False)  # where the rule saw it: after `place`, maybe in another file
    fixable: bool = field(default=False, compare=False)


# Whether some target can be the ignore_index that this loss names.
CanBeIgnored = Callable[[V.Loss], bool]


def as_loss(value: Value) -> V.Loss | None:
    """The loss that a value is, or was made of."""
    match value:
        case V.Loss():
            return value
        case V.Reduced() if not value.dims:
            base = as_loss(value.base) if not isinstance(value.base, V.Product) else None
            if isinstance(value.base, V.Product):
                base = next((b for f in value.base.factors if (b := as_loss(f.value))), None)
            if base is None:
                named = value.is_loss or isinstance(value.base, V.Ratio)
                return V.Loss(value.op, value.op, value.place) if named else None
            if base.reduced:
                return base
            uneven = base.uneven and value.op == "mean"
            return V.Loss(base.function, value.op, value.place, None, uneven)
        case V.Ratio():
            inner = as_loss(value.base)
            if inner is None and not value.is_loss:
                return None
            name = inner.function if inner else "sum"
            return V.Loss(name, "mean", value.place, None, True)
    return None


def is_scalar(value: Value) -> bool:
    return is_number(value) or (isinstance(value, V.Reduced) and not value.dims)


def reduced_before_mask(event: Event, value: Value) -> Finding | None:
    """ML001: a value that came from a reduced loss is multiplied by a mask, or selected by one.

    A factor counts as a mask when it is known or named as one; where the product itself is summed
    or averaged, any factor counts that is not a number: who does that takes it for many elements.
    """
    if event.kind == "accumulated":
        return None
    if event.kind == "chosen":
        loss = as_loss(value)
        place = event.place
        return _finding_001(loss, event.text, "selects from", place, place) if loss else None
    product = value.base if event.kind == "reduced" and isinstance(value, V.Reduced) else value
    if not isinstance(product, V.Product):
        return None
    losses = [loss for f in product.factors if (loss := as_loss(f.value)) and loss.reduced]
    masks = [f for f in product.factors if _is_mask(f, event)]
    if not losses or not masks:
        return None
    loss = losses[0]
    if loss.detached and masks[0].kind != "mask":
        return None
    return _finding_001(loss, masks[0].text, "multiplies", product.place, event.place)


def _is_mask(factor: V.Factor, event: Event) -> bool:
    loss = as_loss(factor.value)
    if (loss is not None and loss.reduced) or is_scalar(factor.value):
        return False
    if factor.kind == "mask":
        return True
    return event.kind == "reduced" and event.text != "devices"


def _finding_001(loss: V.Loss, mask: str, verb: str, place: Place, met: Place) -> Finding | None:
    if not loss.reduced:
        return None
    message = (
        f"`{mask}` {verb} a loss that {_origin(loss, met)} already reduced to a "
        f'scalar ({loss.reduction}): the mask has no effect; use reduction="none" there, or '
        "masked_loss.masked_cross_entropy(logits, target, mask)"
    )
    return Finding(place, "ML001", message, met)


def _origin(loss: V.Loss, met: Place) -> str:
    here = not loss.place.cell and loss.place.path == met.path
    where = f"line {loss.place.line}" if here else str(loss.place)
    return f"{loss.function} at {where}"


def accumulated_mean(event: Event, value: Value, can_be_ignored: CanBeIgnored) -> Finding | None:
    """ML004: a mean over the tokens that count, divided by the number of accumulation steps."""
    loss = as_loss(value) or (
        V.Loss("sum", "mean", value.place, None, True) if isinstance(value, V.Ratio) else None
    )
    if event.kind != "accumulated" or loss is None or loss.reduction != "mean":
        return None
    if not loss.uneven and not (loss.ignores is not None and can_be_ignored(loss)):
        return None
    message = (
        f"the mean of {_origin(loss, event.place)} is over this micro-batch's own tokens: divided "
        f"by `{event.text}`, short micro-batches weigh as much as long ones; "
        "sum, and divide by the token count of the whole batch (masked_loss: normalizer=)"
    )
    return Finding(event.place, "ML004", message, event.place)


def counted_ignored(event: Event, value: Value, can_be_ignored: CanBeIgnored) -> Finding | None:
    """ML006: cross_entropy(..., ignore_index=i, reduction="none").mean()."""
    if event.kind != "reduced" or not isinstance(value, V.Reduced) or value.op != "mean":
        return None
    loss = value.base
    if not isinstance(loss, V.Loss) or loss.reduced or loss.ignores is None or loss.uneven:
        return None
    if not can_be_ignored(loss):
        return None
    index = loss.ignores.value if isinstance(loss.ignores, V.Const) else "ignore_index"
    message = (
        f"this mean divides by the number of all targets, also of those that "
        f"{_origin(loss, event.place)} ignores: divide the sum by (target != {index}).sum(), "
        'or use reduction="mean"'
    )
    return Finding(event.place, "ML006", message, event.place)


def unguarded(place: Place, divisor: str) -> Finding:
    message = (
        f"dividing by `{divisor}` gives NaN where every token is masked; use "
        f"`{divisor}.clamp(min=1)`, or masked_loss.masked_cross_entropy, which returns 0"
    )
    return Finding(place, "ML003", message, place)


def judge(event: Event, value: Value, can_be_ignored: CanBeIgnored) -> list[Finding]:
    """What the rules find in an event whose value is known."""
    if value is UNKNOWN:
        return []
    if event.kind == "unguarded":  # weights, where they weigh a loss
        factors = value.factors if isinstance(value, V.Product) else ()
        weighed = any(as_loss(factor.value) for factor in factors)
        return [unguarded(event.place, event.text)] if weighed else []
    found = [
        reduced_before_mask(event, value),
        accumulated_mean(event, value, can_be_ignored),
        counted_ignored(event, value, can_be_ignored),
    ]
    return [finding for finding in found if finding is not None]
