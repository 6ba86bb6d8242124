# SPDX-License-Identifier: BSD-3-Clause
"""How far a student's distribution over the classes is from a teacher's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

from torch import Tensor

from masked_loss._op.arguments import (
    divisor_of,
    require_bool,
    require_constant,
    require_tensors,
    temperatures_of,
)
from masked_loss._op.divergence import masked_divergence as _plain
from masked_loss._op.divergence import masked_divergence_stats as _with_stats
from masked_loss._op.overrides import is_overridden, override
from masked_loss.options import Divergence
from masked_loss.stats import DivergenceStats

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from masked_loss.options import DivergenceKeywords


@overload
def masked_divergence(
    logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[DivergenceKeywords],
) -> Tensor: ...


@overload
def masked_divergence(
    logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    return_stats: Literal[True],
    **options: Unpack[DivergenceKeywords],
) -> tuple[Tensor, DivergenceStats]: ...


def masked_divergence(
    logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
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
    inplace_backward: bool = False,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, DivergenceStats]:
    r"""Each token's divergence of a student from a teacher, weighted by a mask, reduced once.

    With q the softmax of the student's logits and p that of the teacher's, both after softcap and
    temperature:

    ==================== =======================================================================
    kind                 D
    ==================== =======================================================================
    ``forward_kl``       KL(p || q): what distillation usually means; covers all of the teacher
    ``reverse_kl``       KL(q || p): prefers the teacher's mode
    ``jsd``              β KL(p || m) + (1 - β) KL(q || m) with m = β p + (1 - β) q; 0 < β < 1
    ``skew_forward_kl``  KL(p || β p + (1 - β) q); 0 <= β < 1
    ``skew_reverse_kl``  KL(q || (1 - β) p + β q); 0 <= β < 1
    ==================== =======================================================================

    It is never negative, also where student and teacher are so close that the sum of p (log p -
    log q) is nothing but rounding. The factor T² that some papers multiply with is left to the
    caller.

    Args:
        logits: [..., V] the student's, float64, float32, bfloat16 or float16. Half types are
            computed in float32, the temperature too.
        teacher_logits: [..., V], of any of these types, without a gradient. Log-probabilities are
            logits too. Of a teacher with more classes, or a padded one, ``teacher[..., :V]``; the
            rows of such a view are read where they are.
        mask: [...] bool, integer or floating: the weight of each token; None stands for 1. A
            floating mask that requires grad gets its gradient.
        kind: one of the table.
        beta: β of the table.
        temperature: what the student's logits are divided by, after the softcap: a number, or a
            tensor that broadcasts to the tokens [...]. It has no gradient.
        teacher_temperature: the same for the teacher; None stands for temperature.
        softcap: replaces the student's logits by ``softcap * tanh(logits / softcap)`` first.
        teacher_softcap: the same for the teacher; None stands for none.
        reduction: ``"none"``, ``"sum"``, ``"mean"`` or ``"sequence_mean"``, as in
            :func:`masked_loss.masked_cross_entropy`.
        normalizer: what the sum is divided by, as in :func:`masked_loss.masked_cross_entropy`.
        shift: for causal language models: the rows t are those of token t + 1, whose weight is
            ``mask[..., t + 1]``. The result of ``"none"`` and tensors of temperatures are aligned
            with mask; the last row is not read.
        cu_seqlens: int32 or int64 [S + 1], the bounds of sequences packed one after the other in
            the flattened tokens, see :func:`masked_loss.cu_seqlens`: ``shift`` does not cross
            them, the means of ``"sequence_mean"`` are theirs, and tokens behind the last have
            weight 0. None: the last dimension is one sequence; jagged nested tensors have their
            own.
        inplace_backward: backward overwrites the student's logits with their gradient, instead of
            allocating it. The logits must not be used afterwards. No effect under torch.compile.
        return_stats: returns ``(loss, DivergenceStats)``.

    Returns:
        The loss, float32 (float64 for float64 logits); with ``return_stats`` also
        :class:`masked_loss.DivergenceStats`.

    A class that both exclude, by a logit of -inf, adds nothing. One that the student excludes and
    the teacher does not makes ``forward_kl`` infinite, with a finite gradient; the other way round
    ``reverse_kl`` is infinite, and its gradient NaN, as the mathematics has it. The other kinds are
    finite.

    Raises:
        TypeError: a dtype that is not offered.
        ValueError: shapes that do not fit, an unknown kind or reduction, a number out of its
            range, a teacher that requires grad.
        RuntimeError: in a compiled graph, any of these; its text says which.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.kl_div.html;
    "jsd" is the generalised divergence of https://arxiv.org/abs/2306.13649, the skewed ones those
    of https://arxiv.org/abs/2402.03898. docs/semantics.md has their gradients.

    >>> import torch, masked_loss
    >>> student = torch.tensor([[0.0, 0.0], [5.0, 1.0]], requires_grad=True)
    >>> teacher = torch.tensor([[1.0, -1.0], [0.0, 0.0]])
    >>> mask = torch.tensor([1, 0])
    >>> loss = masked_loss.masked_divergence(student, teacher, mask)
    >>> loss.backward()
    >>> loss.item(), student.grad
    (0.327..., tensor([[-0.3808,  0.3808],
            [ 0.0000,  0.0000]]))
    """
    if is_overridden(logits, teacher_logits, mask):
        return override(masked_divergence, locals())
    who = "masked_divergence"
    required = {"logits": logits, "teacher_logits": teacher_logits}
    require_tensors(who, required, {"mask": mask})
    require_constant(who, "teacher_logits", teacher_logits)
    require_constant(who, "cu_seqlens", cu_seqlens)
    require_bool(who, shift=shift, inplace_backward=inplace_backward, return_stats=return_stats)
    tokens = logits.shape[:-1]
    if teacher_temperature is None:
        teacher_temperature = temperature
    own, own_each = temperatures_of(who, "temperature", temperature, tokens, logits)
    others, others_each = temperatures_of(
        who, "teacher_temperature", teacher_temperature, tokens, logits
    )
    divisor = divisor_of(who, normalizer, logits)
    operator = _with_stats if return_stats else _plain
    loss, *more = operator(
        who, (logits, teacher_logits, mask, divisor, cu_seqlens, own_each, others_each),
        Divergence(own, others, kind, beta, softcap, teacher_softcap, shift), {},
        reduction=reduction, inplace_backward=inplace_backward,
    )  # fmt: skip
    return (loss, DivergenceStats(*more[0].unbind())) if return_stats else loss
