# SPDX-License-Identifier: BSD-3-Clause
"""What the operators hand each other, as csrc/kernels/args.h lays it out: a test holds the names
of the fields to those of its enumerations."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from masked_loss._op.library import load

load()

ops = torch.ops.masked_loss

# A row of the table of tokens for each; the last ones only where statistics are asked for.
SAVED = ("weight", "loss", "top", "sum", "target_mass")
TOKEN_FIELDS = (*SAVED, "entropy", "correct")
GROUP_FIELDS = ("scale_loss", "scale_z", "inverse_loss", "inverse_z", "mean_loss", "mean_z")
STATISTICS = ("tokens", "correct", "entropy", "z_loss")
assert ops.table_sizes() == tuple(map(len, (SAVED, TOKEN_FIELDS, GROUP_FIELDS, STATISTICS)))
# masked_reduce's tokens have no row of logits.
VALUE_FIELDS = ("weight", "loss")
# Of the other losses' tokens; those of a divergence have its weight and value where the cross
# entropy's have theirs.
DIVERGENCE_SAVED = ("weight", "value", "top", "sum", "teacher_top", "teacher_sum", "mean_score")
DIVERGENCE_FIELDS = (*DIVERGENCE_SAVED, "entropy", "teacher_entropy", "agreement")


def divergence_fields(stats: bool) -> tuple[str, ...]:
    return DIVERGENCE_FIELDS if stats else DIVERGENCE_SAVED


LOG_PROB_FIELDS = ("sum", "top", "entropy_sum")


def log_prob_fields(entropy: bool) -> tuple[str, ...]:
    return LOG_PROB_FIELDS if entropy else LOG_PROB_FIELDS[: LOG_PROB_FIELDS.index("entropy_sum")]


def weights(tokens: Tensor) -> Tensor:
    """[tokens]: mask * [target != ignore_index]."""
    return tokens[TOKEN_FIELDS.index("weight")]


def mask_or_weights(
    mask: Tensor | None, computed: Sequence[Tensor], shape: torch.Size
) -> Tensor | None:
    """The mask; of a loss that is ``computed``, the weights of one that it has not kept."""
    return weights(computed[0]).reshape(shape) if computed and mask is None else mask


def by_name(fields: tuple[str, ...], tokens: Tensor) -> dict[str, Tensor]:
    return dict(zip(fields, tokens, strict=True))


def clear_results(tokens: Tensor) -> None:
    """Zeros in every field but the weight, for the tokens that nobody will compute."""
    tokens[TOKEN_FIELDS.index("weight") + 1 :].zero_()


def scales(groups: Tensor) -> Tensor:
    """[groups, 2]: what a token's weighted loss and z-loss are multiplied by."""
    first = GROUP_FIELDS.index("scale_loss")
    return groups[:, first : GROUP_FIELDS.index("scale_z") + 1]


def loss_dtype(values: Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def fake_loss(like: Tensor, reduction: str, shape: torch.Size) -> Tensor:
    return like.new_empty(shape if reduction == "none" else (), dtype=loss_dtype(like))


def fake_stats(like: Tensor, stats: bool, count: int = len(STATISTICS)) -> Tensor:
    # float64 holds any count, float32 those to 2^24.
    return like.new_empty((count if stats else 0,), dtype=torch.float64)


def fake_tokens(like: Tensor, fields: tuple[str, ...], shape: torch.Size) -> Tensor:
    # math.prod: torch.Size.numel() would make a symbolic size a constant.
    return like.new_empty((len(fields), math.prod(shape)), dtype=loss_dtype(like))


def fake_groups(
    like: Tensor,
    reduction: str,
    shape: torch.Size,
    cu_seqlens: Tensor | None,
    per_sequence: bool = False,
) -> Tensor:
    groups: int | torch.SymInt = 1
    fields = len(GROUP_FIELDS)
    if per_sequence or reduction == "sequence_mean":
        if cu_seqlens is not None:
            groups, fields = cu_seqlens.shape[0], fields + 1
        elif len(shape) > 0 and (per_sequence or shape[-1] != 0):
            groups = torch.sym_max(1, math.prod(shape[:-1]))
    return like.new_empty((groups, fields), dtype=torch.float64)


def groups_at(groups: Tensor, tokens: Tensor, count: int) -> Tensor:
    """The table of these tokens' groups, a row for each of them; ``count``: of all tokens."""
    fields = len(GROUP_FIELDS)
    if groups.shape[1] == fields:
        return groups.index_select(0, tokens // (count // groups.shape[0]))
    bounds = groups[:, fields].contiguous()  # of sequences of any length
    number = torch.searchsorted(bounds, tokens.double(), right=True) - 1
    return groups[:, :fields].index_select(0, number)
