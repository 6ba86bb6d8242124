# SPDX-License-Identifier: BSD-3-Clause
"""The loss function of transformers' causal language models."""

from __future__ import annotations

import inspect
from math import prod
from typing import Any

import torch
from torch import Tensor

from masked_loss._op.arguments import speaking_for
from masked_loss.functional import masked_cross_entropy
from masked_loss.packing import cu_seqlens

__all__ = ["FROM_MODELS", "causal_lm_loss"]

_WHO = "causal_lm_loss"

FROM_MODELS = frozenset((
    # transformers.utils.generic.TransformersKwargs, which models take and pass on
    "cu_seq_lens_k", "cu_seq_lens_q", "is_causal", "max_length_k", "max_length_q",
    "output_attentions", "output_hidden_states", "output_router_logits", "position_ids", "seq_idx",
    # what some models add, and what a model's forward does not name but gets nevertheless
    "cache_position", "pad_token_id", "return_dict", "use_cache",
    # what tokenizers put into a batch
    "length", "offset_mapping", "overflow_to_sample_mapping", "special_tokens_mask",
    "token_type_ids",
))  # fmt: skip
"""Keywords that models hand to their loss function by themselves. They say nothing about a loss,
but for the bounds of packed documents: see :func:`causal_lm_loss`."""

_RENAMED = {"weight": "class_weight"}  # torch.nn.functional.cross_entropy's name
_OPTIONS = frozenset(
    name
    for name, parameter in inspect.signature(masked_cross_entropy).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
) - {"return_stats"}  # a loss function returns a loss


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    r"""What transformers' ``ForCausalLMLoss`` computes, through masked_loss.

    .. math::
        \text{loss} = \frac{1}{K} \sum_{t:\, y_{t+1} \ne \text{ignore\_index}}
        \big( \text{logsumexp}(x_t) - x_{t, y_{t+1}} \big)

    with K ``num_items_in_batch``, or else the number of terms. Neither a float32 copy of the
    logits nor a shifted one of the labels is made, and logits of ignored labels are never read::

        model.loss_function = causal_lm_loss

    A batch without any label has loss 0 (transformers: NaN) if ``num_items_in_batch`` is not given.
    With :func:`masked_loss.fuse_linear_loss` besides, there are no logits either.

    Where the model hands over the bounds of documents that are packed in a row, none predicts the
    first token of the next, and ``reduction="sequence_mean"`` is over documents. They are
    ``cu_seq_lens_q``, which ``DataCollatorWithFlattening(return_flash_attn_kwargs=True)`` and TRL's
    padding-free collator give, or else ``position_ids`` of the shape of the labels, where they are
    0 again; ``cu_seqlens=`` takes their place. Positions that are 0 everywhere say nothing, nor
    does the 0 after padding on the left, whose positions are 1. With ``shift_labels`` only
    ``"sequence_mean"`` looks at them, and if logits or labels are flattened, the rows are those of
    the other.

    Args:
        logits: [..., T, V] floating.
        labels: [..., T] class indices; label t + 1 is the target of logits t. Not used if
            ``shift_labels`` is given.
        vocab_size: V.
        num_items_in_batch: what to divide by: the labels of the whole accumulated batch. A number
            or a tensor of one element, on any device.
        ignore_index: a label with this value does not count.
        shift_labels: [..., T] labels that are shifted already: label t is the target of logits t.
        kwargs: ``mask`` ([..., T], aligned with the labels), and every keyword of
            :func:`masked_loss.masked_cross_entropy` but ``return_stats``; ``weight`` is
            ``class_weight``. ``normalizer`` takes the place of ``num_items_in_batch``, and
            ``shift=False`` that of ``shift_labels``. What else models hand over by themselves, the
            names in ``FROM_MODELS``, is ignored; every other keyword is an error.

    Returns:
        The loss, a 0-dim float32 tensor (float64 for float64 logits); [..., T] with
        ``reduction="none"``.

    Raises:
        TypeError: a keyword that is not known.
        ValueError: shapes that do not fit, no labels, keywords that contradict each other.

    Source: https://github.com/huggingface/transformers/blob/main/src/transformers/loss/loss_utils.py

    >>> import torch
    >>> from masked_loss.integrations.transformers import causal_lm_loss
    >>> causal_lm_loss(torch.zeros(1, 3, 8), torch.tensor([[1, 2, -100]]), vocab_size=8)
    tensor(2.0794)
    >>> from functools import partial
    >>> smoothed = partial(causal_lm_loss, label_smoothing=0.1)  # also a model.loss_function
    """
    options = _options_of(kwargs)
    mask = options.pop("mask", None)
    shift = options.pop("shift", shift_labels is None)
    if shift and shift_labels is not None:
        raise ValueError(f"{_WHO}: shift_labels are shifted already, got shift={shift} besides")
    target = labels if shift_labels is None else shift_labels
    if target is None:
        raise ValueError(f"{_WHO}: labels or shift_labels must be given, got None for both")
    if logits.shape[-1] != vocab_size:
        raise ValueError(
            f"{_WHO}: logits must have shape [..., {vocab_size}] (vocab_size), "
            f"got {list(logits.shape)}"
        )
    normalizer = _normalizer_of(num_items_in_batch, options, logits.device)
    target = target.to(logits.device)
    if not shift:
        logits, target, mask = _in_rows(logits, target, mask, options)
    if "cu_seqlens" not in options and (shift or options.get("reduction") == "sequence_mean"):
        options["cu_seqlens"] = _documents(target, kwargs)
    names = {"target": "labels" if shift_labels is None else "shift_labels"}
    names |= {known: name for name, known in _RENAMED.items() if name in kwargs}
    if num_items_in_batch is not None:
        names["normalizer"] = "num_items_in_batch"
    with speaking_for(_WHO, "masked_cross_entropy", names):
        loss: Tensor = masked_cross_entropy(
            logits,
            target,
            mask if mask is None else mask.to(logits.device),
            normalizer=normalizer,
            ignore_index=ignore_index,
            shift=shift,
            **options,
        )
    return loss


def _options_of(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keywords of the loss among those that a model, or functools.partial, hands over."""
    options: dict[str, Any] = {}
    for name, value in kwargs.items():
        known = _RENAMED.get(name, name)
        if name in FROM_MODELS:
            continue
        if known != "mask" and known not in _OPTIONS:
            expected = ", ".join(sorted({"mask", *_RENAMED, *_OPTIONS}))
            raise TypeError(
                f"{_WHO}: got {name}=, which is neither a keyword of the loss ({expected}) nor one "
                "that models hand over by themselves (FROM_MODELS)"
            )
        if value is not None and known in options:
            raise ValueError(f"{_WHO}: weight and class_weight are the same, got both")
        if value is not None:
            options[known] = value
    return options


def _in_rows(
    logits: Tensor, target: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One of logits and target may be flattened: both in the shape of the other, whose rows are
    sequences."""
    shapes = (logits.shape[:-1], target.shape)
    if shapes[0] == shapes[1] or prod(shapes[0]) != prod(shapes[1]):  # an error, if at all
        return logits, target, mask
    if len(shapes[0]) == len(shapes[1]) and options.get("reduction") == "sequence_mean":
        raise ValueError(
            f"{_WHO}: logits and labels must have the same rows for reduction='sequence_mean', "
            f"got {list(logits.shape)} and {list(target.shape)}"
        )
    shape = max(shapes, key=len)
    logits, target = logits.reshape(*shape, logits.shape[-1]), target.reshape(shape)
    if mask is not None and mask.numel() == target.numel():
        mask = mask.reshape(shape)
    return logits, target, mask


def _documents(target: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
    """The bounds of packed documents, if the model has handed them over."""
    bounds, positions = kwargs.get("cu_seq_lens_q"), kwargs.get("position_ids")
    if bounds is not None:
        return bounds.to(target.device)
    # Positions of other shapes are not those of text in a row: images have several for each token.
    if positions is None or not target.dim():
        return None
    if positions.shape not in (target.shape, target[:1].shape, target.shape[-1:]):
        return None
    numbers = _numbers_of_documents(positions.to(target.device)).expand(target.shape)
    # No more documents than tokens: so nobody waits to hear how many there are.
    return cu_seqlens(segment_ids=numbers, max_sequences=target.numel())


def _numbers_of_documents(positions: Tensor) -> Tensor:
    """[..., T], of each token in its row: a document begins at position 0."""
    # Padding on the left is at position 1, before the row's own first token: 1, 1, 0, 1, 2.
    padding = torch.nn.functional.pad((positions == 1).cumprod(-1), (1, 0))[..., :-1]
    # Positions that are 0 everywhere are no positions.
    begins = (positions == 0) & (padding == 0) & positions.any(-1, keepdim=True)
    return begins.cumsum(-1)


def _normalizer_of(
    items: Tensor | float | None, options: dict[str, Any], device: torch.device
) -> Tensor | float | None:
    given: Tensor | float | None = options.pop("normalizer", None)
    if items is None:
        return given
    if given is not None:
        raise ValueError(f"{_WHO}: num_items_in_batch and normalizer must not both be given")
    if options.get("reduction", "mean") not in ("mean", "sum"):
        raise ValueError(
            f"{_WHO}: reduction must be 'mean' or 'sum' with num_items_in_batch, which counts "
            f"tokens, got {options['reduction']!r}"
        )
    if not isinstance(items, Tensor):
        return items
    return one_element(_WHO, items).to(device, torch.float64)


def one_element(who: str, items: Tensor) -> Tensor:
    """num_items_in_batch, which trainers hold in any shape, without dimensions."""
    if items.numel() != 1:
        raise ValueError(
            f"{who}: num_items_in_batch must have one element, got {list(items.shape)}"
        )
    return items.reshape(())
