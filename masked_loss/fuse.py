# SPDX-License-Identifier: BSD-3-Clause
"""The loss of a causal language model without its logits, and without a patch to the model.

The output head returns a tensor that stands for its logits (_lazy_logits.py), and the cross entropy
at the end becomes :func:`masked_loss.linear_cross_entropy`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from masked_loss._lazy_logits import DenseLogits, LazyLogits, Parts

__all__ = ["DenseLogits", "FusedLinear", "LazyLogits", "fuse_linear_loss", "unfuse"]

_Model = TypeVar("_Model", bound=nn.Module)
_WHO = "fuse_linear_loss"

# Names that models give to their head, tried where there is no get_output_embeddings().
_HEADS = ("lm_head", "output", "head", "embed_out", "unembed")
_WRAPPERS = ("module", "_orig_mod")  # DistributedDataParallel, torch.compile


class FusedLinear(nn.Linear):
    """An output head that returns :class:`LazyLogits`, with the parameters of ``nn.Linear``."""

    fuse: bool = True

    def forward(self, input: Tensor) -> Tensor:
        if not self.fuse:
            return F.linear(input, self.weight, self.bias)
        if torch.compiler.is_dynamo_compiling():
            return F.linear(input, self.weight, self.bias).as_subclass(DenseLogits)
        tensors: Sequence[Tensor] = tuple(
            x for x in (input, self.weight, self.bias) if x is not None
        )
        plain = all(type(x) in (Tensor, nn.Parameter) and not x.is_meta for x in tensors)
        if (
            not plain
            or torch._C._get_tracing_state() is not None
            or torch._C._are_functorch_transforms_active()
        ):
            return F.linear(input, self.weight, self.bias)
        if _is_sharded_alone(self):
            _say_once(
                f"{_WHO}: FSDP frees the weight of the head, {type(self).__name__}, after its "
                "forward: its logits are computed. Shard it with the module around it instead"
            )
            return F.linear(input, self.weight, self.bias).as_subclass(DenseLogits)
        kind = input.device.type
        hidden: Tensor = input
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            hidden, weight = _autocast(hidden, dtype), _autocast(weight, dtype)
            bias = None if bias is None else _autocast(bias, dtype)
        fits = hidden.dim() > 0 and hidden.shape[-1] == weight.shape[1]
        if not fits or hidden.dtype != weight.dtype or hidden.device != weight.device:
            return F.linear(input, self.weight, self.bias)  # says what is wrong
        return LazyLogits._make(Parts(hidden, weight, bias, dtype=hidden.dtype))


def _autocast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(dtype)


def _is_sharded_alone(head: nn.Module) -> bool:
    return type(head) is not FusedLinear and any(
        c.__name__ == "FSDPModule" for c in type(head).__mro__
    )


def _make_dense(module: nn.Module, args: Any, output: Any) -> Any:
    """The forward hook of a head that is more than a product."""
    if type(output) is not Tensor or torch._C._get_tracing_state() is not None:
        return output
    return output.as_subclass(DenseLogits)


_said: set[str] = set()


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        warnings.warn(message, UserWarning, stacklevel=3)


def _head_of(model: nn.Module) -> nn.Module:
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    if isinstance(head, nn.Module):
        return head
    for name in _HEADS:
        head = getattr(model, name, None)
        if isinstance(head, nn.Module) and hasattr(head, "weight"):
            return head
    for name in _WRAPPERS:
        inner = getattr(model, name, None)
        if isinstance(inner, nn.Module):
            return _head_of(inner)
    raise ValueError(
        f"{_WHO}: model must have get_output_embeddings() or an output head named "
        f"{', '.join(_HEADS)}, got {type(model).__name__} with "
        f"{', '.join(name for name, _ in model.named_children()) or 'no modules'}"
    )


def _heads(model: nn.Module) -> list[nn.Module]:
    """The head, or those that PEFT keeps in its place (``modules_to_save``)."""
    head = _head_of(model)
    saved, original = getattr(head, "modules_to_save", None), getattr(head, "original_module", None)
    if isinstance(saved, nn.ModuleDict) and isinstance(original, nn.Module):
        return [original, *saved.values()]
    return [head]


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

    What differs: the loss is that of :func:`masked_loss.cross_entropy`, so a batch without any
    active token has loss 0 instead of NaN, and half-precision logits have a float32 loss. Logits
    first looked at after ``optimizer.step()`` raise a ``RuntimeError``, for the head has changed.

    Args:
        model: transformers' ``*ForCausalLM`` or any module with ``get_output_embeddings()`` or
            an ``lm_head``; wrapped by DistributedDataParallel, PEFT or ``torch.compile`` or not.

    Returns:
        The same model.

    Raises:
        ValueError: no output head was found.
        TypeError: model is not a module.

    Source: https://github.com/masked-loss/masked_loss/blob/main/masked_loss/fuse.py, and
    docs/recipes.md for trainers.

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
    if not isinstance(model, nn.Module):
        raise TypeError(f"{_WHO}: model must be a torch.nn.Module, got {type(model).__name__}")
    for head in _heads(model):
        if isinstance(head, FusedLinear):
            head.fuse = True
        elif type(head) is nn.Linear and "forward" not in vars(head):
            head.__class__ = FusedLinear
        elif _make_dense not in head._forward_hooks.values():
            _say_once(
                f"{_WHO}: the head is a {type(head).__module__}.{type(head).__qualname__}, more "
                "than a torch.nn.Linear: its logits are computed, only the loss is masked_loss's"
            )
            head.register_forward_hook(_make_dense)
    return model


def unfuse(model: _Model) -> _Model:
    """Undoes :func:`fuse_linear_loss`: the head computes its logits again.

    Args:
        model: the model given to :func:`fuse_linear_loss`, or one wrapped around it.

    Returns:
        The same model.

    Raises:
        ValueError: no output head was found.

    Source: https://github.com/masked-loss/masked_loss/blob/main/masked_loss/fuse.py

    >>> import torch, masked_loss
    >>> model = torch.nn.Sequential()
    >>> model.lm_head = torch.nn.Linear(4, 9)
    >>> type(masked_loss.unfuse(masked_loss.fuse_linear_loss(model)).lm_head).__name__
    'Linear'
    """
    for head in _heads(model):
        if type(head) is FusedLinear:
            vars(head).pop("fuse", None)
            head.__class__ = nn.Linear  # type: ignore[assignment]
        elif isinstance(head, FusedLinear):
            head.fuse = False
        for key, hook in list(head._forward_hooks.items()):
            if hook is _make_dense:
                del head._forward_hooks[key]
    return model
