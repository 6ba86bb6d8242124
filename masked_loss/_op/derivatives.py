# SPDX-License-Identifier: BSD-3-Clause
"""From the formulas of a loss to a function with derivatives of every order and mode.

A loss and its gradient are kernels. Every other derivative, and forward mode as a whole, is that of
the specification in reference.py, which PyTorch differentiates as often as one likes;
docs/semantics.md says what that costs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from masked_loss._op.autograd import (
    Inputs,
    are_plain,
    is_forward_mode,
    is_transformed,
    only_innermost_differentiates,
    restore_vmap,
    transforms_are_active,
)

Tensors = tuple[Tensor, ...]


class Formulas(NamedTuple):
    """A loss as autograd needs it: functions of its tensors and of ``how``, everything else.

    ``forward(inputs, how)`` gives the results, and after them what backward needs besides.
    ``save(inputs, outputs, how)`` says what is kept for backward: the inputs in their order, None
    for those that backward can do without, and then what it likes.
    ``backward(saved, how, upstream, needs, plain)`` gives one gradient, or None, for each input.
    An upstream gradient is None where a result is not used; ``needs`` says which gradients are
    asked for; ``plain``: nobody looks at what is saved again unless the graph is kept, so its
    memory may be used.
    ``reference(saved, how)`` gives the results by functions of PyTorch; of the inputs, or of what
    was saved, then only those with a derivative.
    ``complete(saved, how)`` finds the inputs that were not kept, where ``reference`` needs them.
    """

    name: str
    forward: Callable[[Inputs, Any], Tensors]
    save: Callable[[Inputs, Tensors, Any], Inputs]
    backward: Callable[..., Inputs]
    reference: Callable[[Inputs, Any], Tensors]
    results: int = 1  # of what forward gives, for the caller
    differentiable: int = 1  # of these, the first ones that have a derivative
    complete: Callable[[Inputs, Any], Inputs] = lambda saved, how: saved


class _Constant:
    """What is no tensor, and nothing that torch.func looks into for tensors."""

    def __init__(self, value: Any) -> None:
        self.value = value


def differentiable(formulas: Formulas) -> Callable[..., Tensors]:
    """The function of ``(*inputs, how)`` that autograd and torch.func differentiate.

    torch.func needs a Function whose setup_context stands apart. PyTorch binds the arguments of
    such a one by inspecting its signature at each call, which takes longer than a small loss; so
    plain autograd gets one that is made the old way.

    Forward mode gets no Function, but the reference: within a jvp PyTorch switches forward mode off
    for the levels around it too, whose terms would be lost without a word.
    """
    name, forward, save, backward, reference, results, smooth, complete = formulas
    gradient = _gradient(formulas)

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
        ctx.how = args[-1].value
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[smooth:])
        ctx.save_for_backward(*save(args[:-1], output, ctx.how))

    def gradients(ctx: Any, *upstream: Tensor | None) -> Any:
        upstream, needs = upstream[:smooth], ctx.needs_input_grad[:-1]
        if upstream[0] is None and all(g is None for g in upstream):
            return (None,) * len(ctx.needs_input_grad)
        saved = ctx.saved_tensors
        if not (torch.is_grad_enabled() or is_forward_mode()):
            plain = are_plain(saved[0], *upstream)
            return (*backward(saved, ctx.how, upstream, needs, plain), None)
        return (*gradient(complete(saved, ctx.how), ctx.how, upstream, needs), None)

    eager: Any = _function(name, forward=forward_with_context, backward=gradients)
    transformed = _Transformed(
        name,
        forward=lambda *args: forward(args[:-1], args[-1].value),
        setup_context=setup_transformed,
        backward=gradients,
    )
    apply_eager = super(torch.autograd.Function, eager).apply  # what Function.apply comes down to

    def call(*args: Any) -> Any:
        if not is_transformed():
            return apply_eager(*args)
        if is_forward_mode():
            return reference(args[:-1], args[-1])
        return transformed(*args[:-1], _Constant(args[-1]))

    return call


def _function(name: str, **methods: Any) -> Any:
    statics = {key: staticmethod(method) for key, method in methods.items()}
    return type(name, (torch.autograd.Function,), statics)


class _Transformed:
    """A Function of tensors and a constant, for torch.func: with ``forward``, ``setup_context`` and
    ``backward``.

    The vmap rule that PyTorch generates makes the batch differentiable. Where nothing around the
    innermost transform differentiates, forward alone is enough, and takes a third of the time.
    """

    def __init__(self, name: str, forward: Callable[..., Any], **methods: Any) -> None:
        def batched(info: Any, in_dims: Any, *args: Any) -> Any:
            *tensors, constant = args
            run = restore_vmap(
                lambda *xs: forward(*xs, constant), in_dims[:-1], info.batch_size, "error"
            )
            return run(*tensors)

        self._anywhere = _function(name, forward=forward, **methods)
        self._anywhere.generate_vmap_rule = True
        self._innermost = _function(name, forward=forward, vmap=batched, **methods)

    def __call__(self, *args: Any) -> Any:
        innermost = only_innermost_differentiates(*args[:-1])
        return (self._innermost if innermost else self._anywhere).apply(*args)


def _gradient(formulas: Formulas) -> Callable[..., Inputs]:
    """``backward`` of all that was saved, differentiable itself: its derivatives are those of
    ``pulled_back``, the same function by PyTorch."""
    backward, reference, smooth = formulas.backward, formulas.reference, formulas.differentiable

    def pulled_back(saved: Inputs, how: Any, upstream: Inputs, needs: tuple[bool, ...]) -> Tensors:
        """The gradients that are needed."""
        at = [i for i, needed in enumerate(needs) if needed]
        used = [k for k, g in enumerate(upstream) if g is not None]

        def results(*inputs: Tensor) -> Tensors:
            values = reference(_with(saved, at, inputs), how)
            return tuple(values[k] for k in used)

        return vjp(results, [saved[i] for i in at], tuple(upstream[k] for k in used))

    # Of what was saved, the upstream gradients, and a constant: how, and what is needed.

    def forward(*args: Any) -> Any:
        saved, upstream, how, needs = _split(args, smooth)
        results = backward(saved, how, upstream, needs, False)
        return tuple(r for r, needed in zip(results, needs, strict=True) if needed)

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.constant = inputs
        ctx.save_for_backward(*tensors)

    def second(ctx: Any, *cotangents: Any) -> Any:
        args = (*ctx.saved_tensors, ctx.constant)
        of = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]

        def results(*tensors: Tensor) -> Tensors:
            saved, upstream, how, needs = _split(_with(args, of, tensors), smooth)
            return pulled_back(saved, how, upstream, needs)

        return _with((None,) * len(args), of, vjp(results, [args[i] for i in of], cotangents))

    function = _Transformed(
        f"{formulas.name}Gradient", forward, setup_context=setup_context, backward=second
    )

    def gradient(saved: Inputs, how: Any, upstream: Inputs, needs: tuple[bool, ...]) -> Inputs:
        if is_forward_mode():
            found = pulled_back(saved, how, upstream, needs)
        else:
            found = function(*saved, *upstream, _Constant((how, needs)))
        at = [i for i, needed in enumerate(needs) if needed]
        return _with((None,) * len(needs), at, found)

    return gradient


def vjp(function: Callable[..., Tensors], inputs: list[Tensor], cotangents: Tensors) -> Tensors:
    """The gradients of a function's inputs, which are differentiable themselves.

    As torch.func.vjp does it, which torch.autograd.graph.saved_tensors_hooks does not go with;
    Dynamo, which traces the backward of compiled autograd, takes no other.
    """
    if transforms_are_active() or torch.compiler.is_compiling():
        return torch.func.vjp(function, *inputs)[1](cotangents)
    with torch.enable_grad():
        aliases = [x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in inputs]
        pairs = zip(function(*aliases), cotangents, strict=True)
    # A linear function's gradient depends on none of its inputs.
    some = [(y, g) for y, g in pairs if y.requires_grad]
    if not some:
        return tuple(map(torch.zeros_like, inputs))
    results, upstream = zip(*some, strict=True)
    return torch.autograd.grad(
        results, aliases, upstream, create_graph=torch.is_grad_enabled(), materialize_grads=True
    )


def _split(args: Any, smooth: int) -> Any:
    how, needs = args[-1].value
    return args[: -1 - smooth], args[-1 - smooth : -1], how, needs


def _with(values: Any, at: list[int], others: Any) -> tuple[Any, ...]:
    """``values``, but ``others`` at the places ``at``."""
    result = list(values)
    for i, other in zip(at, others, strict=True):
        result[i] = other
    return tuple(result)
