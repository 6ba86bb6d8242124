# SPDX-License-Identifier: BSD-3-Clause
"""The rules that follow a loss through the program: ML001, ML003, ML004, ML006.

`local` has the others, which one function alone decides.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from masked_loss_lint.values import Const, Factor, Loss, Place

RULES = {
    "ML001": "a mask meets a loss that is already a scalar",
    "ML002": "size_average and reduce are deprecated",
    "ML003": "a masked mean without a guard: NaN when everything is masked",
    "ML004": "a mean loss divided by accumulation steps weighs micro-batches unequally",
    "ML005": "shifted logits are copied only to compute the loss",
    "ML006": "a mean that counts the targets that ignore_index leaves out",
}


LOCAL = ("ML002", "ML003", "ML005")  # which no argument decides
NOTE = "note"  # instead of a rule: a mask met something unknown


@dataclass(frozen=True, order=True)
class Finding:
    """One thing found, where, and whether it is known how to repair it."""

    place: Place
    code: str
    message: str
    met: Place = field(compare=False)  # where the rule saw it: after `place`, maybe in another file
    fixable: bool = field(default=False, compare=False)
    loss: Loss | None = field(default=None, compare=False)  # it holds if this can ignore a target


def masked(
    factors: tuple[Factor, ...], place: Place, met: Place, summed: bool = False
) -> Finding | None:
    """ML001: a value that came from a reduced loss is multiplied by a mask.

    A factor counts as a mask when it is known or named as one; where the product itself is summed
    or averaged, any factor counts that is not a number: who does that takes it for many elements.
    """
    losses = [f.loss for f in factors if f.loss is not None and f.loss.reduced]
    others = [f for f in factors if f.loss is None or not f.loss.reduced]
    masks = [f for f in others if summed or f.mask]
    if not losses or not masks or (losses[0].detached and not masks[0].mask):
        return None
    return no_effect(losses[0], f"`{masks[0].text}` multiplies", place, met)


def no_effect(loss: Loss, what: str, place: Place, met: Place) -> Finding:
    message = (
        f"{what} a loss that {_origin(loss, met)} already reduced to a "
        f'scalar ({loss.reduction}): the mask has no effect; use reduction="none" there, or '
        "masked_loss.masked_cross_entropy(logits, target, mask)"
    )
    return Finding(place, "ML001", message, met)


def _origin(loss: Loss, met: Place) -> str:
    here = not loss.place.cell and loss.place.path == met.path
    return f"{loss.function} at {f'line {loss.place.line}' if here else loss.place}"


def accumulated(loss: Loss, steps: str, place: Place) -> Finding | None:
    """ML004: a mean over the tokens that count, divided by the number of accumulation steps."""
    if loss.reduction != "mean" or not (loss.uneven or loss.ignores is not None):
        return None
    message = (
        f"the mean of {_origin(loss, place)} is over this micro-batch's own tokens: divided "
        f"by `{steps}`, short micro-batches weigh as much as long ones; "
        "sum, and divide by the token count of the whole batch (masked_loss: normalizer=)"
    )
    return Finding(place, "ML004", message, place, loss=None if loss.uneven else loss)


def counted_ignored(loss: Loss, place: Place) -> Finding | None:
    """ML006: cross_entropy(..., ignore_index=i, reduction="none").mean()."""
    if loss.reduced or loss.ignores is None or loss.uneven:
        return None
    index = loss.ignores.value if isinstance(loss.ignores, Const) else "ignore_index"
    message = (
        f"this mean divides by the number of all targets, also of those that "
        f"{_origin(loss, place)} ignores: divide the sum by (target != {index}).sum(), "
        'or use reduction="mean"'
    )
    return Finding(place, "ML006", message, place, loss=loss)


def unguarded(place: Place, divisor: str) -> Finding:
    """ML003: (x * mask).sum() / mask.sum()."""
    message = (
        f"dividing by `{divisor}` gives NaN where every token is masked; use "
        f"`{divisor}.clamp(min=1)`, or masked_loss.masked_cross_entropy, which returns 0"
    )
    return Finding(place, "ML003", message, place)
