# SPDX-License-Identifier: BSD-3-Clause
"""Log-probabilities of given tokens from hidden states, without the logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from masked_loss._op import linear_log_probs as operators
from masked_loss._op.arguments import (
    require_bool,
    require_constant,
    require_dtype,
    require_tensors,
    temperatures_of,
)
from masked_loss._op.overrides import is_overridden, override
from masked_loss.options import Scoring
from masked_loss.vocab import shards_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from masked_loss.options import LinearScoringKeywords
    from masked_loss.vocab import VocabShard


@overload
def linear_token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    return_entropy: Literal[False] = False,
    **options: Unpack[LinearScoringKeywords],
) -> Tensor: ...


@overload
def linear_token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    return_entropy: Literal[True],
    **options: Unpack[LinearScoringKeywords],
) -> tuple[Tensor, Tensor]: ...


def linear_token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    softcap: float | None = None,
    shift: bool = False,
    cu_seqlens: Tensor | None = None,
    return_entropy: bool = False,
    chunk_tokens: int | None = None,
    accumulation_dtype: torch.dtype | None = None,
    vocab: VocabShard | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Log-probabilities, and the entropy, under ``F.linear(hidden, weight, bias)``.

    .. math::
        x_n = W h_n + b, \qquad \text{log\_prob}_n = \log \text{softmax}(x_n)_{t_n}

    and every other option of :func:`masked_loss.token_log_probs`, to which this is equal. The
    logits are computed some tokens at a time, in forward and again in backward, and never for
    masked tokens, whose hidden states are not read: prompts cost nothing.

    Args:
        hidden: [..., D] float64, float32, bfloat16 or float16.
        weight: [V, D], of the dtype of hidden; it may be the embedding.
        target: [...] int64 or int32 class indices; or [..., K], K of them for each token.
        mask: [...] bool, integer or floating; 0 masks the token, and no other value has a meaning.
        bias: [V], of the dtype of hidden.
        temperature: what the logits are divided by, after the softcap: a number, or a tensor that
            broadcasts to the tokens [...].
        ignore_index: as in :func:`masked_loss.token_log_probs`.
        softcap: replaces the logits by ``softcap * tanh(logits / softcap)`` first.
        shift: for causal language models: ``hidden[..., t, :]`` scores ``target[..., t + 1]``.
        cu_seqlens: int32 or int64 [S + 1], the bounds of sequences packed one after the other in
            the flattened tokens, see :func:`masked_loss.cu_seqlens`: ``shift`` does not cross
            them, and tokens behind the last are masked. None: the last dimension is a sequence;
            jagged nested tensors have their own.
        return_entropy: returns ``(log_probs, entropy)``.
        chunk_tokens: how many tokens' logits exist at a time. None: as many as 64 MiB hold (512
            on CUDA, or more, as in :func:`masked_loss.linear_cross_entropy`).
        accumulation_dtype: what the gradient of a half-precision weight is summed in over several
            chunks, as in :func:`masked_loss.linear_cross_entropy`.
        vocab: weight and bias are this rank's rows of [V, D] and [V], as in
            :func:`masked_loss.linear_cross_entropy`. One exchange in forward, and one sum over the
            ranks of the gradient of hidden in backward.

    Returns:
        log_probs, of the shape of target, float32 (float64 for float64 hidden); with
        ``return_entropy`` also the entropy [...], in nats.

    Raises:
        IndexError: a target that is neither masked nor ignored is out of range (on the CPU).
        TypeError: a dtype that is not offered.
        ValueError: shapes that do not fit, a number out of its range.
        RuntimeError: in a compiled graph, any of these; its text says which.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.log_softmax.html

    >>> import torch, masked_loss
    >>> hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0], [9.0, 9.0]], requires_grad=True)
    >>> head = torch.tensor([[2.0, 0.0], [0.0, 1.0]], requires_grad=True)
    >>> target, mask = torch.tensor([0, 0, 1]), torch.tensor([1, 1, 0])
    >>> masked_loss.linear_token_log_probs(hidden, head, target, mask).tolist()
    [-0.126..., -1.313..., 0.0]
    """
    if is_overridden(hidden, weight, target, mask, bias):
        return override(linear_token_log_probs, locals())
    who = "linear_token_log_probs"
    required = {"hidden": hidden, "weight": weight, "target": target}
    require_tensors(who, required, {"mask": mask, "bias": bias})
    require_constant(who, "cu_seqlens", cu_seqlens)
    require_bool(who, shift=shift, return_entropy=return_entropy)
    require_dtype(who, "accumulation_dtype", accumulation_dtype)
    tokens = hidden.shape[:-1]
    number, each = temperatures_of(who, "temperature", temperature, tokens, hidden)
    operator = (
        operators.linear_token_log_probs_entropy
        if return_entropy
        else operators.linear_token_log_probs
    )
    shards = {}
    if vocab is not None:
        shards = shards_of(who, vocab, "weight", weight.shape[0])._asdict()
    log_probs, *entropy = operator(
        who, (hidden, weight, bias, target, mask, cu_seqlens, each),
        Scoring(number, ignore_index, softcap, shift), {"logits": "hidden"},
        chunk_tokens=chunk_tokens, accumulation_dtype=accumulation_dtype,
        pack=not torch.compiler.is_compiling(), **shards,
    )  # fmt: skip
    return (log_probs, entropy[0]) if return_entropy else log_probs
