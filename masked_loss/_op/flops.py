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


def _count(op: Any) -> None:
    """Counts the logits and the gradients that a forward or a backward computes along with them."""
    at = {argument.name: n for n, argument in enumerate(op.default._schema.arguments)}

    @register_flop_formula(op)
    def flops(*args: Any, out_shape: Any = None) -> int:
        hidden, weight, needs = (args[at[name]] for name in ("hidden", "weight", "needs"))
        return _product(hidden, weight) * (1 + sum(bool(need) for need in needs[:2]))


_count(ops.linear_cross_entropy_forward)
_count(ops.linear_cross_entropy_backward)
