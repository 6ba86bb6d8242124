# SPDX-License-Identifier: BSD-3-Clause
"""The operators as PyTorch sees them: fakes for tracing, formulas for autograd.

For each operator, in this order: fake, setup_context, backward, register. What an operator
computes is in csrc/; what a loss means to its caller is in functional.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from masked_loss import _checks
from masked_loss._checks import register_fake
from masked_loss._library import load
from masked_loss._memory import gradient_like

load()

ops = torch.ops.masked_loss
_library = torch.library.Library("masked_loss", "IMPL")

# Of the tables that forward leaves for backward, see csrc/kernels/args.h.
_TOKEN_FIELDS_SAVED, _TOKEN_FIELDS, _GROUP_FIELDS, _STATS = ops.table_sizes()


_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def _below_autograd() -> Any:
    return torch._C._AutoDispatchBelowAutograd()


def _are_plain(*tensors: Tensor) -> bool:
    """Eager and real: not traced, no subclass, no batch under a torch.func transform or vmap."""
    if torch._C._are_functorch_transforms_active():
        return False
    for tensor in tensors:
        if type(tensor) not in _PLAIN_TYPES:
            return False
        if torch._C._functorch.is_legacy_batchedtensor(tensor):  # of torch.autograd's own vmap
            return False
    return True


def _keeps_graph() -> bool:
    """Whether the backward that runs now may be followed by another one (retain_graph)."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


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


def differentiable(
    name: str,
    forward: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    results: int,
) -> Callable[..., Any]:
    """The function that calls ``forward`` and that autograd and torch.func differentiate, once.

    Of what ``forward`` returns, callers may use the first ``results``; only the very first has a
    derivative.

    torch.func needs a Function whose setup_context stands apart. PyTorch binds the arguments of
    such a one by inspecting its signature at each call, which takes longer than a small loss; so
    plain autograd gets one that is made the old way.
    """

    def forward_with_context(ctx: Any, *args: Any) -> Any:
        output = forward(*args)
        setup_context(ctx, args, output)
        if results > 1:
            ctx.mark_non_differentiable(*output[1:results])
        return output[:results]

    def setup_transformed(ctx: Any, args: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*output[1:])
        setup_context(ctx, args, output)

    def backward_once(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        # once_differentiable lets these go where the upstream gradient is a constant, as that of
        # loss.sum() is, and under torch.func: a gradient penalty would silently count for nothing.
        with torch.no_grad():
            gradients = backward(ctx, *grads)
        inputs = (*ctx.saved_tensors, *getattr(ctx, "inputs", ()), *grads)
        through = [t for t in inputs if t is not None]
        return _Once.apply(name, len(gradients), *gradients, *through)

    eager: Any = type(
        name,
        (torch.autograd.Function,),
        {
            "forward": staticmethod(forward_with_context),
            "backward": staticmethod(backward_once),
        },
    )
    transformed: Any = type(
        name,
        (torch.autograd.Function,),
        {
            "backward": staticmethod(backward_once),
            "forward": staticmethod(forward),
            "setup_context": staticmethod(setup_transformed),
            "generate_vmap_rule": True,
        },
    )

    apply_eager = super(torch.autograd.Function, eager).apply  # what Function.apply comes down to

    def call(*args: Any) -> Any:
        if not torch._C._are_functorch_transforms_active():
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


def may_require_grad(tensor: Tensor | None) -> bool:
    if tensor is None:
        return False
    if tensor.requires_grad:
        return True
    # Inside vmap a tensor does not tell whether it requires grad outside.
    return tensor.is_floating_point() and torch._C._are_functorch_transforms_active()


def _differentiated(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled() and any(map(may_require_grad, tensors)):
        return True
    return torch.autograd.forward_ad._current_level >= 0


def _loss_dtype(values: Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def _group_count(reduction: str, shape: torch.Size) -> int | torch.SymInt:
    # math.prod: torch.Size.numel() would make a symbolic size a constant.
    if reduction != "sequence_mean" or len(shape) == 0 or shape[-1] == 0:
        return 1
    return torch.sym_max(1, math.prod(shape[:-1]))


def _loop(op: Callable[..., Any]) -> Callable[..., Any]:
    """A vmap rule that calls ``op`` for each element: right for any operator."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        def element(i: int) -> Any:
            pairs = zip(args, in_dims, strict=True)
            return op(*(arg.select(dim, i) if isinstance(dim, int) else arg for arg, dim in pairs))

        results = [element(i) for i in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])

    return rule


# cross_entropy, cross_entropy_stats


def _fake_forward(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None,
    normalizer: Tensor | None,
    class_weight: Tensor | None,
    reduction: str,
    *options: Any,
) -> tuple[Tensor, ...]:
    _, label_smoothing, z_loss, softcap, shift, stats = options
    _checks.formula("cross_entropy", label_smoothing, z_loss, softcap)
    _checks.cross_entropy("cross_entropy", logits, target, mask, class_weight, shift)
    _checks.reduction("cross_entropy", reduction, logits.dim() - 1, normalizer)
    return _fake_tables(logits, reduction, stats)


def _fake_tables(logits: Tensor, reduction: str, stats: bool) -> tuple[Tensor, ...]:
    """loss, stats, tokens, groups"""
    shape = logits.shape[:-1]
    dtype = _loss_dtype(logits)
    fields = _TOKEN_FIELDS if stats else _TOKEN_FIELDS_SAVED
    return (
        logits.new_empty(shape if reduction == "none" else (), dtype=dtype),
        logits.new_empty((_STATS if stats else 0,), dtype=dtype),
        logits.new_empty((fields, math.prod(shape)), dtype=dtype),
        logits.new_empty((_group_count(reduction, shape), _GROUP_FIELDS), dtype=torch.float64),
    )


def _fake_gradient(values: Tensor) -> Tensor:
    return torch.empty_like(values, memory_format=torch.contiguous_format)


def _public(call: Callable[..., Any], stats: bool) -> Callable[..., Any]:
    """``call`` takes the arguments in forward's order; the public operators take them by name."""

    def operator(
        logits: Tensor,
        target: Tensor,
        mask: Tensor | None = None,
        *,
        reduction: str = "mean",
        normalizer: Tensor | None = None,
        ignore_index: int = -100,
        class_weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        shift: bool = False,
        inplace_backward: bool = False,
    ) -> Any:
        tensors = (logits, target, mask, normalizer, class_weight)
        options = (reduction, ignore_index, label_smoothing, z_loss, softcap, shift, stats)
        loss, *more = call(*tensors, *options)
        return (loss, more[0]) if stats else loss

    return operator


def _forward(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None,
    normalizer: Tensor | None,
    class_weight: Tensor | None,
    options: tuple[Any, ...],
    fused: bool,
    inplace: bool,
) -> tuple[Tensor, ...]:
    """loss, stats, tokens, groups; ``fused``: and the gradient for dloss = 1."""
    args = (logits, target, mask, normalizer, class_weight, *options)
    with _below_autograd():
        if not fused:
            return ops.cross_entropy_forward.default(*args)
        dlogits = gradient_like(logits)
        return (*ops.cross_entropy_fused.default(dlogits, *args), dlogits)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, mask, _, class_weight, options, _, ctx.inplace = inputs
    ctx.set_materialize_grads(False)
    wants_mask = may_require_grad(mask)
    ctx.save_for_backward(logits, target, mask if wants_mask else None, class_weight, *output[2:])
    _, _, label_smoothing, z_loss, softcap, shift, _ = options
    ctx.formula = (label_smoothing, z_loss, softcap, shift)


def _backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    wants_logits, _, wants_mask = ctx.needs_input_grad[:3]
    if dloss is None:
        return (None,) * 8
    logits, target, mask, class_weight, tokens, groups, *dlogits = ctx.saved_tensors
    formula = (dloss, logits, target, tokens, groups, class_weight, *ctx.formula)
    dmask = gradient = None
    with _below_autograd():
        if wants_mask:
            index = None if target.is_floating_point() else target
            dmask = ops.mask_grad.default(
                dloss, mask, tokens, groups, index, class_weight, ctx.formula[1]
            )
        if wants_logits and not _are_plain(logits, dloss):
            gradient = ops.cross_entropy_backward.default(*formula)
        elif wants_logits and ctx.inplace:
            ops.cross_entropy_backward_out.default(logits, *formula, False)
            torch.autograd.graph.increment_version(logits)
            gradient = logits.detach()
        elif wants_logits and dlogits and not _keeps_graph():
            (gradient,) = dlogits
            # On CUDA the operator looks at dloss itself: reading it here would wait for the device.
            if not dloss.is_cpu or dloss.item() != 1:
                ops.cross_entropy_backward_out.default(gradient, *formula, True)
        elif wants_logits:
            gradient = gradient_like(logits)
            ops.cross_entropy_backward_out.default(gradient, *formula, False)
    return gradient, None, dmask, None, None, None, None, None


# Without statistics one result: to hand out another takes a twentieth of a small loss's time.
CrossEntropy, CrossEntropyStats = (
    differentiable("CrossEntropy", _forward, _setup_context, _backward, results)
    for results in (1, 2)
)
"""Of the outputs only the loss is differentiable. ``fused`` reads the logits once instead of twice;
its gradient is for dloss = 1, and backward hands it over or, for another dloss, computes it anew
into the same memory: scaling it would round half types twice."""


def _require_writable(logits: Tensor) -> None:
    """Every logit has a place of its own, where the kernels find it: [batch, step, class].

    Here and not in csrc/ops/check.h: to write in place is autograd's affair, the forward kernels do
    not hear of it, and in backward it would be too late to say.
    """
    if logits.numel() == 0:
        return
    steps = logits.shape[-2] if logits.dim() > 1 else 1
    try:
        rows = logits.detach().view(-1, steps, logits.shape[-1])
        writable = rows.stride(-1) == 1 or rows.shape[-1] == 1
    except RuntimeError:  # the outer dimensions do not lie one inside the other
        writable, rows = False, logits
    reach = 1  # what lies inside the dimensions with smaller strides
    for stride, size in sorted(zip(rows.stride(), rows.shape, strict=True)):
        writable = writable and (size == 1 or stride >= reach)
        reach += stride * (size - 1)
    if not writable:
        raise RuntimeError(
            "ValueError: cross_entropy: inplace_backward needs logits whose classes are contiguous "
            f"and whose rows do not overlap, got shape {list(logits.shape)} with strides "
            f"{list(logits.stride())}"
        )


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None,
    normalizer: Tensor | None,
    class_weight: Tensor | None,
    *options: Any,
    inplace_backward: bool = False,
) -> tuple[Tensor, ...]:
    """loss, stats if asked for, perhaps more; straight to the kernels where nothing needs autograd.

    ``options``: reduction, ignore_index, label_smoothing, z_loss, softcap, shift, stats.
    """
    if not _differentiated(logits, mask):
        with _below_autograd():
            return ops.cross_entropy_forward.default(
                logits, target, mask, normalizer, class_weight, *options
            )
    plain = _are_plain(logits)
    inplace = inplace_backward and plain
    if inplace:
        _require_writable(logits)
    fused = plain and not inplace and logits.requires_grad and options[0] != "none"
    function = CrossEntropyStats if options[-1] else CrossEntropy
    return function(logits, target, mask, normalizer, class_weight, options, fused, inplace)


def _autograd(op: Any, stats: bool) -> Callable[..., Any]:
    """The operator's Autograd kernel."""

    def kernel(logits: Tensor, target: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Any:
        if _differentiated(logits, mask):
            inplace = kwargs.get("inplace_backward", False)
            call = partial(cross_entropy, inplace_backward=inplace)
            return _public(call, stats)(logits, target, mask, **kwargs)
        with _below_autograd():
            return op(logits, target, mask, **kwargs)

    return kernel


register_fake(ops.cross_entropy.default, _public(_fake_forward, False))
register_fake(ops.cross_entropy_stats.default, _public(_fake_forward, True))
register_fake(ops.cross_entropy_forward.default, _fake_forward)
register_fake(ops.cross_entropy_fused.default, lambda dlogits, *args: _fake_forward(*args))
register_fake(ops.cross_entropy_backward.default, lambda dloss, logits, *_: _fake_gradient(logits))
register_fake(ops.cross_entropy_backward_out.default, lambda *_: None)
register_fake(ops.mask_grad.default, lambda dloss, mask, *_: _fake_gradient(mask))
_library.impl("cross_entropy", _autograd(ops.cross_entropy.default, False), "Autograd")
_library.impl("cross_entropy_stats", _autograd(ops.cross_entropy_stats.default, True), "Autograd")


# masked_reduce


def _fake_reduce_forward(
    values: Tensor, mask: Tensor | None, normalizer: Tensor | None, reduction: str
) -> tuple[Tensor, Tensor, Tensor]:
    _checks.floating("masked_reduce", "values", values)
    if mask is not None:
        _checks.mask_of("masked_reduce", mask, values.shape)
    _checks.reduction("masked_reduce", reduction, values.dim(), normalizer)
    dtype = _loss_dtype(values)
    groups = _group_count(reduction, values.shape)
    return (
        values.new_empty(values.shape if reduction == "none" else (), dtype=dtype),
        values.new_empty((2, math.prod(values.shape)), dtype=dtype),
        values.new_empty((groups, _GROUP_FIELDS), dtype=torch.float64),
    )


def _fake_reduce(
    values: Tensor,
    mask: Tensor | None = None,
    *,
    reduction: str = "mean",
    normalizer: Tensor | None = None,
) -> Tensor:
    return _fake_reduce_forward(values, mask, normalizer, reduction)[0]


def _reduce_forward(
    values: Tensor, mask: Tensor | None, normalizer: Tensor | None, reduction: str
) -> tuple[Tensor, ...]:
    with _below_autograd():
        return ops.masked_reduce_forward.default(values, mask, normalizer, reduction)


def _reduce_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    values, mask, _, _ = inputs
    ctx.set_materialize_grads(False)
    wants_mask = may_require_grad(mask)
    ctx.save_for_backward(values, mask if wants_mask else None, *output[1:])


def _reduce_backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * 4
    values, mask, tokens, groups = ctx.saved_tensors
    dvalues = dmask = None
    with _below_autograd():
        if ctx.needs_input_grad[0]:
            dvalues = ops.masked_reduce_backward.default(dloss, values, tokens, groups)
        if ctx.needs_input_grad[1]:
            dmask = ops.mask_grad.default(dloss, mask, tokens, groups, None, None, 0.0)
    return dvalues, dmask, None, None


MaskedReduce = differentiable(
    "MaskedReduce", _reduce_forward, _reduce_setup_context, _reduce_backward, results=1
)


def masked_reduce(
    values: Tensor,
    mask: Tensor | None = None,
    *,
    reduction: str = "mean",
    normalizer: Tensor | None = None,
) -> Tensor:
    if not _differentiated(values, mask):
        with _below_autograd():
            return ops.masked_reduce.default(
                values, mask, reduction=reduction, normalizer=normalizer
            )
    return MaskedReduce(values, mask, normalizer, reduction)[0]


register_fake(ops.masked_reduce.default, _fake_reduce)
register_fake(ops.masked_reduce_forward.default, _fake_reduce_forward)
register_fake(ops.masked_reduce_backward.default, lambda dloss, values, *_: _fake_gradient(values))
_library.impl("masked_reduce", masked_reduce, "Autograd")

for _op in (
    ops.cross_entropy_forward,
    ops.cross_entropy_backward,
    ops.mask_grad,
    ops.masked_reduce_forward,
    ops.masked_reduce_backward,
):
    torch.library.register_vmap(_op.default, _loop(_op.default))
