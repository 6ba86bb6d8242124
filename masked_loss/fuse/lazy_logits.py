# SPDX-License-Identifier: BSD-3-Clause
"""Tensors that stand for the logits of an output head.

LazyLogits are logits nobody has computed yet. What a model does between its head and its loss is
noted instead of done (parts.py); the loss at the end is computed from the hidden states
(losses.py). Whatever else is asked of them computes the logits, once.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_any, tree_map_only

from masked_loss.functional import cross_entropy
from masked_loss.fuse.losses import LOSSES, REDUCES, fused_loss
from masked_loss.fuse.parts import (
    ADD,
    DIVIDE,
    MULTIPLY,
    TANH,
    Parts,
    noted,
    torch_functions,
    torch_getters,
)
from masked_loss.fuse.placed import Placed
from masked_loss.fuse.snapshot import Snapshot

WHO = "fuse_linear_loss"

# What the stand-in knows without being computed.
_METADATA = torch_getters(
    "shape", "dtype", "device", "ndim", "layout", "requires_grad", "grad_fn", "is_leaf", "is_cuda",
    "is_cpu", "is_meta", "is_sparse", "is_quantized", "is_nested", "itemsize", "nbytes", "is_mps",
    "is_xpu", "output_nr",
) | torch_functions(
    "size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "storage_offset",
    "is_contiguous", "is_floating_point", "is_complex", "get_device", "is_inference", "__len__",
    "is_signed", "is_conj", "is_neg", "__hash__", "_is_view",
)  # fmt: skip
_REPLAY = {Tensor.view: Tensor.reshape}  # the stand-in is contiguous where logits may not be
_COPIES = MULTIPLY | DIVIDE | ADD | TANH  # what they give is never in the memory of the logits
_ROWS = torch_functions("unbind", "__iter__")
_CONCATENATE = torch_functions("cat", "concat", "concatenate")
_BACKWARDS = frozenset((torch.autograd.grad, torch.autograd.backward))
_HOOKS = torch_functions("register_hook", "register_post_accumulate_grad_hook", "retain_grad")


@dataclass
class Uses:
    """What was done with the logits of one forward pass of a head."""

    losses: int = 0  # computed without the logits
    reason: str | None = None  # why the logits were computed, if they were
    trained: bool = False  # a gradient could have been asked of them

    @property
    def wasted(self) -> bool:
        """Whether a training step had its logits computed, and no loss without them."""
        return self.trained and self.reason is not None and not self.losses


class _Head(torch.autograd.Function):
    """The place of the logits in the autograd graph.

    It hands hidden, weight and bias on, for the fused loss to use. So there is a node where logits
    have theirs: DistributedDataParallel finds the parameters behind it, FSDP hooks into it, and a
    gradient of the logits themselves, from code that goes round ``__torch_function__``, is right.
    """

    @staticmethod
    def forward(ctx: Any, logits: Parts, *tensors: Tensor | None) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[:2])
        ctx.split, ctx.classes = logits.split, logits.classes
        kept = [None if x is None else x.view_as(x) for x in tensors]
        frozen = [
            y
            for x, y in zip(tensors, kept, strict=True)
            if x is not None and y is not None and not x.requires_grad
        ]
        ctx.mark_non_differentiable(*frozen)
        return LazyLogits._wrap(logits), *kept

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        dlogits, *given = grads
        if dlogits is None:
            return None, *given
        hidden, weight = ctx.saved_tensors
        flat = dlogits.reshape(-1, ctx.classes).to(weight.dtype)
        flat = flat if ctx.split is None else ctx.split.mine(flat)
        computed = (
            (flat @ weight).view_as(hidden),
            flat.t() @ hidden.reshape(flat.shape[0], weight.shape[1]),
            flat.sum(0),
        )
        needed = ctx.needs_input_grad[1:]
        total = [
            (c if g is None else g + c) if need else None
            for g, c, need in zip(given, computed, needed, strict=True)
        ]
        return None, *total


class LazyLogits(Placed, Tensor):
    """Logits that are computed when somebody looks at them.

    Shape, dtype, device and autograd state are those of the logits. Slices, ``view``, ``reshape``,
    ``flatten``, ``transpose``, ``contiguous``, casts to a wider type, products with a number, the
    sum with a constant [V], ``tanh``, ``log_softmax`` and iteration give others of these.
    ``F.cross_entropy`` (``nn.CrossEntropyLoss`` too), masked_loss's losses, and ``gather``,
    ``nll_loss`` or indices of one class a token after ``log_softmax`` give
    :func:`masked_loss.linear_cross_entropy` of the hidden states. Everything else gets the logits
    as a plain tensor.

    The hidden states and the weight must still be what they were when the logits are computed:
    after ``optimizer.step()`` they are not, and a ``RuntimeError`` says so.
    """

    _parts: Parts
    _snapshot: Snapshot
    _uses: Uses
    _parent: LazyLogits | None
    _replay: Callable[[Tensor], Tensor]  # makes these logits from the parent's
    _dense: Tensor | None
    _dense_of: Tensor | None  # the parent's that _dense was made from
    _fused: bool
    _shares_memory: bool = True  # perhaps, with the parent
    _written: bool = False  # in place: no longer what the parent gives
    _from_rows: bool = False  # one of many: computed together with its neighbours
    _uncompiled: Callable[..., Any] | None = None  # _answer, where torch.compile leaves it alone

    @classmethod
    def _wrap(cls, parts: Parts) -> LazyLogits:
        self: LazyLogits = Tensor._make_wrapper_subclass(
            cls, parts.shape, dtype=parts.dtype, device=parts.hidden.device
        )
        self._parts, self._parent, self._fused = parts, None, False
        self._dense = self._dense_of = None
        return self

    @classmethod
    def _make(
        cls,
        parts: Parts,
        parent: LazyLogits | None = None,
        replay: Callable[[Tensor], Tensor] | None = None,
    ) -> LazyLogits:
        self: LazyLogits
        tensors = (parts.hidden, parts.weight, parts.bias)
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
            self, hidden, weight, bias = _Head.apply(parts, *tensors)
            # A parent's node has handed on weight and bias already.
            head = (weight, bias) if parent is None else tensors[1:]
            self._parts = parts._replace(hidden=hidden, weight=head[0], bias=head[1])
        else:
            self = cls._wrap(parts.detached())
        self._parent = parent
        if replay is not None:
            self._replay = replay
        if parent is None:
            self._snapshot = Snapshot(self._parts[:3])
            self._uses = Uses(trained=self._requires_grad())
        else:
            self._snapshot, self._uses = parent._snapshot, parent._uses
            self._from_rows = parent._from_rows
        return self

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # A compiled loss may call this, and what happens here is not for torch.compile to trace.
        answer = cls._answer
        if "torch._dynamo" in sys.modules:
            answer = cls._uncompiled or _uncompiled()
        return answer(func, args, kwargs or {})

    @classmethod
    def _answer(
        cls, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self = args[0] if args else None
        if isinstance(self, LazyLogits):
            if func in _METADATA or (func in _HOOKS and _is_for_torch(args)):
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            if func is Tensor.detach_:
                return self._detach_in_place()
            if not _any_lazy(args[1:], kwargs):
                result = self._lazily(func, args[1:], kwargs)
                if result is not None:
                    return result
            self._prepare_dense_call(func)
        elif func in _CONCATENATE:
            joined = _concatenated(*args, **kwargs)
            if joined is not None:
                return joined
        if func in LOSSES:
            func = {F.cross_entropy: cross_entropy}.get(func, func)
        elif func in _BACKWARDS:
            tree_map_only(LazyLogits, lambda x: x._require_gradient(func.__name__), (args, kwargs))
        name = getattr(func, "__name__", str(func))
        args, kwargs = _with_lazy(lambda x: x._compute(name), args, kwargs)
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Autograd has noted the call already: the values are all that is missing.
        name = func.__name__
        args, kwargs = tree_map_only(LazyLogits, lambda x: x._value(name), (args, kwargs or {}))
        return func(*args, **kwargs)

    def _lazily(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor | tuple[Any, ...] | None:
        """What ``func`` gives without the logits, None where it needs them."""
        if self._materialized_ancestor() is not None or not self._is_attached():
            return None
        if func in REDUCES:
            result = self._loss(func, args, kwargs)
            if result is not None:
                return result
        if func in _ROWS:
            rows = self._rows(*args, **kwargs)
            return iter(rows) if rows is not None and func is Tensor.__iter__ else rows
        with torch._C.DisableTorchFunctionSubclass():
            parts = noted(self._parts, func, args, kwargs)
        if parts is None:
            return None
        self._require_unchanged(self._snapshot.counts_a_write)
        repeat: Any = _REPLAY.get(func, func)
        with self._creation_grad_mode():
            made = LazyLogits._make(parts, self, lambda logits: repeat(logits, *args, **kwargs))
        made._shares_memory = func not in _COPIES
        return made

    def _handed_on(self, split: Any, replay: Callable[[Any], Tensor]) -> Tensor:
        """These logits with another placement."""
        if self._materialized_ancestor() is not None or not self._is_attached():
            return replay(self._compute("redistribute"))
        with self._creation_grad_mode():
            return LazyLogits._make(self._parts._replace(split=split), self, replay)

    def _loss(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor | tuple[Any, ...] | None:
        loss = fused_loss(self._parts, func, args, kwargs)
        if loss is None:
            return None
        self._require_unchanged(self._snapshot.differs)
        for logits in self._ancestors():
            logits._fused = True
        with self._creation_grad_mode():
            result: Tensor | tuple[Any, ...] = loss()
        self._uses.losses += 1
        return result

    def _rows(self, dim: int = 0) -> Any:
        """These logits one by one; code for batches of unequal length goes through them so."""
        shape = self._parts.shape
        if len(shape) < 3 or dim % len(shape) == self._parts.class_dim % len(shape):
            return None
        rows = []
        for i in range(shape[dim]):
            row = self._lazily(Tensor.select, (dim, i), {})
            if not isinstance(row, LazyLogits):
                return None
            row._from_rows = True
            rows.append(row)
        return tuple(rows)

    def _detach_in_place(self) -> LazyLogits:
        with torch._C.DisableTorchFunctionSubclass():
            Tensor.detach_(self)
        self._parts = self._parts.detached()
        self._dense = None if self._dense is None else self._dense.detach()
        return self

    def _materialized_ancestor(self) -> Tensor | None:
        """The logits that these are made from, if they were computed."""
        if self._parent is None or self._written:
            return self._dense
        return self._parent._materialized_ancestor()

    def _requires_grad(self) -> bool:
        with torch._C.DisableTorchFunctionSubclass():
            return self.requires_grad

    def _is_attached(self) -> bool:
        """Whether the graph ends where _make left it, and not in a node somebody put in between."""
        with torch._C.DisableTorchFunctionSubclass():
            return not self.requires_grad or type(self.grad_fn).__name__ == "_HeadBackward"

    @contextlib.contextmanager
    def _creation_grad_mode(self) -> Any:
        """The grad mode of the caller, unless these logits were made without a graph."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._requires_grad()):
            yield

    def _require_unchanged(self, has_changed: Callable[[], bool]) -> None:
        if self._snapshot.is_freed():  # first: there is nothing to be compared
            raise RuntimeError(
                f"{WHO}: the head's weight, or its hidden states, were freed before the logits "
                "were used. FSDP frees a weight after the forward of the module that it wraps: "
                "compute the loss in there, "
                "or unfuse(model). With FSDP1, do not wrap the head by itself: leave it out of "
                "auto_wrap_policy, so that it stays with the outermost module. With FSDP2 "
                "(fully_shard), use reshard_after_forward=False for the module that holds it"
            )
        if has_changed():
            raise RuntimeError(
                f"{WHO}: hidden states or head have changed in place since these logits were "
                "returned (optimizer.step(), or weights swapped?), so they cannot be computed any "
                "more. Use them before, or unfuse(model)"
            )

    def _origin(self) -> LazyLogits:
        """The logits whose memory these would be in."""
        return self if self._parent is None or not self._shares_memory else self._parent._origin()

    def _prepare_dense_call(self, func: Callable[..., Any]) -> None:
        name = getattr(func, "__name__", "")
        if func in _HOOKS:
            self._require_gradient(name)
        in_place = name.endswith("_") and not name.endswith("__")
        if in_place or name in ("__setitem__", "__iadd__", "__imul__", "__isub__", "__itruediv__"):
            origin = self._origin()
            origin._compute(name)  # whoever shares memory with these logits shall see it
            origin._written = True

    def _require_gradient(self, name: str) -> None:
        if any(x._fused for x in self._ancestors()):
            raise RuntimeError(
                f"{WHO}: {name}: the loss was computed without these logits, so they get no "
                "gradient. Use them before the loss, or unfuse(model)"
            )

    def _ancestors(self) -> list[LazyLogits]:
        """These logits, those that they were made from, and so on."""
        return [self] if self._parent is None else [self, *self._parent._ancestors()]

    def _compute(self, reason: str) -> Tensor:
        """The logits, with the graph that they always had; ``reason`` is who asks for them."""
        if (self._parent is not None and not self._written) and (
            self._from_rows or self._parent._materialized_ancestor() is not None
        ):
            source = self._parent._compute(reason)
            if self._dense is None or self._dense_of is not source:
                self._dense, self._dense_of = self._replay(source), source
        if self._dense is None and not self._is_attached():
            with torch._C.DisableTorchFunctionSubclass():
                return self.clone()  # by way of __torch_dispatch__
        if self._dense is None:
            with torch._C.DisableTorchFunctionSubclass():
                attached, inference = self.requires_grad, self.is_inference()
            with torch.inference_mode(inference), torch.set_grad_enabled(attached):
                self._dense = self._value(reason)
        return self._dense

    def _value(self, reason: str) -> Tensor:
        self._require_unchanged(self._snapshot.differs)
        self._uses.reason = self._uses.reason or reason
        return self._parts.compute()


LazyLogits.__torch_function__.__func__._torchdynamo_disable = True  # type: ignore[attr-defined]


def _uncompiled() -> Any:
    LazyLogits._uncompiled = torch.compiler.disable(LazyLogits._answer)
    return LazyLogits._uncompiled


def _is_lazy(x: Any) -> bool:
    return isinstance(x, LazyLogits)


# Sampling goes through these ten times a token. Trees are slow, and arguments are seldom nested.
def _is_nested(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return any(isinstance(x, (tuple, list, dict)) for x in (*args, *kwargs.values()))


def _any_lazy(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if _is_nested(args, kwargs):
        return tree_any(_is_lazy, (args, kwargs))
    return any(map(_is_lazy, (*args, *kwargs.values())))


def _with_lazy(
    change: Callable[[LazyLogits], Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """args and kwargs with each LazyLogits changed."""
    if _is_nested(args, kwargs):
        return tree_map_only(LazyLogits, change, (args, kwargs))

    def changed(x: Any) -> Any:
        return change(x) if isinstance(x, LazyLogits) else x

    return tuple(map(changed, args)), {name: changed(x) for name, x in kwargs.items()}


def _is_for_torch(args: tuple[Any, ...]) -> bool:
    """Whether a hook is one of torch's own, which want to know when, not what (FSDP's do)."""
    hook = getattr(args[1], "func", args[1]) if len(args) > 1 else None
    return str(getattr(hook, "__module__", "")).startswith("torch.")


def _concatenated(pieces: Any, dim: int = 0) -> LazyLogits | None:
    """Detached logits of one head, one after the other: pipelines return their micro-batches so."""
    if not isinstance(pieces, (list, tuple)) or not all(map(_is_lazy, pieces)):
        return None
    parts = [piece._parts for piece in pieces]
    first, rank = parts[0], len(parts[0].shape)
    at = dim + rank if dim < 0 else dim
    if not 0 <= at < rank - 1 or any(len(p.shape) != rank for p in parts):
        return None
    for piece in pieces:
        if piece._materialized_ancestor() is not None or piece._requires_grad():
            return None
    alike = all(_kind(p, at) == _kind(first, at) for p in parts)
    if not alike or first.class_dim != -1 or any(p.offset is not None for p in parts):
        return None
    for piece in pieces:
        piece._require_unchanged(piece._snapshot.differs)
    with torch.no_grad():
        return LazyLogits._make(first._replace(hidden=torch.cat([p.hidden for p in parts], at)))


def _kind(parts: Parts, dim: int) -> tuple[Any, ...]:
    """What logits that are to be joined along ``dim`` have in common."""
    head = [None if x is None else (x.data_ptr(), x.shape, x.stride()) for x in parts[1:3]]
    sizes = [n for d, n in enumerate(parts.shape) if d != dim]
    return head, sizes, parts.hidden.dtype, parts.dtype, parts.scaling, parts.normalized
