# SPDX-License-Identifier: BSD-3-Clause
"""Log-probabilities of given tokens, and the entropy of what they were drawn from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

from torch import Tensor

from masked_loss._op import log_probs as operators
from masked_loss._op.arguments import (
    require_bool,
    require_constant,
    require_floating,
    require_mask,
    require_tensor,
    temperatures_of,
)
from masked_loss._op.overrides import is_overridden, override
from masked_loss.options import Scoring
from masked_loss.vocab import shards_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from masked_loss.options import ScoringKeywords
    from masked_loss.vocab import VocabShard


@overload
def token_log_probs(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    return_entropy: Literal[False] = False,
    **options: Unpack[ScoringKeywords],
) -> Tensor: ...


@overload
def token_log_probs(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    return_entropy: Literal[True],
    **options: Unpack[ScoringKeywords],
) -> tuple[Tensor, Tensor]: ...


def token_log_probs(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    softcap: float | None = None,
    shift: bool = False,
    cu_seqlens: Tensor | None = None,
    inplace_backward: bool = False,
    vocab: VocabShard | None = None,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""The log-probability of each target, and the entropy of the distribution it belongs to.

    For a token with logits x, softcap s and temperature T:

    .. math::
        y = \frac{s \tanh(x / s)}{T}, \qquad
        \text{log\_prob}_k = y_{t_k} - \log \sum_j e^{y_j}, \qquad
        H = -\sum_j p_j \log p_j, \quad p = \text{softmax}(y)

    Both are differentiable, and come from one pass over the logits. What DPO, PPO, GRPO and their
    kin need of a model is this; docs/recipes.md has them.

    A masked token's logits are never read, its results are exactly 0, and so is its gradient: the
    ratio of two policies, ``exp(new - old)``, is 1 there.

    Args:
        logits: [..., V] float64, float32, bfloat16 or float16. Half types are computed in float32,
            the temperature too.
        target: [...] int64 or int32 class indices; or [..., K], K of them for each token.
        mask: [...] bool, integer or floating; 0 masks the token, and no other value has a meaning.
        temperature: what the logits are divided by, after the softcap: a number, or a tensor that
            broadcasts to the tokens [...]. It has no gradient.
        ignore_index: a target with this value is 0, without a gradient. A token with one target is
            masked then; one with K if it has no other and no entropy is asked for.
        softcap: replaces the logits by ``softcap * tanh(logits / softcap)`` first (Gemma 2).
        shift: for causal language models: ``logits[..., t, :]`` scores ``target[..., t + 1]``,
            without a copy of the logits. mask, temperature and the results stay aligned with
            target; the first token of a sequence is 0.
        cu_seqlens: int32 or int64 [S + 1], the bounds of sequences packed one after the other in
            the flattened tokens, see :func:`masked_loss.cu_seqlens`: ``shift`` does not cross
            them, and tokens behind the last are masked. None: the last dimension is a sequence;
            jagged nested tensors have their own.
        inplace_backward: backward overwrites the logits with their gradient, instead of
            allocating it. The logits must not be used afterwards. No effect under torch.compile.
        vocab: logits are this rank's columns of [..., V], see :class:`masked_loss.VocabShard`;
            target is of all V classes, on every rank of its group, which all get the same result,
            bit for bit. Forward exchanges 8 + 4 K bytes for each token, and 4 with the entropy
            (float64: twice that), backward nothing.
        return_entropy: returns ``(log_probs, entropy)``.

    Returns:
        log_probs, of the shape of target, float32 (float64 for float64 logits); with
        ``return_entropy`` also the entropy [...], in nats.

    A class whose logit is -inf has probability 0 and adds nothing to the entropy. As a target its
    log-probability is -inf and the gradient finite. Several equal ids of one token count each.

    Raises:
        IndexError: a target that is neither masked nor ignored is out of range (on the CPU; on
            CUDA a device-side assert, as in PyTorch).
        TypeError: a dtype that is not offered.
        ValueError: shapes that do not fit, a temperature or softcap that is not above 0, a
            temperature that requires grad.
        RuntimeError: in a compiled graph, any of these; its text says which.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.log_softmax.html

    >>> import torch, masked_loss
    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [9.0, 9.0]], requires_grad=True)
    >>> target, mask = torch.tensor([0, 0, 1]), torch.tensor([1, 1, 0])
    >>> log_probs, entropy = masked_loss.token_log_probs(logits, target, mask, return_entropy=True)
    >>> log_probs.tolist(), entropy.tolist()
    ([-0.126..., -1.313..., 0.0], [0.365..., 0.582..., 0.0])
    """
    if is_overridden(logits, target, mask):
        return override(token_log_probs, locals())
    who = "token_log_probs"
    require_floating(who, "logits", logits)
    require_tensor(who, "target", target)
    require_mask(who, mask, logits.shape[:-1], logits)
    require_constant(who, "cu_seqlens", cu_seqlens)
    require_bool(who, shift=shift, inplace_backward=inplace_backward, return_entropy=return_entropy)
    number, per_token = temperatures_of(who, "temperature", temperature, logits.shape[:-1], logits)
    name, shards = "token_log_probs_entropy" if return_entropy else "token_log_probs", {}
    if vocab is not None:
        shards = shards_of(who, vocab, "logits", logits.shape[-1]).of_logits()
        name = f"sharded_{name}"
    operator = getattr(operators, name)
    results = operator(
        who,
        (logits, target, mask, cu_seqlens, per_token),
        Scoring(number, ignore_index, softcap, shift),
        {},
        inplace_backward=inplace_backward,
        **shards,
    )
    return (results[0], results[1]) if return_entropy else results[0]
