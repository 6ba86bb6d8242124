# SPDX-License-Identifier: BSD-3-Clause
"""What torch.utils.flop_counter.FlopCounterMode counts for the losses from hidden states.

As for F.linear, two for each multiply-add of a product, and every token counts: masked ones too,
though theirs are not computed. The losses themselves are not counted, as those of PyTorch are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from torch.utils.flop_counter import register_flop_formula

from masked_loss._op import linear  # noqa: F401  # defines the operators
from masked_loss._op.tables import ops


def _product(hidden: Sequence[int], weight: Sequence[int]) -> int:
    """[tokens, D] times [D, V]."""
    return 2 * prod(hidden[:-1]) * prod(weight)


@register_flop_formula([ops.linear_cross_entropy, ops.linear_cross_entropy_stats])
def _loss(hidden: Sequence[int], weight: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return _product(hidden, weight)


@register_flop_formula(ops.linear_cross_entropy_forward)
def _forward(
    hidden: Sequence[int], weight: Sequence[int], *args: Any, out_shape: Any = None
) -> int:
    """The logits, and the gradients that scalar reductions compute along with them."""
    return _product(hidden, weight) * _products(args)


@register_flop_formula(ops.linear_cross_entropy_backward)
def _backward(
    dloss: Sequence[int],
    hidden: Sequence[int],
    weight: Sequence[int],
    *args: Any,
    out_shape: Any = None,
) -> int:
    """The logits again, and the gradients."""
    return _product(hidden, weight) * _products(args)


def _products(args: Sequence[Any]) -> int:
    needs = args[-1]  # of hidden, weight and bias
    return 1 + sum(bool(need) for need in needs[:2])
