# SPDX-License-Identifier: BSD-3-Clause
"""Tensors for logits that a head had to compute: only their cross entropy is another one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from masked_loss.functional import cross_entropy
from masked_loss.fuse.parts import ADD, ARRANGE, CAST, DIVIDE, MULTIPLY, TANH

_KEEPS_KIND = ARRANGE | MULTIPLY | DIVIDE | ADD | TANH | frozenset((*CAST, Tensor.to))


class DenseLogits(Tensor):
    """Computed logits whose cross entropy is masked_loss's: for heads that are more than a product.

    What changes the arrangement or the scale of logits gives another one of these, everything else
    plain tensors. torch.compile traces through it.
    """

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.cross_entropy:
            func = cross_entropy
        if torch.compiler.is_compiling() and func in _KEEPS_KIND:
            return super().__torch_function__(func, types, args, kwargs)
        if getattr(func, "__name__", "") in ("__reduce_ex__", "__deepcopy__", "__repr__"):
            return func(args[0].as_subclass(Tensor), *args[1:], **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            keeps = func in _KEEPS_KIND and type(result) is Tensor
            return result.as_subclass(DenseLogits) if keeps else result
