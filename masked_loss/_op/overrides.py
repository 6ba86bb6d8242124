# SPDX-License-Identifier: BSD-3-Clause
"""How a public function lets a tensor subclass or a mode answer, or takes apart jagged tensors and
DTensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from masked_loss._op import jagged
from masked_loss._op.arguments import is_distributed


def is_overridden(*tensors: Any) -> bool:
    """Whether :func:`override` gives the results of a call with these arguments."""
    if has_torch_function(tensors) and not torch.compiler.is_compiling():
        return True
    for x in tensors:
        if x is None or (type(x) is Tensor and not x.is_nested):  # mostly, and told by no call
            continue
        if is_distributed(x) or jagged.is_jagged(x):
            return True
    return False


def _has_torch_function(arguments: dict[str, Any]) -> bool:
    if torch.compiler.is_compiling():
        return False
    return has_torch_function(tuple(x for x in arguments.values() if isinstance(x, Tensor)))


def override(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """What ``function`` gives for these arguments by name, where they are more than plain tensors.

    Those that its signature takes by position are handed on to ``__torch_function__`` by position.
    """
    with torch._C.DisableTorchFunctionSubclass():  # lazy logits are not to be asked
        nested = any(map(jagged.is_jagged, arguments.values()))
    if nested:
        return jagged.call(function, arguments)
    if any(map(is_distributed, arguments.values())) and not _has_torch_function(arguments):
        from masked_loss import _dtensor

        return _dtensor.call(function, arguments)
    parameters = inspect.signature(function).parameters.values()
    args = [arguments[p.name] for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    kwargs = {p.name: arguments[p.name] for p in parameters if p.kind is p.KEYWORD_ONLY}
    relevant = [x for x in arguments.values() if isinstance(x, Tensor)]
    return handle_torch_function(function, relevant, *args, **kwargs)
