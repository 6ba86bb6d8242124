# SPDX-License-Identifier: BSD-3-Clause
"""The loss function of transformers' causal language models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from masked_loss.functional import masked_cross_entropy

__all__ = ["causal_lm_loss"]

_WHO = "causal_lm_loss"


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

    Args:
        logits: [..., T, V] floating.
        labels: [..., T] class indices; label t + 1 is the target of logits t. Not used if
            ``shift_labels`` is given.
        vocab_size: V.
        num_items_in_batch: what to divide by: the labels of the whole accumulated batch. A number
            or a tensor of one element, on any device.
        ignore_index: a label with this value does not count.
        shift_labels: [..., T] labels that are shifted already: label t is the target of logits t.
        kwargs: ``mask`` ([..., T], aligned with the labels), ``label_smoothing``, ``z_loss`` and
            ``class_weight`` are those of :func:`masked_loss.masked_cross_entropy`; what else a
            model passes on to its loss function is not for a loss and is ignored, as transformers
            does.

    Returns:
        The loss, a 0-dim float32 tensor (float64 for float64 logits).

    Raises:
        ValueError: shapes that do not fit, no labels.

    Source: https://github.com/huggingface/transformers/blob/main/src/transformers/loss/loss_utils.py

    >>> import torch
    >>> from masked_loss.integrations.transformers import causal_lm_loss
    >>> causal_lm_loss(torch.zeros(1, 3, 8), torch.tensor([[1, 2, -100]]), vocab_size=8)
    tensor(2.0794)
    >>> from functools import partial
    >>> smoothed = partial(causal_lm_loss, label_smoothing=0.1)  # also a model.loss_function
    """
    shift = shift_labels is None
    target = labels if shift_labels is None else shift_labels
    if target is None:
        raise ValueError(f"{_WHO}: labels or shift_labels must be given, got None for both")
    if logits.shape[-1] != vocab_size:
        raise ValueError(
            f"{_WHO}: logits must have shape [..., {vocab_size}] (vocab_size), "
            f"got {list(logits.shape)}"
        )
    options = {
        name: kwargs[name]
        for name in ("label_smoothing", "z_loss", "class_weight")
        if kwargs.get(name) is not None
    }
    mask = kwargs.get("mask")
    target = target.to(logits.device)
    if not shift and logits.shape[:-1] != target.shape:
        logits, target = logits.reshape(-1, vocab_size), target.reshape(-1)
        mask = None if mask is None else mask.reshape(-1)
    normalizer: Tensor | float | None = num_items_in_batch
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(
                f"{_WHO}: num_items_in_batch must have one element, got {list(normalizer.shape)}"
            )
        normalizer = normalizer.reshape(()).to(logits.device, torch.float64)
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
