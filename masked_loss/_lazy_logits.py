# SPDX-License-Identifier: BSD-3-Clause
"""Tensors that stand for the logits of an output head, for fuse.py.

LazyLogits are logits nobody has computed yet. What a model does between its head and its loss
(shifting, flattening, a cast, a softcap) is noted instead of done; the cross entropy at the end
becomes :func:`masked_loss.linear_cross_entropy`. Whatever else is asked of them computes the
logits, once. DenseLogits are computed already, and only their cross entropy is another one.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_any, tree_map_only

from masked_loss.functional import cross_entropy, masked_cross_entropy
from masked_loss.linear import linear_cross_entropy

_WHO = "fuse_linear_loss"


def _names(*functions: str) -> frozenset[Any]:
    """Those functions, of torch and of torch.Tensor."""
    owners = (torch, Tensor)
    return frozenset(getattr(o, name) for name in functions for o in owners if hasattr(o, name))


def _getters(*properties: str) -> frozenset[Any]:
    return frozenset(getattr(Tensor, n).__get__ for n in properties if hasattr(Tensor, n))


# What the stand-in knows without being computed.
_METADATA = _getters(
    "shape", "dtype", "device", "ndim", "layout", "requires_grad", "grad_fn", "is_leaf", "is_cuda",
    "is_cpu", "is_meta", "is_sparse", "is_quantized", "is_nested", "itemsize", "nbytes", "is_mps",
    "is_xpu", "output_nr",
) | _names(
    "size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "storage_offset",
    "is_contiguous", "is_floating_point", "is_complex", "get_device", "is_inference", "__len__",
    "is_signed", "is_conj", "is_neg", "__hash__",
)  # fmt: skip
# What only arranges tokens anew, as long as the classes of a token stay together.
_ARRANGE = _names(
    "view", "reshape", "flatten", "unflatten", "contiguous", "__getitem__", "unsqueeze", "squeeze",
    "transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "narrow", "select",
    "clone",
) | _getters("mT")  # fmt: skip
_CLONE = _names("clone")
_REPEAT = {Tensor.view: Tensor.reshape}  # the stand-in is contiguous where logits may not be
_MULTIPLY = _names("mul", "multiply", "__mul__", "__rmul__")
_DIVIDE = _names("div", "divide", "true_divide", "__truediv__")
_TANH = _names("tanh")
_CAST = {Tensor.float: torch.float32, Tensor.double: torch.float64}
_WIDER = {
    torch.float16: (torch.float32, torch.float64),
    torch.bfloat16: (torch.float32, torch.float64),
    torch.float32: (torch.float64,),
}
_LOSSES = frozenset((F.cross_entropy, cross_entropy, masked_cross_entropy))
_BACKWARDS = frozenset((torch.autograd.grad, torch.autograd.backward))
_HOOKS = _names("register_hook", "register_post_accumulate_grad_hook", "retain_grad")


class _Scaling(NamedTuple):
    """logits -> numerator / denominator * logits, then perhaps -> cap * tanh(logits)."""

    numerator: float = 1.0
    denominator: float = 1.0
    cap: float | None = None

    def times(self, number: float) -> _Scaling:
        if self.cap is not None:
            return self._replace(cap=self.cap * number)
        return self._replace(numerator=self.numerator * number)

    def over(self, number: float) -> _Scaling:
        if self.cap is not None:
            return self._replace(cap=self.cap / number)
        return self._replace(denominator=self.denominator * number)

    @property
    def factor(self) -> float:
        """What logits are multiplied by; before linear_cross_entropy's softcap, if cap is set."""
        numerator = self.numerator if self.cap is None else self.numerator * self.cap
        return numerator / self.denominator


class _Head(torch.autograd.Function):
    """The place of the logits in the autograd graph.

    It hands hidden, weight and bias on, for the fused loss to use. So there is a node where logits
    have theirs: DistributedDataParallel finds the parameters behind it, FSDP hooks into it, and a
    gradient of the logits themselves, from code that goes round ``__torch_function__``, is right.
    """

    @staticmethod
    def forward(ctx: Any, logits: Parts, *tensors: Tensor | None) -> Any:
        hidden, weight, bias = tensors
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight)
        ctx.has_bias = bias is not None
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
        flat = dlogits.reshape(-1, weight.shape[0]).to(weight.dtype)
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


class Parts(NamedTuple):
    """What logits are made from."""

    hidden: Tensor  # [..., D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    scaling: _Scaling = _Scaling()
    dtype: torch.dtype = torch.float32
    class_dim: int = -1  # where V stands among the dimensions; counted from the front if not last

    @property
    def shape(self) -> torch.Size:
        sizes = list(self.hidden.shape[:-1])
        at = len(sizes) if self.class_dim == -1 else self.class_dim
        sizes.insert(at, self.weight.shape[0])
        return torch.Size(sizes)


class LazyLogits(Tensor):
    """Logits that are computed when somebody looks at them.

    Shape, dtype, device and autograd state are those of the logits. Slices, ``view``, ``reshape``,
    ``flatten``, ``transpose``, ``contiguous``, casts to a wider type, products with a number, and
    ``tanh`` give another one of these; ``F.cross_entropy`` (``nn.CrossEntropyLoss`` too) and
    masked_loss's losses give :func:`masked_loss.linear_cross_entropy` of the hidden states;
    everything else gets the logits as a plain tensor.

    The hidden states and the weight must still be what they were when the logits are computed:
    after ``optimizer.step()`` they are not, and a ``RuntimeError`` says so.
    """

    _parts: Parts
    _versions: tuple[int, ...]
    _parent: LazyLogits | None
    _again: Callable[[Tensor], Tensor]  # makes these logits from the parent's
    _dense: Tensor | None
    _dense_of: Tensor | None  # the parent's that _dense was made from
    _fused: bool
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
        again: Callable[[Tensor], Tensor] | None = None,
    ) -> LazyLogits:
        self: LazyLogits
        tensors = (parts.hidden, parts.weight, parts.bias)
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
            self, hidden, weight, bias = _Head.apply(parts, *tensors)
            # A parent's node has handed on weight and bias already.
            kept = (hidden, weight, bias) if parent is None else (hidden, *tensors[1:])
            self._parts = parts._replace(hidden=kept[0], weight=kept[1], bias=kept[2])
        else:
            self = cls._wrap(parts)
        self._parent = parent
        if again is not None:
            self._again = again
        self._versions = _versions(self._parts) if parent is None else parent._versions
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
            if not tree_any(_is_lazy, (args[1:], kwargs)):
                result = self._lazily(func, args[1:], kwargs)
                if result is not None:
                    return result
            self._before(func)
        if func in _LOSSES:
            func = {F.cross_entropy: cross_entropy}.get(func, func)
        elif func in _BACKWARDS:
            tree_map_only(LazyLogits, lambda x: x._require_gradient(func.__name__), (args, kwargs))
        args, kwargs = tree_map_only(LazyLogits, LazyLogits._compute, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Autograd has noted the call already: the values are all that is missing.
        args, kwargs = tree_map_only(LazyLogits, LazyLogits._value, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _lazily(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor | tuple[Any, ...] | None:
        """What ``func`` gives without the logits, None where it needs them."""
        if self._oldest_dense() is not None or not self._is_attached():
            return None
        self._check_unchanged()
        if func in _LOSSES:
            return self._loss(func, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            if func in _ARRANGE:
                parts = self._arranged(func, args, kwargs)
            else:
                parts = self._elementwise(func, args, kwargs)
        if parts is None:
            return None
        repeat: Any = _REPEAT.get(func, func)
        with self._like_made():
            return LazyLogits._make(parts, self, lambda logits: repeat(logits, *args, **kwargs))

    def _arranged(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Parts | None:
        """Does to the tokens' hidden states what ``func`` would do to their logits.

        A tensor of the logits' shape without memory shows where each token goes: what comes out is
        still logits, if one dimension runs over all classes and the others step over whole tokens.
        """
        parts = self._parts
        classes, width = parts.weight.shape
        if tree_any(lambda x: isinstance(x, Tensor), (args, kwargs)) or classes == 1:
            return None
        whole = torch.empty((*parts.hidden.shape[:-1], classes), device="meta", dtype=parts.dtype)
        shown = whole.movedim(-1, parts.class_dim)
        shown = shown if func in _CLONE else func(shown, *args, **kwargs)
        if not isinstance(shown, Tensor) or shown.dtype != parts.dtype or not shown.numel():
            return None
        if shown.untyped_storage()._cdata != whole.untyped_storage()._cdata:
            return None  # a selection, or a new order
        sizes, strides, offset = shown.shape, shown.stride(), shown.storage_offset()
        steps = [d for d, n in enumerate(sizes) if n > 1]
        at = next((d for d in steps if sizes[d] == classes and strides[d] == 1), None)
        others = (offset, *(strides[d] for d in steps if d != at))
        if at is None or any(n % classes for n in others):
            return None
        tokens = [d for d in range(shown.dim()) if d != at]
        hidden = parts.hidden.contiguous()
        hidden = hidden.as_strided(
            [*(sizes[d] for d in tokens), width],
            [*(strides[d] // classes * width for d in tokens), 1],
            hidden.storage_offset() + offset // classes * width,
        )
        return parts._replace(hidden=hidden, class_dim=-1 if at == shown.dim() - 1 else at)

    def _elementwise(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Parts | None:
        parts, scaling = self._parts, self._parts.scaling
        number = args[0] if len(args) == 1 and isinstance(args[0], (int, float)) else None
        if number is not None and not kwargs:
            if func in _MULTIPLY:
                return parts._replace(scaling=scaling.times(float(number)))
            if func in _DIVIDE and number:
                return parts._replace(scaling=scaling.over(float(number)))
            return None
        if func in _TANH and not kwargs and scaling.cap is None:
            return parts._replace(scaling=scaling._replace(cap=1.0))
        dtype = _CAST.get(func)
        if func is Tensor.to and not any(isinstance(arg, bool) for arg in args):
            kwargs = {name: value for name, value in kwargs.items() if name != "copy"}
            parsed: Any = torch._C._nn._parse_to(*args, **kwargs)
            device, dtype, _, memory_format = parsed
            if (device is not None and device != parts.hidden.device) or memory_format is not None:
                return None
            dtype = dtype or parts.dtype
        if dtype is not None and dtype in (parts.dtype, *_WIDER.get(parts.dtype, ())):
            return parts._replace(dtype=dtype)
        return None

    def _loss(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor | tuple[Any, ...] | None:
        """The fused loss, None where the arguments need logits."""
        parts = self._parts
        last = parts.class_dim == -1
        scaling = parts.scaling
        if scaling.cap is not None and scaling.cap <= 0:
            return None
        factor = scaling.factor
        if abs(factor) > 1 and parts.hidden.dtype == torch.float16:
            return None  # factor * hidden may overflow where factor * logits does not
        if func is masked_cross_entropy:
            if not last or (scaling.cap and kwargs.get("softcap") is not None):
                return None
            target, mask = args  # so it hands them over
            options = {k: v for k, v in kwargs.items() if k != "inplace_backward"}
        else:
            bound = _bind_cross_entropy(args, kwargs)
            if bound is None or (parts.class_dim != 1 if len(self.shape) > 2 else not last):
                return None
            target, mask, options = bound
            if target.shape != parts.hidden.shape[:-1]:
                return None
        if scaling.cap is not None:
            options["softcap"] = scaling.cap
        hidden, bias = parts.hidden, parts.bias
        for logits in self._line():
            logits._fused = True
        with self._like_made(), torch.autocast(hidden.device.type, enabled=False):
            if factor != 1.0:
                hidden, bias = hidden * factor, None if bias is None else bias * factor
            result: Any = linear_cross_entropy(
                hidden, parts.weight, target, mask, bias=bias, **options
            )
        loss, *stats = result if isinstance(result, tuple) else (result,)
        loss = loss.double() if parts.dtype == torch.float64 else loss
        return (loss, *stats) if stats else loss

    def _oldest_dense(self) -> Tensor | None:
        """The logits that these are made from, if they were computed."""
        return self._dense if self._parent is None else self._parent._oldest_dense()

    def _is_attached(self) -> bool:
        """Whether the graph ends where _make left it, and not in a node somebody put in between."""
        with torch._C.DisableTorchFunctionSubclass():
            return not self.requires_grad or type(self.grad_fn).__name__ == "_HeadBackward"

    @contextlib.contextmanager
    def _like_made(self) -> Any:
        """The grad mode of the caller, unless these logits were made without a graph."""
        with torch._C.DisableTorchFunctionSubclass():
            attached = self.requires_grad
        with torch.set_grad_enabled(torch.is_grad_enabled() and attached):
            yield

    def _check_unchanged(self) -> None:
        for tensor in (self._parts.weight, self._parts.bias):
            if tensor is not None and tensor.numel() and not tensor.untyped_storage().nbytes():
                raise RuntimeError(
                    f"{_WHO}: the head's weight was freed before its logits were used. FSDP frees "
                    "it after forward: compute the loss in forward, use reshard_after_forward="
                    "False for the module that holds the head, or unfuse(model)"
                )
        if _versions(self._root()._parts) != self._versions:
            raise RuntimeError(
                f"{_WHO}: hidden states or head have changed in place since these logits were "
                "returned (optimizer.step()?), so they cannot be computed any more. Use them "
                "before, or unfuse(model)"
            )

    def _root(self) -> LazyLogits:
        return self if self._parent is None else self._parent._root()

    def _before(self, func: Callable[..., Any]) -> None:
        name = getattr(func, "__name__", "")
        if func in _HOOKS:
            self._require_gradient(name)
        in_place = name.endswith("_") and not name.endswith("__")
        if in_place or name in ("__setitem__", "__iadd__", "__imul__", "__isub__", "__itruediv__"):
            self._root()._compute()  # whoever shares memory with these logits shall see it

    def _require_gradient(self, name: str) -> None:
        if any(x._fused for x in self._line()):
            raise RuntimeError(
                f"{_WHO}: {name}: the loss was computed without these logits, so they get no "
                "gradient. Use them before the loss, or unfuse(model)"
            )

    def _line(self) -> list[LazyLogits]:
        return [self] if self._parent is None else [self, *self._parent._line()]

    def _compute(self) -> Tensor:
        """The logits, with the graph that they always had."""
        if self._parent is not None and self._parent._oldest_dense() is not None:
            source = self._parent._compute()
            if self._dense is None or self._dense_of is not source:
                self._dense, self._dense_of = self._again(source), source
        if self._dense is None and not self._is_attached():
            with torch._C.DisableTorchFunctionSubclass():
                return self.clone()  # by way of __torch_dispatch__
        if self._dense is None:
            with torch._C.DisableTorchFunctionSubclass():
                attached, inference = self.requires_grad, self.is_inference()
            with torch.inference_mode(inference), torch.set_grad_enabled(attached):
                self._dense = self._value()
        return self._dense

    def _value(self) -> Tensor:
        self._check_unchanged()
        parts = self._parts
        with torch.autocast(parts.hidden.device.type, enabled=False):
            logits = F.linear(parts.hidden, parts.weight, parts.bias)
            numerator, denominator, cap = parts.scaling
            if parts.dtype != logits.dtype:
                logits = logits.to(parts.dtype)
            if denominator != 1.0:
                logits = logits / denominator
            if numerator != 1.0:
                logits = logits * numerator
            if cap is not None:
                logits = cap * logits.tanh()
        return logits.movedim(-1, parts.class_dim) if parts.class_dim != -1 else logits


LazyLogits.__torch_function__.__func__._torchdynamo_disable = True  # type: ignore[attr-defined]


def _uncompiled() -> Any:
    LazyLogits._uncompiled = torch.compiler.disable(LazyLogits._answer)
    return LazyLogits._uncompiled


def _is_lazy(x: Any) -> bool:
    return isinstance(x, LazyLogits)


def _is_for_torch(args: tuple[Any, ...]) -> bool:
    """Whether a hook is one of torch's own, which want to know when, not what (FSDP's do)."""
    hook = getattr(args[1], "func", args[1]) if len(args) > 1 else None
    return str(getattr(hook, "__module__", "")).startswith("torch.")


def _versions(parts: Parts) -> tuple[int, ...]:
    tensors = (parts.hidden, parts.weight, parts.bias)
    return tuple(x._version for x in tensors if x is not None and not x.is_inference())


def _bind_cross_entropy(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None, dict[str, Any]] | None:
    """target, mask and the keywords of linear_cross_entropy, from those of F.cross_entropy."""
    names = (
        "target", "weight", "size_average", "ignore_index", "reduce", "reduction",
        "label_smoothing",
    )  # fmt: skip
    given = dict(zip(names, args, strict=False)) | kwargs
    average, reduce = given.pop("size_average", None), given.pop("reduce", None)
    if average is not None or reduce is not None:
        given["reduction"] = nn._reduction.legacy_get_string(average, reduce)
    mask, target = given.pop("mask", None), given.pop("target", None)
    given["class_weight"] = given.pop("weight", None)
    if not isinstance(target, Tensor) or target.dtype not in (torch.int64, torch.int32):
        return None
    if given.get("reduction", "mean") not in ("none", "sum", "mean"):
        return None
    return target, mask, given


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
        if torch.compiler.is_compiling() and func in _KEEPS_DENSE:
            return super().__torch_function__(func, types, args, kwargs)
        if getattr(func, "__name__", "") in ("__reduce_ex__", "__deepcopy__", "__repr__"):
            return func(args[0].as_subclass(Tensor), *args[1:], **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            keeps = func in _KEEPS_DENSE and type(result) is Tensor
            return result.as_subclass(DenseLogits) if keeps else result


_KEEPS_DENSE = _ARRANGE | _MULTIPLY | _DIVIDE | _TANH | frozenset((*_CAST, Tensor.to))
