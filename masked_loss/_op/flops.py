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

from masked_loss._op.factory import Signature
from masked_loss._op.linear import linear_cross_entropy, linear_cross_entropy_stats
from masked_loss._op.linear_divergence import linear_divergence, linear_divergence_stats
from masked_loss._op.linear_log_probs import linear_token_log_probs, linear_token_log_probs_entropy


def _product(hidden: Sequence[int], weight: Sequence[int]) -> int:
    """[tokens, D] times [D, V]."""
    return 2 * prod(hidden[:-1]) * prod(weight)


def _count(name: str) -> None:
    """Counts the logits, and the gradients that a forward or a backward computes along with them.

    A teacher has logits, and no gradients.
    """
    signature = Signature(name)

    @register_flop_formula(signature.overload.overloadpacket)
    def flops(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        a = signature.bind(args, kwargs)
        needs: Sequence[bool] = getattr(a, "needs", ())
        count = _product(a.hidden, a.weight) * (1 + sum(map(bool, needs[:2])))
        if hasattr(a, "teacher_hidden"):
            count += _product(a.teacher_hidden, a.teacher_weight)
        return count


for _operator in (
    linear_cross_entropy,
    linear_cross_entropy_stats,
    linear_token_log_probs,
    linear_token_log_probs_entropy,
    linear_divergence,
    linear_divergence_stats,
):
    _count(_operator.name)
for _name in (linear_cross_entropy.name, linear_token_log_probs.name, linear_divergence.name):
    _count(f"{_name}_forward")
    _count(f"{_name}_backward")
