# SPDX-License-Identifier: BSD-3-Clause
"""What PyTorch is asked about a call, and how it is given the formulas of a loss.

Private functions of torch are used in this file and in factory.py only, each in one place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Inputs = tuple[Any, ...]
"""Tensors, and None for those that are not given."""
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)

below_autograd: Callable[[], Any] = torch._C._AutoDispatchBelowAutograd
transforms_are_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
"""Whether a torch.func transform is running, vmap included."""
_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
_is_legacy_batch: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor


def are_plain(*tensors: Tensor | None) -> bool:
    """Eager and real: not traced, no subclass, no batch under a torch.func transform or vmap."""
    if transforms_are_active() or _modes():
        return False
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN_TYPES:
            return False
        if _is_legacy_batch(tensor):  # of torch.autograd's own vmap
            return False
    return True


def keeps_graph() -> bool:
    """Whether the backward that runs now may be followed by another one (retain_graph)."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def may_require_grad(tensor: Tensor | None) -> bool:
    if tensor is None:
        return False
    if tensor.requires_grad:
        return True
    # Inside vmap a tensor does not tell whether it requires grad outside.
    return tensor.is_floating_point() and transforms_are_active()


def is_differentiated(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled() and any(map(may_require_grad, tensors)):
        return True
    return torch.autograd.forward_ad._current_level >= 0


class Formulas(NamedTuple):
    """A loss as autograd needs it: functions of its tensors and of ``how``, everything else.

    ``forward(inputs, how)`` gives the results, and after them what backward needs besides.
    ``save(inputs, outputs, how)`` says what is kept for backward.
    ``backward(saved, how, upstream, needs, plain)`` gives one gradient, or None, for each input.
    An upstream gradient is None where a result is not used; ``needs`` says which gradients are
    asked for; ``plain``: nobody looks at what is saved again unless the graph is kept, so its
    memory may be used.
    """

    name: str
    forward: Callable[[Inputs, Any], tuple[Tensor, ...]]
    save: Callable[[Inputs, tuple[Tensor, ...], Any], Inputs]
    backward: Callable[..., Inputs]
    results: int = 1  # of what forward gives, for the caller
    differentiable: int = 1  # of these, the first ones that have a derivative


class _Once(torch.autograd.Function):
    """Gradients as they are, whose own derivative, through whatever, is an error.

    ``args``: ``count`` gradients, and then what they depend on.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, count: int, *args: Tensor | None) -> Any:
        return tuple(g if g is None else g.view_as(g) for g in args[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(f"masked_loss: {ctx.name} cannot be differentiated twice")


def differentiable(formulas: Formulas) -> Callable[..., tuple[Tensor, ...]]:
    """The function of ``(*inputs, how)`` that autograd and torch.func differentiate, once.

    torch.func needs a Function whose setup_context stands apart. PyTorch binds the arguments of
    such a one by inspecting its signature at each call, which takes longer than a small loss; so
    plain autograd gets one that is made the old way.
    """
    name, forward, save, backward, results, smooth = formulas

    def forward_with_context(ctx: Any, *args: Any) -> Any:
        inputs = args[:-1]
        ctx.how = how = args[-1]
        output = forward(inputs, how)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*save(inputs, output, how))
        if results > smooth:
            ctx.mark_non_differentiable(*output[smooth:results])
        return output[:results]

    def setup_transformed(ctx: Any, args: Any, output: Any) -> None:
        ctx.how = args[-1]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[smooth:])
        ctx.save_for_backward(*save(args[:-1], output, ctx.how))

    def gradients(ctx: Any, *upstream: Tensor | None) -> Any:
        upstream, needs = upstream[:smooth], ctx.needs_input_grad[:-1]
        if upstream[0] is None and all(g is None for g in upstream):
            return (None,) * len(ctx.needs_input_grad)
        saved = ctx.saved_tensors
        plain = are_plain(saved[0], *upstream)
        if not torch.is_grad_enabled():
            return (*backward(saved, ctx.how, upstream, needs, plain), None)
        # once_differentiable lets these go where the upstream gradient is a constant, as that of
        # loss.sum() is, and under torch.func: a gradient penalty would silently count for nothing.
        with torch.no_grad():
            results = backward(saved, ctx.how, upstream, needs, plain)
        through = [t for t in (*saved, *upstream) if t is not None]
        return (*_Once.apply(name, len(results), *results, *through), None)

    eager: Any = type(
        name,
        (torch.autograd.Function,),
        {
            "forward": staticmethod(forward_with_context),
            "backward": staticmethod(gradients),
        },
    )
    transformed: Any = type(
        name,
        (torch.autograd.Function,),
        {
            "forward": staticmethod(lambda *args: forward(args[:-1], args[-1])),
            "setup_context": staticmethod(setup_transformed),
            "backward": staticmethod(gradients),
            "generate_vmap_rule": True,
        },
    )

    apply_eager = super(torch.autograd.Function, eager).apply  # what Function.apply comes down to

    def call(*args: Any) -> Any:
        if not transforms_are_active():
            return apply_eager(*args)
        try:
            return transformed.apply(*args)
        except NotImplementedError as error:
            if "custom_function_call" not in str(error):
                raise
            raise NotImplementedError(
                "masked_loss: torch.func differentiates the functions of the package, such as "
                "masked_loss.masked_cross_entropy, but not torch.ops.masked_loss.*"
            ) from None

    return call
