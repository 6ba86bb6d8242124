# SPDX-License-Identifier: BSD-3-Clause
"""What logits are made from, and what calls on the logits do to it.

Between the head and the loss, models shift, flatten, cast and scale their logits. :func:`noted`
does the same to :class:`Parts`: to one hidden state a token instead of V logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_any

if TYPE_CHECKING:  # which a torch without torch.distributed has not
    from masked_loss.fuse.split import Split


def torch_functions(*names: str) -> frozenset[Any]:
    """The functions of these names, of torch and of torch.Tensor."""
    owners = (torch, Tensor)
    return frozenset(getattr(o, name) for name in names for o in owners if hasattr(o, name))


def torch_getters(*properties: str) -> frozenset[Any]:
    return frozenset(getattr(Tensor, n).__get__ for n in properties if hasattr(Tensor, n))


# Arrange tokens anew; they are noted if the classes of each token stay together.
ARRANGE = torch_functions(
    "view", "reshape", "flatten", "unflatten", "contiguous", "__getitem__", "unsqueeze", "squeeze",
    "transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "narrow", "select",
    "clone",
) | torch_getters("mT")  # fmt: skip
CLONE = torch_functions("clone")
MULTIPLY = torch_functions("mul", "multiply", "__mul__", "__rmul__")
DIVIDE = torch_functions("div", "divide", "true_divide", "__truediv__")
ADD = torch_functions("add", "__add__", "__radd__")
TANH = torch_functions("tanh")
LOG_SOFTMAX = torch_functions("log_softmax") | {F.log_softmax, torch.special.log_softmax}
CAST = {Tensor.float: torch.float32, Tensor.double: torch.float64}
WIDER = {
    torch.float16: (torch.float32, torch.float64),
    torch.bfloat16: (torch.float32, torch.float64),
    torch.float32: (torch.float64,),
}


class Scaling(NamedTuple):
    """logits -> numerator / denominator * logits, then perhaps -> cap * tanh(logits)."""

    numerator: float = 1.0
    denominator: float = 1.0
    cap: float | None = None

    def times(self, number: float) -> Scaling:
        if self.cap is not None:
            return self._replace(cap=self.cap * number)
        return self._replace(numerator=self.numerator * number)

    def over(self, number: float) -> Scaling:
        if self.cap is not None:
            return self._replace(cap=self.cap / number)
        return self._replace(denominator=self.denominator * number)

    @property
    def factor(self) -> float:
        """What logits are multiplied by; before linear_cross_entropy's softcap, if cap is set."""
        numerator = self.numerator if self.cap is None else self.numerator * self.cap
        return numerator / self.denominator


class Parts(NamedTuple):
    """What logits are made from."""

    hidden: Tensor  # [..., D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    dtype: torch.dtype
    scaling: Scaling = Scaling()
    offset: Tensor | None = None  # [V], a constant added after scaling
    normalized: bool = False  # log_softmax of all that over the classes
    class_dim: int = -1  # where V stands among the dimensions; counted from the front if not last
    split: Split | None = None  # weight and bias are some rows of the head's, and V is of all ranks

    @property
    def classes(self) -> int:
        return self.weight.shape[0] if self.split is None else self.split.vocab.classes

    @property
    def shape(self) -> torch.Size:
        sizes = list(self.hidden.shape[:-1])
        at = len(sizes) if self.class_dim == -1 else self.class_dim
        sizes.insert(at, self.classes)
        return torch.Size(sizes)

    def detached(self) -> Parts:
        """The same without a graph. Aliases: ``weight.data = other`` leaves them what they are."""
        bias = None if self.bias is None else self.bias.detach()
        return self._replace(hidden=self.hidden.detach(), weight=self.weight.detach(), bias=bias)

    def compute(self) -> Tensor:
        """The logits."""
        with torch.autocast(self.hidden.device.type, enabled=False):
            logits = F.linear(self.hidden, self.weight, self.bias)
            if self.split is not None:
                logits = self.split.gathered(logits)
            numerator, denominator, cap = self.scaling
            if self.dtype != logits.dtype:
                logits = logits.to(self.dtype)
            if denominator != 1.0:
                logits = logits / denominator
            if numerator != 1.0:
                logits = logits * numerator
            if cap is not None:
                logits = cap * logits.tanh()
            if self.offset is not None:
                logits = logits + self.offset
            if self.normalized:
                logits = logits.log_softmax(-1)
        return logits.movedim(-1, self.class_dim) if self.class_dim != -1 else logits


def noted(
    parts: Parts, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Parts | None:
    """The parts of ``func(logits, *args, **kwargs)``, None where it takes the logits themselves."""
    if func in ARRANGE:
        return _arranged(parts, func, args, kwargs)
    if func is Tensor.to or func in CAST:
        return _cast(parts, func, args, kwargs)
    if parts.normalized:
        return None
    if func in LOG_SOFTMAX:
        return _log_softmax(parts, *args, **kwargs)
    if func in ADD:
        return _offset(parts, *args) if len(args) == 1 and not kwargs else None
    return None if kwargs or parts.offset is not None else _scaled(parts, func, args)


def _arranged(
    parts: Parts, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Parts | None:
    """Does to the tokens' hidden states what ``func`` would do to their logits.

    A tensor of the logits' shape without memory shows where each token goes: what comes out is
    still logits, if one dimension runs over all classes and the others step over whole tokens.
    """
    classes, width = parts.classes, parts.weight.shape[1]
    if tree_any(lambda x: isinstance(x, Tensor), (args, kwargs)) or classes == 1:
        return None
    whole = torch.empty((*parts.hidden.shape[:-1], classes), device="meta", dtype=parts.dtype)
    shown = whole.movedim(-1, parts.class_dim)
    shown = shown if func in CLONE else func(shown, *args, **kwargs)
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


def _scaled(parts: Parts, func: Callable[..., Any], args: tuple[Any, ...]) -> Parts | None:
    scaling = parts.scaling
    if func in TANH and not args and scaling.cap is None:
        return parts._replace(scaling=scaling._replace(cap=1.0))
    if len(args) != 1 or not isinstance(args[0], (int, float)):
        return None
    number = float(args[0])
    if func in MULTIPLY:
        return parts._replace(scaling=scaling.times(number))
    if func in DIVIDE and number:
        return parts._replace(scaling=scaling.over(number))
    return None


def _offset(parts: Parts, given: Any) -> Parts | None:
    """BART and its relatives add a buffer of V numbers to the logits of a head without a bias."""
    classes = parts.classes
    if not isinstance(given, Tensor) or given.requires_grad or parts.class_dim != -1:
        return None
    one_per_class = given.numel() == classes == given.shape[-1:].numel() and given.dim() > 0
    if not one_per_class or given.dim() > len(parts.shape) or classes == 1:
        return None
    dtype = torch.promote_types(parts.dtype, given.dtype)
    capped = parts.scaling.cap is not None or parts.offset is not None
    if capped or dtype not in (parts.dtype, *WIDER.get(parts.dtype, ())):
        return None
    if given.device != parts.hidden.device or type(given) not in (Tensor, torch.nn.Parameter):
        return None
    # A copy: whoever writes into the buffer later does not change these logits.
    return parts._replace(dtype=dtype, offset=given.detach().reshape(-1).clone())


def _log_softmax(
    parts: Parts,
    dim: int | None = None,
    *more: Any,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> Parts | None:
    dims = (-1, len(parts.shape) - 1) if parts.class_dim == -1 else (parts.class_dim,)
    dtype = dtype or parts.dtype
    if dim not in dims or more or dtype not in (parts.dtype, *WIDER.get(parts.dtype, ())):
        return None
    return parts._replace(dtype=dtype, normalized=True)


def _cast(
    parts: Parts, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Parts | None:
    dtype = CAST.get(func)
    if func is Tensor.to and not any(isinstance(arg, bool) for arg in args):
        kwargs = {name: value for name, value in kwargs.items() if name != "copy"}
        parsed: Any = torch._C._nn._parse_to(*args, **kwargs)
        device, dtype, _, memory_format = parsed
        if (device is not None and device != parts.hidden.device) or memory_format is not None:
            return None
        dtype = dtype or parts.dtype
    if dtype is None or dtype not in (parts.dtype, *WIDER.get(parts.dtype, ())):
        return None
    return parts._replace(dtype=dtype)
