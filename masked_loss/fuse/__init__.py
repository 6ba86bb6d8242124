# SPDX-License-Identifier: BSD-3-Clause
"""The loss of a causal language model without its logits, and without a patch to the model.

The output head (head.py) returns a tensor that stands for its logits (lazy_logits.py), and the
cross entropy at the end becomes :func:`masked_loss.linear_cross_entropy` (losses.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from masked_loss.fuse.dense_logits import DenseLogits
from masked_loss.fuse.head import FusedLinear, heads_of, make_dense, say_once
from masked_loss.fuse.lazy_logits import WHO, LazyLogits, Uses

__all__ = [
    "DenseLogits",
    "FusedLinear",
    "Fusion",
    "LazyLogits",
    "fuse_linear_loss",
    "is_fused",
    "unfuse",
]
# Users meet these types in outputs and in pickles: they are named after where they are imported.
for _public in (DenseLogits, FusedLinear, LazyLogits):
    _public.__module__ = __name__

_Model = TypeVar("_Model", bound=nn.Module)


def fuse_linear_loss(model: _Model) -> _Model:
    r"""Lets a causal language model compute its loss without its logits.

    The model's output head, ``logits = hidden @ weight.T + bias``, returns :class:`LazyLogits`:
    a tensor that stands for logits not computed yet. The cross entropy that the model, or its
    trainer, computes from it becomes

    .. math::
        \text{loss} = \text{linear\_cross\_entropy}(\text{hidden}, \text{weight}, \text{target})

    which never holds the [tokens, V] logits nor their gradient, and computes nothing for targets
    that are ignored. Everything else that is done with the logits, ``generate()`` too, gets them.

    The model is changed in place: only the head's class changes, not its parameters nor their
    names. Checkpoints, ``deepcopy``, DistributedDataParallel, FSDP, autocast and gradient
    checkpointing work as before; a pickled model stays fused, and needs masked_loss. Under
    ``torch.compile`` the logits are computed, and the loss goes through masked_loss's kernel. So
    it does if the head is more than a linear module (LoRA on the head, a quantised head), about
    which a warning tells.

    A model that is compiled in parts, with a graph break between its head and its loss, fails in
    AOTAutograd, which takes no such subclass of Tensor into a graph ("Multiple dispatch failed"):
    call :func:`unfuse`, or compile head and loss together.

    Of a head that ``parallelize_module`` has shared out by ``ColwiseParallel``, each rank computes
    the loss from its rows, whether this is called before or after: a plan that gathers the logits
    (``output_layouts=Replicate()``) does not gather them any more.

    What differs: the loss is that of :func:`masked_loss.cross_entropy`, so a batch without any
    active token has loss 0 instead of NaN, and half-precision logits have a float32 loss. Logits
    first looked at after ``optimizer.step()`` raise a ``RuntimeError``, for the head has changed.
    That is noticed whoever has written into the head, since one element of each row is compared;
    what is not noticed is a write into single elements of a row, past PyTorch's version counter.

    A model that computes its loss from the logits all the same is reported by a warning, once, and
    :func:`is_fused` says what happened.

    Args:
        model: transformers' ``*ForCausalLM`` or any module with ``get_output_embeddings()`` or
            an ``lm_head``; wrapped by DistributedDataParallel, PEFT or ``torch.compile`` or not.

    Returns:
        The same model.

    Raises:
        ValueError: no output head was found.
        TypeError: model is not a module.

    Source: docs/recipes.md, which also has a line for each trainer.

    >>> import torch, masked_loss
    >>> class Model(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.embed = torch.nn.Embedding(100, 16)
    ...         self.lm_head = torch.nn.Linear(16, 100)
    ...     def forward(self, ids):
    ...         logits = self.lm_head(self.embed(ids))
    ...         loss = torch.nn.functional.cross_entropy(
    ...             logits[:, :-1].reshape(-1, 100), ids[:, 1:].reshape(-1))
    ...         return loss, logits
    >>> model = masked_loss.fuse_linear_loss(Model())
    >>> loss, logits = model(torch.tensor([[1, 2, 3]]))
    >>> loss.dim(), logits.shape, type(logits).__name__
    (0, torch.Size([1, 3, 100]), 'LazyLogits')
    >>> model = masked_loss.unfuse(model)
    """
    _require_module(WHO, model)
    for head in heads_of(model):
        if isinstance(head, FusedLinear):
            head.fuse = True
        elif type(head) is nn.Linear and "forward" not in vars(head):
            head.__class__ = FusedLinear
        elif make_dense not in head._forward_hooks.values():
            kind = f"{type(head).__module__}.{type(head).__qualname__}"
            if type(head) is nn.Linear:
                kind = "torch.nn.Linear whose forward was replaced (tensor parallelism, hooks?)"
            say_once(
                f"{WHO}: the head is a {kind}, more than a torch.nn.Linear: its logits are "
                "computed, only the loss is masked_loss's"
            )
            head.register_forward_hook(make_dense)
    if _tell_of_logits not in model._forward_hooks.values():
        model.register_forward_hook(_tell_of_logits)
    return model


def unfuse(model: _Model) -> _Model:
    """Undoes :func:`fuse_linear_loss`: the head computes its logits again.

    Args:
        model: the model given to :func:`fuse_linear_loss`, or one wrapped around it.

    Returns:
        The same model.

    Raises:
        ValueError: no output head was found.
        TypeError: model is not a module.

    Source: docs/recipes.md.

    >>> import torch, masked_loss
    >>> model = torch.nn.Sequential()
    >>> model.lm_head = torch.nn.Linear(4, 9)
    >>> type(masked_loss.unfuse(masked_loss.fuse_linear_loss(model)).lm_head).__name__
    'Linear'
    """
    _require_module("unfuse", model)
    for head in heads_of(model, "unfuse"):
        if type(head) is FusedLinear:
            for name in ("fuse", "uses"):
                vars(head).pop(name, None)
            head.__class__ = nn.Linear  # type: ignore[assignment]
        elif isinstance(head, FusedLinear):
            head.fuse = False
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if hook in (make_dense, _tell_of_logits):
                del module._forward_hooks[key]
    return model


def _require_module(who: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who}: model must be a torch.nn.Module, got {type(model).__name__}")


def _tell_of_logits(model: nn.Module, args: Any, output: Any) -> None:
    """The forward hook of a fused model: its loss should not have come from computed logits."""
    if torch.compiler.is_compiling() or not isinstance(getattr(output, "loss", None), Tensor):
        return
    for head in heads_of(model):
        uses = getattr(head, "uses", None)
        if isinstance(head, FusedLinear) and uses and uses.wasted:
            say_once(
                f"{WHO}: {type(model).__name__} has computed its loss from logits, which "
                f"{uses.reason} asked for: nothing is gained"
            )


@dataclass(frozen=True)
class Fusion:
    """What :func:`fuse_linear_loss` did to a model; true if the loss needs no logits."""

    fused: bool  # the head returns LazyLogits
    head: str  # the type of the head
    losses: int  # computed without logits, since the last forward
    logits: str | None  # why the logits of the last forward were computed; None: they were not

    def __bool__(self) -> bool:
        return self.fused


def is_fused(model: nn.Module) -> Fusion:
    """Whether a model's loss is computed without its logits, and what the last forward did.

    Args:
        model: the model given to :func:`fuse_linear_loss`, or one wrapped around it.

    Returns:
        :class:`Fusion`, which is true in an ``if`` when the head returns :class:`LazyLogits`, and
        the last forward that could be trained on has not computed its logits instead of a fused
        loss. Its fields: ``fused``, that is this answer; ``head``, the head's type; ``losses``,
        how many losses were computed from the hidden states of the last forward; ``logits``, the
        function that asked for the logits themselves, if any did.

    Raises:
        ValueError: no output head was found.
        TypeError: model is not a module.

    Source: docs/recipes.md.

    >>> import torch, masked_loss
    >>> model = torch.nn.Module()
    >>> model.lm_head = torch.nn.Linear(4, 9)
    >>> bool(masked_loss.is_fused(model))
    False
    >>> bool(masked_loss.is_fused(masked_loss.fuse_linear_loss(model)))
    True
    >>> logits = model.lm_head(torch.randn(3, 4))
    >>> loss = torch.nn.functional.cross_entropy(logits, torch.tensor([1, 0, 2]))
    >>> masked_loss.is_fused(model)
    Fusion(fused=True, head='FusedLinear', losses=1, logits=None)
    >>> total = model.lm_head(torch.randn(3, 4)).relu().sum()
    >>> masked_loss.is_fused(model)
    Fusion(fused=False, head='FusedLinear', losses=0, logits='relu')
    """
    _require_module("is_fused", model)
    found = heads_of(model, "is_fused")
    # Of PEFT's copies, the one that the last forward went through.
    head = next((h for h in found if getattr(h, "uses", None) is not None), found[-1])
    uses = getattr(head, "uses", None) or Uses()
    fuses = isinstance(head, FusedLinear) and head.fuse and not uses.wasted
    return Fusion(fuses, type(head).__name__, uses.losses, uses.reason)
