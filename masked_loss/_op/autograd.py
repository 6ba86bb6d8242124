# SPDX-License-Identifier: BSD-3-Clause
"""What PyTorch is asked about a call, by private functions of torch where it has no others.

So are a dispatch key kept out (factory.py, linear_chunks.py, checks.py) and a subclass left alone
(overrides.py, ../fuse/).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.vmap import restore_vmap as restore_vmap
from torch.autograd import forward_ad

Inputs = tuple[Any, ...]
"""Tensors, and None for those that are not given."""
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)

below_autograd: Callable[[], Any] = torch._C._AutoDispatchBelowAutograd
transforms_are_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
"""Whether a torch.func transform is running, vmap included."""
_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
_INFRA_MODES = (
    torch._C._TorchDispatchModeKey.FAKE,
    torch._C._TorchDispatchModeKey.PROXY,
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
)
_is_legacy_batch: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor
_is_wrapped: Callable[[Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor
_unwrapped: Callable[[Tensor], Tensor] = torch._C._functorch.get_unwrapped
_Transform: Any = torch._C._functorch.TransformType


def are_plain(*tensors: Tensor | None) -> bool:
    """Eager and real: not traced, no subclass, no batch under a torch.func transform or vmap.

    Under compiled autograd a backward is traced by Dynamo, which stands in no dispatch mode.
    """
    if torch.compiler.is_compiling() or transforms_are_active() or _modes():
        return False
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN_TYPES:
            return False
        if _is_legacy_batch(tensor):  # of torch.autograd's own vmap
            return False
    return True


def is_traced(*tensors: Tensor | None) -> bool:
    """Whether a call is to be one node, of a graph or of a transform; not under modes that look on,
    as torch.distributed's CommDebugMode does.

    So is one on meta, which has nothing to exchange, or on several devices: the operator says that.
    """
    if torch.compiler.is_compiling() or transforms_are_active():
        return True
    if any(torch._C._get_dispatch_mode(key) is not None for key in _INFRA_MODES):
        return True
    given = [x for x in tensors if x is not None]
    return any(
        type(x) not in _PLAIN_TYPES or x.is_meta or x.device != given[0].device for x in given
    )


def keeps_graph() -> bool:
    """Whether the backward that runs now may be followed by another one (retain_graph)."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def may_require_grad(tensor: Tensor | None) -> bool:
    if tensor is None:
        return False
    if tensor.requires_grad:
        return True
    # Inside a transform a tensor does not tell whether it requires grad outside.
    while _is_wrapped(tensor):
        tensor = _unwrapped(tensor)
        if tensor.requires_grad:
            return True
    return False


def kept_mask(mask: Tensor | None) -> Tensor | None:
    """What a loss keeps of its mask for backward: the weights are in the table of tokens."""
    return mask if may_require_grad(mask) else None


def is_differentiated(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
        if transforms_are_active() and any(map(may_require_grad, tensors)):
            return True
    return is_forward_mode()


def is_transformed() -> bool:
    """Whether anything but plain autograd may look at a call: torch.func, or forward mode."""
    return forward_ad._current_level >= 0 or transforms_are_active()


def is_forward_mode() -> bool:
    """Whether a tensor may have a tangent: one of torch.autograd.forward_ad or of torch.func.jvp.

    A compiled graph that is traced enters the latter without the former.
    """
    if forward_ad._current_level >= 0:
        return True
    return transforms_are_active() and _is_within(_Transform.Jvp)


def only_innermost_differentiates(*tensors: Tensor | None) -> bool:
    """Whether the innermost transform differentiates, and neither a transform around it nor plain
    autograd differentiates these tensors: then nobody asks for the derivative of a gradient."""
    innermost = torch._C._functorch.peek_interpreter_stack() if transforms_are_active() else None
    if innermost is None or innermost.key() != _Transform.Grad:
        return False
    level = innermost.level()
    for tensor in tensors:
        if tensor is not None and torch._C._functorch.maybe_get_level(tensor) == level:
            tensor = _unwrapped(tensor)
        if may_require_grad(tensor):
            return False
    return True


def _is_within(transform: Any) -> bool:
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() == transform for level in levels)
