# SPDX-License-Identifier: BSD-3-Clause
"""The loss of a language model from its last hidden states, without its logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from masked_loss._op.arguments import (
    divisor_of,
    require_bool,
    require_constant,
    require_dtype,
    require_tensors,
    temperatures_of,
)
from masked_loss._op.linear import linear_cross_entropy as _plain
from masked_loss._op.linear import linear_cross_entropy_stats as _with_stats
from masked_loss._op.overrides import is_overridden, override
from masked_loss.options import Chunking, Meaning
from masked_loss.stats import LossStats
from masked_loss.vocab import shards_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from masked_loss.options import LinearCrossEntropyKeywords
    from masked_loss.vocab import VocabShard


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[LinearCrossEntropyKeywords],
) -> Tensor: ...


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    return_stats: Literal[True],
    **options: Unpack[LinearCrossEntropyKeywords],
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
    temperature: float | Tensor = 1.0,
    shift: bool = False,
    cu_seqlens: Tensor | None = None,
    return_stats: bool = False,
    chunk_tokens: int | None = None,
    accumulation_dtype: torch.dtype | None = None,
    vocab: VocabShard | None = None,
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
        temperature: what the logits are divided by, after the softcap: a number, or a tensor that
            broadcasts to target. It has no gradient.
        shift: for causal language models: ``hidden[..., t, :]`` scores ``target[..., t + 1]``.
        cu_seqlens: int32 or int64 [S + 1], from 0 ascending: sequences packed one after the other
            in the flattened tokens, see :func:`masked_loss.cu_seqlens`. The means of
            ``"sequence_mean"`` are theirs, ``shift`` does not cross their bounds, and tokens behind
            the last have weight 0. None: the last dimension is one sequence; jagged nested tensors
            (``layout=torch.jagged``) have their own.
        return_stats: returns ``(loss, LossStats)``.
        chunk_tokens: how many tokens' logits exist at a time. None: as many as 64 MiB hold (512
            on CUDA, or all if the sums that accumulation_dtype speaks of would be as large; on the
            CPU half of it for float32 and float64, if that is 128 tokens).
        accumulation_dtype: what the gradient of a half-precision weight is summed in over several
            chunks. None: float32, a tensor of 4 V D bytes; ``weight.dtype`` saves it, and rounds
            at each chunk.
        vocab: weight and bias are this rank's rows of [V, D] and [V], see
            :class:`masked_loss.VocabShard`; hidden, target, mask and class_weight are the same on
            all ranks of its group. One exchange of 12 bytes for each token of a chunk (one for all
            chunks without gradients), and one sum over the ranks of the gradient of hidden.

    Returns:
        The loss, float32 (float64 for float64 hidden); with ``return_stats`` also
        :class:`masked_loss.LossStats`.

    DTensors give a DTensor, the loss of the whole, which docs/parallel.md has the placements of.

    Raises:
        IndexError: a target that is neither masked nor ignored is out of range (on the CPU; on
            CUDA a device-side assert, as in PyTorch).
        TypeError: a dtype that is not offered.
        ValueError: shapes that do not fit, an unknown reduction, a number out of its range.
        RuntimeError: in a compiled graph, any of these; its text says which. A second derivative of
            a scalar reduction needs hidden, weight and bias, which the loss does not keep: one that
            nobody holds any more, or that was written to.

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
    if is_overridden(hidden, weight, target, mask, bias):
        return override(linear_cross_entropy, locals())
    who = "linear_cross_entropy"
    required = {"hidden": hidden, "weight": weight, "target": target}
    require_tensors(who, required, {"mask": mask, "bias": bias})
    require_constant(who, "class_weight", class_weight)
    require_constant(who, "cu_seqlens", cu_seqlens)
    require_bool(who, shift=shift, return_stats=return_stats)
    require_dtype(who, "accumulation_dtype", accumulation_dtype)
    divisor = divisor_of(who, normalizer, hidden)
    number, each = temperatures_of(who, "temperature", temperature, target.shape, hidden)
    inputs = (hidden, weight, bias, target, mask, divisor, class_weight, cu_seqlens, each)
    meaning = Meaning(reduction, ignore_index, label_smoothing, z_loss, softcap, number, shift)
    operator = _with_stats if return_stats else _plain
    # A compiled graph has no place where the host could wait.
    chunking = Chunking(chunk_tokens, accumulation_dtype, not torch.compiler.is_compiling())
    shards = {}
    if vocab is not None:
        shards = shards_of(who, vocab, "weight", weight.shape[0])._asdict()
    loss, *more = operator(who, inputs, meaning, {}, **chunking._asdict(), **shards)
    return (loss, LossStats(*more[0].unbind())) if return_stats else loss
