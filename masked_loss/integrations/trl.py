# SPDX-License-Identifier: BSD-3-Clause
"""TRL's per-token functions, with TRL's names and arguments: one line in a script for a trainer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from masked_loss._op.arguments import require_tensor, require_tensors, speaking_for
from masked_loss.divergence import masked_divergence
from masked_loss.integrations.transformers import one_element
from masked_loss.linear_log_probs import linear_token_log_probs
from masked_loss.log_probs import token_log_probs

__all__ = [
    "ChunkedLogProbs",
    "entropy_from_logits",
    "generalized_jsd_loss",
    "selective_log_softmax",
    "selective_log_softmax_and_entropy",
]

_NAMES = {"target": "index", "mask": "row_mask"}
_IGNORED = torch.iinfo(torch.int64).min
"""An index that nobody means: TRL knows none that is ignored, and -100 is out of range."""


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    r"""``log_softmax(logits / temperature).gather(-1, index)``, by :func:`token_log_probs`.

    Half types are computed in float32, temperature included, and come out as float32; rows with a
    ``row_mask`` of 0 are not read. CPO, ORPO and the other trainers that import it::

        trl.experimental.cpo.cpo_trainer.selective_log_softmax = selective_log_softmax

    Args:
        logits: [..., V] floating.
        index: [...] or [..., K] int64.
        temperature: what logits are divided by.
        row_mask: in the shape of index: 0 skips a row, or one of its K indices.

    Returns:
        In the shape of index, float32 (float64 for float64 logits).

    Raises:
        IndexError: an index is out of range.

    Source: https://github.com/huggingface/trl/blob/main/trl/trainer/utils.py

    >>> import torch
    >>> from masked_loss.integrations.trl import selective_log_softmax
    >>> selective_log_softmax(torch.zeros(2, 8), torch.tensor([3, 5]))
    tensor([-2.0794, -2.0794])
    """
    who, mask = "selective_log_softmax", row_mask
    require_tensors(who, {"logits": logits, "index": index}, {"row_mask": mask})
    if mask is not None and mask.dim() == index.dim() == logits.dim():  # each of K indices has one
        index, mask = _unmasked(who, index, mask), None
    with speaking_for(who, "token_log_probs", _NAMES):
        return token_log_probs(logits, index, mask, temperature=temperature, ignore_index=_IGNORED)


def _unmasked(who: str, index: Tensor, row_mask: Tensor) -> Tensor:
    """``index`` [..., K], ignored where row_mask is 0."""
    try:
        row_mask = row_mask.expand(index.shape)
    except RuntimeError:
        text = f"row_mask must have shape {list(index.shape)}, got {list(row_mask.shape)}"
        raise ValueError(f"{who}: {text}") from None
    if index.dtype not in (torch.int64, torch.int32):  # an error in any case
        return index
    return index.long().masked_fill(row_mask == 0, _IGNORED)


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`selective_log_softmax` and :func:`entropy_from_logits` in one pass.

    Args:
        logits: [..., V] floating.
        index: [...] int64.
        entropy_requires_grad: False: the entropy has no gradient.
        temperature: what logits are divided by, for both results.
        row_mask: [...]: 0 skips a row, whose results are 0.

    Returns:
        Log-probabilities and entropies in nats, [...] float32 (float64 for float64 logits).

    Raises:
        IndexError: an index is out of range.

    Source: https://github.com/huggingface/trl/blob/main/trl/trainer/utils.py

    >>> import torch
    >>> from masked_loss.integrations.trl import selective_log_softmax_and_entropy
    >>> selective_log_softmax_and_entropy(torch.zeros(1, 8), torch.tensor([3]))
    (tensor([-2.0794]), tensor([2.0794]))
    """
    options: dict[str, Any] = {"temperature": temperature, "ignore_index": _IGNORED}
    with speaking_for("selective_log_softmax_and_entropy", "token_log_probs", _NAMES):
        log_probs, entropy = token_log_probs(
            logits, index, row_mask, **options, return_entropy=True
        )
    return log_probs, entropy if entropy_requires_grad else entropy.detach()


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """The entropy of each token's distribution, in nats. A logit of -inf adds nothing.

    Args:
        logits: [..., V] floating.
        chunk_size: not used: nothing of the size of the logits is made.

    Returns:
        [...] float32 (float64 for float64 logits).

    Source: https://github.com/huggingface/trl/blob/main/trl/trainer/utils.py

    >>> import torch
    >>> from masked_loss.integrations.trl import entropy_from_logits
    >>> entropy_from_logits(torch.tensor([[0.0, 0.0, float("-inf")]]))
    tensor([0.6931])
    """
    who = "entropy_from_logits"
    require_tensor(who, "logits", logits)
    index = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    with speaking_for(who, "selective_log_softmax_and_entropy", {}):
        return selective_log_softmax_and_entropy(logits, index)[1]


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: Tensor | float | None = None,
) -> Tensor:
    r"""GKD's loss: the Jensen-Shannon divergence of a student from a teacher.

    By :func:`masked_divergence`, which copies neither the logits nor their active rows::

        GKDTrainer.generalized_jsd_loss = staticmethod(generalized_jsd_loss)

    Args:
        student_logits: [..., V] floating.
        teacher_logits: [..., V] floating.
        labels: [...]: tokens with -100 do not count.
        beta: between 0 and 1. 0 is KL(teacher | student) and 1 KL(student | teacher), as in TRL;
            in between it is ``kind="jsd"``.
        temperature: what both logits are divided by.
        reduction: ``"batchmean"``: over the tokens that count (without labels over the first
            dimension), ``"sum"``, or ``"mean"``: over tokens and classes.
        num_items_in_batch: what to divide the sum by instead.

    Returns:
        A 0-dim tensor; 0 if no token counts.

    Raises:
        ValueError: another reduction, shapes that do not fit.

    Source: https://github.com/huggingface/trl/blob/main/trl/experimental/gkd/gkd_trainer.py

    >>> import torch
    >>> from masked_loss.integrations.trl import generalized_jsd_loss
    >>> x = torch.randn(2, 3, 8)
    >>> generalized_jsd_loss(x, x, torch.tensor([[1, 2, -100], [4, -100, -100]]))
    tensor(0.)
    """
    who = "generalized_jsd_loss"
    both = {"student_logits": student_logits, "teacher_logits": teacher_logits}
    require_tensors(who, both, {"labels": labels})
    if reduction not in ("batchmean", "sum", "mean"):
        raise ValueError(
            f"{who}: reduction must be 'batchmean', 'sum' or 'mean', got {reduction!r}"
        )
    options: dict[str, Any] = {"kind": "jsd", "beta": beta}
    if beta in (0, 1):
        options = {"kind": "reverse_kl" if beta else "forward_kl"}
    if num_items_in_batch is not None:
        options["normalizer"] = num_items_in_batch
        if isinstance(num_items_in_batch, Tensor):
            options["normalizer"] = one_element(who, num_items_in_batch).to(student_logits.device)
    elif reduction == "sum":
        options["reduction"] = "sum"
    elif reduction == "batchmean" and labels is None:
        options["normalizer"] = max(student_logits.shape[0], 1)
    mask = None if labels is None else labels != -100
    names = {"logits": "student_logits", "mask": "labels", "normalizer": "num_items_in_batch"}
    with speaking_for(who, "masked_divergence", names):
        loss: Tensor = masked_divergence(
            student_logits, teacher_logits, mask, temperature=temperature, **options
        )
    mean_of_classes = reduction == "mean" and num_items_in_batch is None
    return loss / student_logits.shape[-1] if mean_of_classes else loss


class ChunkedLogProbs:
    """Log-probabilities and entropies from hidden states, some tokens at a time.

    What TRL's fused head (``add_fused_lm_head``) computes with: SFT, DPO, KTO, GRPO and RLOO use
    masked_loss after ::

        trl.trainer.utils._ChunkedLogProbFunction = ChunkedLogProbs

    It is :func:`masked_loss.linear_token_log_probs`. ``log_sum_sq_probs``, ``mean_logits`` and
    ``is_top1`` come from TRL's own function, and without a gradient: trainers use them as weights
    and for logging.

    Source: https://github.com/huggingface/trl/blob/main/trl/kernels/chunked_logprob.py

    >>> import torch
    >>> from masked_loss.integrations.trl import ChunkedLogProbs
    >>> hidden, head, target = torch.zeros(2, 4), torch.randn(8, 4), torch.tensor([3, 5])
    >>> ChunkedLogProbs.apply(hidden, head, None, target, 1.0, 4096, None, 1.0, ("log_probs",))[0]
    tensor([-2.0794, -2.0794])
    """

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("log_probs", "entropy"),
    ) -> tuple[Tensor | None, ...]:
        """The arguments and the five results of TRL's function.

        Args:
            hidden: [N, D].
            weight: [V, D].
            bias: [V].
            targets: [N] int64.
            temperature: what logits are divided by, after the softcap.
            chunk_size: TRL's width of a chunk of classes, for its own function; ours takes some
                tokens at a time.
            softcap: logits -> softcap * tanh(logits / softcap), after the scale.
            logit_scale: what the product is multiplied by first.
            outputs: what is wanted besides log_probs, which are always given, as TRL gives them.

        Returns:
            log_probs, entropy, log_sum_sq_probs, mean_logits and is_top1, each [N]; None for what
            is not among outputs, log_probs excepted.

        Raises:
            IndexError: a target is out of range.
        """

        # softcap(scale * x) / temperature, as linear_token_log_probs takes it.
        options: dict[str, Any] = {
            "bias": None if bias is None else bias.to(hidden.dtype),
            "temperature": temperature / logit_scale,
            "softcap": None if softcap is None else softcap / logit_scale,
            "ignore_index": _IGNORED,
        }
        heads = (hidden, weight.to(hidden.dtype), targets)
        if "entropy" in outputs:
            log_probs, entropy = linear_token_log_probs(*heads, **options, return_entropy=True)
        else:
            log_probs, entropy = linear_token_log_probs(*heads, **options), None
        more = {*outputs} - {"log_probs", "entropy"}
        others: tuple[Tensor | None, ...] = (None, None, None)
        if more:
            from trl.kernels import ChunkedLogProbFunction

            with torch.no_grad():
                others = ChunkedLogProbFunction.apply(
                    hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale,
                    ("log_probs", *more),
                )[2:]  # fmt: skip
        return (log_probs, entropy, *others)
