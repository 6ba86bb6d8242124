# SPDX-License-Identifier: BSD-3-Clause
"""The losses as functions. What exactly they compute is written in docs/semantics.md."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor
from torch.nn import _reduction

from masked_loss._op.arguments import (
    divisor_of,
    name_of,
    require_bool,
    require_constant,
    require_tensor,
    require_tensors,
    reshape_hint,
    temperatures_of,
)
from masked_loss._op.cross_entropy import cross_entropy as _plain
from masked_loss._op.cross_entropy import cross_entropy_stats as _with_stats
from masked_loss._op.cross_entropy import sharded_cross_entropy, sharded_cross_entropy_stats
from masked_loss._op.overrides import is_overridden, override
from masked_loss.options import Meaning
from masked_loss.stats import LossStats
from masked_loss.vocab import shards_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from masked_loss.options import CrossEntropyKeywords
    from masked_loss.vocab import VocabShard


@overload
def masked_cross_entropy(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[CrossEntropyKeywords],
) -> Tensor: ...


@overload
def masked_cross_entropy(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    return_stats: Literal[True],
    **options: Unpack[CrossEntropyKeywords],
) -> tuple[Tensor, LossStats]: ...


def masked_cross_entropy(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    ignore_index: int = -100,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    shift: bool = False,
    cu_seqlens: Tensor | None = None,
    inplace_backward: bool = False,
    vocab: VocabShard | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, LossStats]:
    r"""Cross entropy of each token's logits, weighted by a mask, reduced once.

    For tokens n with logits :math:`x_n`, target :math:`t_n` and weight
    :math:`w_n = \text{mask}_n [t_n \ne \text{ignore\_index}]`:

    .. math::
        \ell_n = \text{logsumexp}(x_n) - x_{n, t_n}, \qquad
        \text{loss} = \frac{\sum_n w_n \ell_n}{\sum_n w_n} \quad \text{(reduction="mean")}

    A token with :math:`w_n = 0` is *masked*: its logits are never read, so a NaN in them reaches
    neither the loss nor a gradient, and its gradient is exactly 0. If every token is masked the
    loss is 0 and so are the gradients; ``return_stats`` tells (``stats.tokens == 0``).

    Args:
        logits: [..., V] float64, float32, bfloat16 or float16. Half types are computed in float32.
        target: [...] int64 or int32 class indices.
        mask: [...] bool, integer or floating: the weight of each token; None stands for 1. A
            floating mask that requires grad gets its gradient.
        reduction: ``"none"``: :math:`w_n \ell_n`, in the shape of target; ``"sum"``; ``"mean"``;
            ``"sequence_mean"``: the mean of each sequence (the last dimension of target is time),
            then the mean over the sequences that have an active token.
        normalizer: a number or 0-dim tensor that the sum is divided by, instead of the weights'
            sum: the token count of the whole accumulated batch makes gradient accumulation exact.
            For ``"sequence_mean"`` it stands for the number of sequences.
        ignore_index: a target with this value has weight 0.
        class_weight: [V]; multiplies each token's loss by its class's weight, which then also
            counts in the denominator, as in :func:`torch.nn.functional.cross_entropy`.
        label_smoothing: between 0 and 1, as in :func:`torch.nn.functional.cross_entropy`.
        z_loss: adds ``z_loss * logsumexp(x_n) ** 2`` to each token's loss (PaLM, section 5).
        softcap: replaces the logits by ``softcap * tanh(logits / softcap)`` first (Gemma 2).
        temperature: what the logits are divided by, after the softcap: a number, or a tensor that
            broadcasts to target. It has no gradient.
        shift: for causal language models: ``logits[..., t, :]`` scores ``target[..., t + 1]``,
            without a copy of the logits. ``mask`` stays aligned with ``target``, and so is the
            result of ``"none"``; the first token of a sequence takes no part.
        cu_seqlens: int32 or int64 [S + 1], from 0 ascending: sequences packed one after the other
            in the flattened tokens, see :func:`masked_loss.cu_seqlens`. The means of
            ``"sequence_mean"`` are theirs, ``shift`` does not cross their bounds, and tokens behind
            the last have weight 0. None: the last dimension is one sequence; jagged nested tensors
            (``layout=torch.jagged``) have their own.
        inplace_backward: backward overwrites the logits with their gradient, instead of
            allocating it. The logits must not be used afterwards. No effect under torch.compile.
        vocab: logits are this rank's columns of [..., V], see :class:`masked_loss.VocabShard`;
            target, mask and class_weight are those of all V classes, on every rank of its group,
            which all get the same result, bit for bit. Forward exchanges 12 bytes for each token
            (24 for float64; 8 more with label smoothing and with statistics), backward nothing.
        return_stats: returns ``(loss, LossStats)``.

    Returns:
        The loss, float32 (float64 for float64 logits); with ``return_stats`` also
        :class:`masked_loss.LossStats`.

    DTensors give a DTensor, the loss of the whole, which docs/parallel.md has the placements of.

    Raises:
        IndexError: a target that is neither masked nor ignored is out of range (on the CPU; on
            CUDA a device-side assert, as in PyTorch).
        TypeError: a dtype that is not offered.
        ValueError: shapes that do not fit, an unknown reduction, a number out of its range.
        RuntimeError: in a compiled graph, any of these; its text says which.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.cross_entropy.html,
    and docs/semantics.md for what differs from it.

    >>> import torch
    >>> from masked_loss import masked_cross_entropy
    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [9.0, 9.0]], requires_grad=True)
    >>> target = torch.tensor([0, 0, 1])
    >>> mask = torch.tensor([1, 1, 0])  # the third token is padding
    >>> loss = masked_cross_entropy(logits, target, mask)
    >>> loss.backward()
    >>> loss, logits.grad[2]
    (tensor(0.7201, grad_fn=<CrossEntropyBackward>), tensor([0., 0.]))
    """
    if is_overridden(logits, target, mask):
        return override(masked_cross_entropy, locals())
    who = "masked_cross_entropy"
    require_tensor(who, "logits", logits)
    require_tensor(who, "target", target)
    if mask is not None:
        require_tensor(who, "mask", mask)
    require_constant(who, "class_weight", class_weight)
    require_constant(who, "cu_seqlens", cu_seqlens)
    require_bool(who, shift=shift, inplace_backward=inplace_backward, return_stats=return_stats)
    if target.is_floating_point():
        raise TypeError(
            f"{who}: target must be int64 or int32 class indices, got {name_of(target)}"
        )
    divisor = divisor_of(who, normalizer, logits)
    number, each = temperatures_of(who, "temperature", temperature, target.shape, logits)
    inputs = (logits, target, mask, divisor, class_weight, cu_seqlens, each)
    meaning = Meaning(reduction, ignore_index, label_smoothing, z_loss, softcap, number, shift)
    if vocab is None:
        operator = _with_stats if return_stats else _plain
        loss, *more = operator(who, inputs, meaning, {}, inplace_backward=inplace_backward)
    else:
        shards = shards_of(who, vocab, "logits", logits.shape[-1]).of_logits()
        operator = sharded_cross_entropy_stats if return_stats else sharded_cross_entropy
        loss, *more = operator(
            who, inputs, meaning, {}, inplace_backward=inplace_backward, **shards
        )
    return (loss, LossStats(*more[0].unbind())) if return_stats else loss


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    r"""A drop-in for :func:`torch.nn.functional.cross_entropy` that takes a mask.

    The same arguments in the same order, and the same results, except where this is better: if all
    tokens are ignored or masked, the mean is 0 and not NaN; half-precision inputs give a float32
    loss that was rounded once; int32 targets work; a NaN in an ignored row stays there.

    .. math::
        \text{loss} = \frac{\sum_n w_n c_{t_n} \ell_n}{\sum_n w_n c_{t_n}}, \qquad
        w_n = \text{mask}_n [t_n \ne \text{ignore\_index}], \quad c = \text{weight}

    Args:
        input: (C), (N, C) or (N, C, d1, ...), floating.
        target: class indices of shape (), (N) or (N, d1, ...), or class probabilities of the
            shape of input.
        weight: [C], the weight of each class.
        size_average: deprecated, see ``reduction``; understood as PyTorch does.
        ignore_index: a target with this value has weight 0; not with class probabilities.
        reduce: deprecated, see ``reduction``; understood as PyTorch does.
        reduction: ``"none"``, ``"sum"`` or ``"mean"``.
        label_smoothing: between 0 and 1.
        mask: the weight of each token, in the shape that class indices have; None stands for 1.

    Returns:
        The loss, float32 (float64 for float64 inputs).

    Raises:
        IndexError: a target is out of range, on the CPU.
        TypeError: a dtype that is not offered.
        ValueError: shapes that do not fit, an unknown reduction, a number out of its range.
        RuntimeError: in a compiled graph, any of these; its text says which.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.cross_entropy.html

    >>> import torch, masked_loss
    >>> input, target = torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.int64)
    >>> masked_loss.cross_entropy(input, target)
    tensor(1.0986)
    >>> masked_loss.cross_entropy(input, target, mask=torch.zeros(2, 4, dtype=torch.bool))
    tensor(0.)
    """
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
        size_average = reduce = None
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(
            f'cross_entropy: reduction must be "none", "sum" or "mean", got {reduction!r}'
        )
    if is_overridden(input, target, mask):
        return override(cross_entropy, locals())
    who = "cross_entropy"
    require_tensors(who, {"input": input, "target": target}, {"mask": mask})
    require_constant(who, "weight", weight)
    logits = input.movedim(1, -1) if input.dim() > 2 else input
    if target.is_floating_point():
        if target.shape != input.shape:
            raise ValueError(
                f"{who}: class probabilities must have the shape of input, "
                f"{list(input.shape)}, got {list(target.shape)}"
            )
        if ignore_index >= 0:
            raise ValueError(
                f"{who}: ignore_index needs class indices, got class probabilities and "
                f"ignore_index {ignore_index}"
            )
        dtype = torch.promote_types(input.dtype, target.dtype)
        target = (target.movedim(1, -1) if target.dim() > 2 else target).to(dtype)
        logits = logits.to(dtype)
    else:
        expected = [*input.shape[:1], *input.shape[2:]] if input.dim() > 1 else []
        if input.dim() == 0 or list(target.shape) != expected:
            raise ValueError(
                f"{who}: target must have shape {expected} for input {list(input.shape)}, "
                f"got {list(target.shape)}{_dropin_hint(input, target, expected)}"
            )
        if target.dtype == torch.uint8:  # PyTorch takes these too
            target = target.long()
    inputs = (logits, target, mask, None, weight, None, None)
    meaning = Meaning(reduction, ignore_index, label_smoothing)
    names = {"logits": "input", "class_weight": "weight"}
    loss, *_ = _plain(who, inputs, meaning, names, inplace_backward=False)
    return loss


def _dropin_hint(input: Tensor, target: Tensor, expected: list[int]) -> str:
    if target.shape == input.shape:
        return ": of one-hot targets the class indices are target.argmax(1)"
    if input.dim() > 2 and target.shape == input.shape[:-1]:
        return (
            ": the classes are dimension 1 of input, as in PyTorch; masked_cross_entropy takes "
            "logits [..., V] as they are"
        )
    return reshape_hint("target", target, expected)
