# SPDX-License-Identifier: BSD-3-Clause
"""The loss of a language model from its last hidden states, without its logits."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from masked_loss import _linear, _ops
from masked_loss._arguments import divisor_of, require_constant, require_tensor, typed
from masked_loss._linear_chunks import Options
from masked_loss.stats import LossStats


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    ignore_index: int = -100,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    shift: bool = False,
    return_stats: Literal[False] = False,
    chunk_tokens: int | None = None,
    accumulation_dtype: torch.dtype | None = None,
) -> Tensor: ...


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    ignore_index: int = -100,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    shift: bool = False,
    return_stats: Literal[True],
    chunk_tokens: int | None = None,
    accumulation_dtype: torch.dtype | None = None,
) -> tuple[Tensor, LossStats]: ...


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    ignore_index: int = -100,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    shift: bool = False,
    return_stats: bool = False,
    chunk_tokens: int | None = None,
    accumulation_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, LossStats]:
    r"""Masked cross entropy of ``F.linear(hidden, weight, bias)``, without holding these logits.

    .. math::
        x_n = W h_n + b, \qquad \text{loss} = \frac{\sum_n w_n \ell(x_n, t_n)}{\sum_n w_n}

    and every other option of :func:`masked_loss.masked_cross_entropy`, to which this is equal. The
    logits are computed some tokens at a time, and not at all for masked tokens, whose hidden
    states are never read. Peak memory, above the arguments and their gradients, is one chunk of
    logits, at most 64 MiB on the CPU whatever the number of tokens and classes, and what the
    products work in; for half types also the sums that accumulation_dtype speaks of.

    Scalar reductions compute the gradients in forward, which then takes the time of both passes;
    without grad mode, and for arguments that do not require grad, nothing is computed for them.
    With ``"none"`` backward computes the logits a second time.

    Args:
        hidden: [..., D] float64, float32, bfloat16 or float16.
        weight: [V, D], of the dtype of hidden; it may be the embedding.
        target: [...] int64 or int32 class indices.
        mask: [...] bool, integer or floating: the weight of each token; None stands for 1. A
            floating mask that requires grad gets its gradient.
        bias: [V], of the dtype of hidden.
        reduction: ``"none"``, ``"sum"``, ``"mean"`` or ``"sequence_mean"``.
        normalizer: a number or 0-dim tensor that the sum is divided by, instead of the weights'
            sum; for ``"sequence_mean"`` instead of the number of sequences.
        ignore_index: a target with this value has weight 0.
        class_weight: [V], as in :func:`torch.nn.functional.cross_entropy`.
        label_smoothing: between 0 and 1, as in :func:`torch.nn.functional.cross_entropy`.
        z_loss: adds ``z_loss * logsumexp(x_n) ** 2`` to each token's loss.
        softcap: replaces the logits by ``softcap * tanh(logits / softcap)`` first.
        shift: for causal language models: ``hidden[..., t, :]`` scores ``target[..., t + 1]``.
        return_stats: returns ``(loss, LossStats)``.
        chunk_tokens: how many tokens' logits exist at a time. None: as many as 64 MiB hold (512
            on CUDA; on the CPU half of it for float32 and float64, if that is 128 tokens).
        accumulation_dtype: what the gradient of a half-precision weight is summed in over several
            chunks. None: float32, a tensor of 4 V D bytes; ``weight.dtype`` saves it, and rounds
            at each chunk.

    Returns:
        The loss, float32 (float64 for float64 hidden); with ``return_stats`` also
        :class:`masked_loss.LossStats`.

    Raises:
        IndexError: a target that is neither masked nor ignored is out of range (on the CPU; on
            CUDA a device-side assert, as in PyTorch).
        TypeError: a dtype that is not offered.
        ValueError: shapes that do not fit, an unknown reduction, a number out of its range.

    Under autocast hidden, weight and bias are cast as ``F.linear`` casts them. On CUDA the host
    waits once, for the number of active tokens (with ``"none"`` once more in backward); under graph
    capture and torch.compile it does not, and masked tokens are computed with weight 0.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.linear.html,
    and docs/linear_cross_entropy.md, which counts products and bytes.

    >>> import torch
    >>> from masked_loss import linear_cross_entropy
    >>> hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0], [9.0, 9.0]], requires_grad=True)
    >>> head = torch.tensor([[2.0, 0.0], [0.0, 1.0]], requires_grad=True)
    >>> target = torch.tensor([0, 0, 1])
    >>> mask = torch.tensor([1, 1, 0])  # the third token is padding
    >>> loss = linear_cross_entropy(hidden, head, target, mask)
    >>> loss.backward()
    >>> loss, hidden.grad[2]
    (tensor(0.7201, grad_fn=<LinearCrossEntropyBackward>), tensor([0., 0.]))
    """
    who = "linear_cross_entropy"
    tensors = (hidden, weight, target, mask, bias)
    if has_torch_function(tensors) and not torch.compiler.is_compiling():
        return handle_torch_function(
            linear_cross_entropy,  # type: ignore[arg-type]
            tensors,
            hidden,
            weight,
            target,
            mask,
            bias=bias,
            reduction=reduction,
            normalizer=normalizer,
            ignore_index=ignore_index,
            class_weight=class_weight,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            shift=shift,
            return_stats=return_stats,
            chunk_tokens=chunk_tokens,
            accumulation_dtype=accumulation_dtype,
        )
    require_tensor(who, "hidden", hidden)
    require_tensor(who, "weight", weight)
    require_tensor(who, "target", target)
    if mask is not None:
        require_tensor(who, "mask", mask)
    if bias is not None:
        require_tensor(who, "bias", bias)
    require_constant(who, "class_weight", class_weight)
    divisor = divisor_of(who, normalizer, hidden)
    if torch.compiler.is_compiling():
        ops = _ops.ops
        op = ops.linear_cross_entropy_stats if return_stats else ops.linear_cross_entropy
        result = op(
            hidden, weight, target, mask, bias=bias, reduction=reduction, normalizer=divisor,
            ignore_index=ignore_index, class_weight=class_weight, label_smoothing=label_smoothing,
            z_loss=z_loss, softcap=softcap, shift=shift, chunk_tokens=chunk_tokens,
            accumulation_dtype=accumulation_dtype, pack=False,
        )  # fmt: skip
        return (result[0], LossStats(*result[1].unbind())) if return_stats else result
    options = Options(
        reduction, ignore_index, label_smoothing, z_loss, softcap, shift, return_stats,
        chunk_tokens, accumulation_dtype, pack=True,
    )  # fmt: skip
    try:
        loss, stats = _linear.linear_cross_entropy(
            hidden, weight, bias, target, mask, divisor, class_weight, options
        )
    except RuntimeError as error:
        raise typed(who, error) from None
    return (loss, LossStats(*stats.unbind())) if return_stats else loss
