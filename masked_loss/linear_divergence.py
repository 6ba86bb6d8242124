# SPDX-License-Identifier: BSD-3-Clause
"""How far a student is from a teacher, from the hidden states of both, without logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from masked_loss._op import linear_divergence as operators
from masked_loss._op.arguments import (
    divisor_of,
    require_bool,
    require_constant,
    require_dtype,
    require_tensors,
    temperatures_of,
)
from masked_loss._op.overrides import is_overridden, override
from masked_loss.options import Divergence
from masked_loss.stats import DivergenceStats

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from masked_loss.options import LinearDivergenceKeywords


@overload
def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    mask: Tensor | None = None,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[LinearDivergenceKeywords],
) -> Tensor: ...


@overload
def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    mask: Tensor | None = None,
    *,
    return_stats: Literal[True],
    **options: Unpack[LinearDivergenceKeywords],
) -> tuple[Tensor, DivergenceStats]: ...


def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    kind: str = "forward_kl",
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    shift: bool = False,
    cu_seqlens: Tensor | None = None,
    return_stats: bool = False,
    chunk_tokens: int | None = None,
    accumulation_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, DivergenceStats]:
    r"""The divergence of ``F.linear(hidden, weight, bias)`` from the teacher's, without logits.

    .. math::
        q_n = \text{softmax}(W h_n + b), \qquad p_n = \text{softmax}(W' h'_n + b')

    and every option of :func:`masked_loss.masked_divergence`, to which this is equal. Both logits
    are computed some tokens at a time, in float32 also for half types: rounded to bfloat16, logits
    that are close have gradients that are wrong by a third. The gradient is formed in float32, and
    rounded to the type of hidden for its two products. Masked tokens are not computed.

    Args:
        hidden: [..., D] the student's, float64, float32, bfloat16 or float16.
        weight: [V, D], of the dtype of hidden.
        teacher_hidden: [..., D'], of any of these types, without a gradient, as all of the teacher.
        teacher_weight: [V, D'], of the dtype of teacher_hidden. Of a teacher with more classes:
            ``teacher_weight[:V]``.
        mask: [...] bool, integer or floating: the weight of each token; None stands for 1.
        bias: [V], of the dtype of hidden.
        teacher_bias: [V], of the dtype of teacher_hidden.
        kind: as in :func:`masked_loss.masked_divergence`, like all that follow.
        beta: of "jsd" and the skewed kinds.
        temperature: a number, or a tensor that broadcasts to the tokens [...].
        teacher_temperature: the same for the teacher; None stands for temperature.
        softcap: of the student's logits.
        teacher_softcap: of the teacher's; None stands for none.
        reduction: ``"none"``, ``"sum"``, ``"mean"`` or ``"sequence_mean"``.
        normalizer: what the sum is divided by.
        shift: for causal language models: the rows t have the weight ``mask[..., t + 1]``.
        cu_seqlens: int32 or int64 [S + 1], the bounds of sequences packed one after the other in
            the flattened tokens, see :func:`masked_loss.cu_seqlens`: ``shift`` does not cross
            them, the means of ``"sequence_mean"`` are theirs, and tokens behind the last have
            weight 0. None: the last dimension is one sequence; jagged nested tensors have their
            own.
        return_stats: returns ``(loss, DivergenceStats)``.
        chunk_tokens: how many tokens' logits exist at a time. None: as many as 64 MiB hold (512
            on CUDA).
        accumulation_dtype: what the gradient of a half-precision weight is summed in over several
            chunks, as in :func:`masked_loss.linear_cross_entropy`.

    Returns:
        The loss, float32 (float64 for float64 hidden); with ``return_stats`` also
        :class:`masked_loss.DivergenceStats`.

    Raises:
        TypeError: a dtype that is not offered.
        ValueError: shapes that do not fit, an unknown kind or reduction, a number out of its
            range, a teacher that requires grad.
        RuntimeError: in a compiled graph, any of these; its text says which.

    Source: docs/semantics.md.

    >>> import torch, masked_loss
    >>> hidden, head = torch.zeros(3, 4), torch.randn(2, 4)
    >>> teacher_hidden, teacher_head = torch.ones(3, 1), torch.tensor([[1.0], [-1.0]])
    >>> masked_loss.linear_divergence(hidden, head, teacher_hidden, teacher_head)
    tensor(0.3278)
    """
    if is_overridden(hidden, weight, teacher_hidden, teacher_weight, mask, bias, teacher_bias):
        return override(linear_divergence, locals())
    who = "linear_divergence"
    teacher = {"teacher_hidden": teacher_hidden, "teacher_weight": teacher_weight}
    optional = {"mask": mask, "bias": bias, "teacher_bias": teacher_bias}
    require_tensors(who, {"hidden": hidden, "weight": weight, **teacher}, optional)
    for name, x in (*teacher.items(), ("teacher_bias", teacher_bias)):
        require_constant(who, name, x)
    require_constant(who, "cu_seqlens", cu_seqlens)
    require_bool(who, shift=shift, return_stats=return_stats)
    require_dtype(who, "accumulation_dtype", accumulation_dtype)
    tokens = hidden.shape[:-1]
    if teacher_temperature is None:
        teacher_temperature = temperature
    own, own_each = temperatures_of(who, "temperature", temperature, tokens, hidden)
    others, others_each = temperatures_of(
        who, "teacher_temperature", teacher_temperature, tokens, hidden
    )
    operator = operators.linear_divergence_stats if return_stats else operators.linear_divergence
    loss, *more = operator(
        who, (
            hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, mask,
            divisor_of(who, normalizer, hidden), cu_seqlens, own_each, others_each,
        ),
        Divergence(own, others, kind, beta, softcap, teacher_softcap, shift), {},
        reduction=reduction, chunk_tokens=chunk_tokens, accumulation_dtype=accumulation_dtype,
        pack=not torch.compiler.is_compiling(),
    )  # fmt: skip
    return (loss, DivergenceStats(*more[0].unbind())) if return_stats else loss
