# SPDX-License-Identifier: BSD-3-Clause
"""Finding a mask that meets an already reduced loss, while a program runs."""

from __future__ import annotations

import functools
import inspect
import linecache
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from masked_loss.errors import ReducedLossError

__all__ = ["detect_reduced_loss"]

_HERE = os.path.dirname(__file__) + os.sep
_TORCH = os.path.dirname(torch.__file__) + os.sep
# Losses announce themselves to __torch_function__ under these modules, or from our operators.
_LOSSES = ("torch.nn.functional", "masked_loss.")
_OPERATORS = "torch._ops.masked_loss"
_MULTIPLY = frozenset({"mul", "mul_", "multiply", "multiply_", "__mul__", "__rmul__", "__imul__"})
_CONTRACT = frozenset(
    {"einsum", "dot", "vdot", "inner", "outer", "ger", "mv", "matmul", "__matmul__", "__rmatmul__"}
)
_ADD_PRODUCT = frozenset({"addcmul", "addcmul_"})
_CHOOSE = frozenset({"where", "masked_fill", "masked_select", "__getitem__"})
_SPREAD = frozenset({"expand", "expand_as", "broadcast_to", "repeat"})
_COLLECT = frozenset({"stack", "cat", "concat", "hstack"})
# A result of these is still the reduced loss, as long as no operand had one value per token.
_PRESERVING = (
    "div div_ divide divide_ true_divide true_divide_ __truediv__ __itruediv__ __div__ "
    "__idiv__ add add_ __add__ __radd__ __iadd__ sub sub_ subtract subtract_ __sub__ "
    "__rsub__ __isub__ rsub neg neg_ negative __neg__ abs __abs__ clone detach detach_ to "
    "type float double half bfloat16 cpu cuda contiguous requires_grad_ alias view reshape "
    "squeeze unsqueeze flatten ravel sum mean nan_to_num nan_to_num_ clamp clamp_ clamp_min "
    "clamp_max copy_ data T mT __getitem__ select"
)
_PRESERVE = _MULTIPLY | _CHOOSE | _SPREAD | frozenset(_PRESERVING.split())
_WATCHED = _PRESERVE | _COLLECT | _CONTRACT | _ADD_PRODUCT


class _Place(NamedTuple):
    """A line of the user's program."""

    filename: str
    line: int
    function: str

    def __str__(self) -> str:
        source = linecache.getline(self.filename, self.line).strip()
        where = f"{self.filename}:{self.line}, in {self.function}"
        return f"{where}\n      {source}" if source else where


class _Reduced(NamedTuple):
    """Where a loss became a scalar, and by what."""

    place: _Place
    how: str  # cross_entropy, reduction="mean"
    collected: bool = False  # with others in one tensor, each its own: a mask may choose among them
    version: int = 0  # of the tensor that holds it: another one, and it holds something else
    sizes: frozenset[int] = frozenset()  # how many elements its mask or weights could have


class detect_reduced_loss(TorchFunctionMode):  # noqa: N801 - named as torch.autograd.detect_anomaly
    r"""Context manager that stops where a mask is applied to a loss that is already a scalar.

    With :math:`\bar\ell` a loss that was reduced over its tokens and ``mask`` a tensor,
    :math:`\sum_n m_n \bar\ell / \sum_n m_n = \bar\ell`: the mask changes nothing, and no
    error tells. While this context is active, every loss that ``torch.nn.functional`` (directly or
    in a ``torch.nn`` module) or masked_loss reduces to a scalar is remembered, also when it is then
    scaled, cast, moved, viewed, expanded, detached, cloned or added to another scalar, until its
    tensor is overwritten. Where such a loss is multiplied with a tensor of more than one element,
    or one chooses between it and a number (``torch.where``), :class:`ReducedLossError` is raised;
    the message shows the line that reduced the loss and the line that applied the mask.

    It is a debugging aid in the manner of ``torch.autograd.detect_anomaly``: run one training step
    under it. It costs nothing when it is not active, and keeps no tensor alive. It sees code of the
    thread that opened it, with autograd, modules and autocast; while it is active, what
    ``torch.compile`` made runs uncompiled, so that it is seen too.

    Args:
        warn: warn once per place of the mask instead of raising.

    Raises:
        ReducedLossError: where a reduced loss is multiplied with a tensor of several elements that
            can be its mask or weights: it is of booleans, holds only 0 and 1, or has as many
            elements as the loss had terms or samples. Gradients and penalties of another size are
            let through, and so is a loss without gradient that scales a tensor with one (a reward).

    >>> import torch, torch.nn.functional as F
    >>> from masked_loss.detect import detect_reduced_loss
    >>> logits, target, mask = torch.randn(8, 5), torch.arange(8) % 5, torch.arange(8) < 6
    >>> with detect_reduced_loss():
    ...     loss = F.cross_entropy(logits, target)
    ...     try:
    ...         loss = (loss * mask).sum() / mask.sum()
    ...     except ValueError as error:
    ...         print(type(error).__name__)
    ReducedLossError

    Source: https://docs.pytorch.org/docs/stable/torch.overrides.html, docs/lint.md.
    """

    def __init__(self, *, warn: bool = False) -> None:
        super().__init__()
        self._warn = warn
        self._warned: set[tuple[str, int]] = set()
        self._stances: list[Any] = []
        self._reduced: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def __enter__(self) -> Any:
        self._stances.append(torch.compiler.set_stance("force_eager"))
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._stances.pop().__exit__(*exception)
        self._reduced.clear()
        super().__exit__(*exception)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = _name(func)
        reduction = _reduction_of(func, args, kwargs)
        if reduction is None and name not in _WATCHED:
            return func(*args, **kwargs)

        read = (*args[name == "copy_" :], *(v for k, v in kwargs.items() if k != "out"))
        tensors = [t for t in _flat(read) if isinstance(t, torch.Tensor)]
        losses = [(t, r) for t in tensors if (r := self._recall(t)) is not None]
        if losses and name not in _COLLECT:
            self._check(name, tensors, losses)

        result = func(*args, **kwargs)
        if reduction is not None:
            loss = result[0] if isinstance(result, tuple) else result
            if reduction != "none" and loss.dim() == 0:
                how = f'{name}, reduction="{reduction}"'
                self._remember(loss, _Reduced(_caller(), how, sizes=_sizes(tensors[:2])))
        elif losses and isinstance(result, torch.Tensor):
            others = [t for t in tensors if all(t is not loss for loss, _ in losses)]
            alone = all(t.numel() == 1 for t in others) or name in _SPREAD
            if result.numel() == 1 or (alone and name in _PRESERVE):
                self._remember(result, losses[0][1])
            elif name in _COLLECT and not others:
                self._remember(result, losses[0][1]._replace(collected=True))
        return result

    def _remember(self, tensor: torch.Tensor, loss: _Reduced) -> None:
        collected = loss.collected and tensor.numel() > 1
        self._reduced[tensor] = loss._replace(collected=collected, version=_version(tensor))

    def _recall(self, tensor: torch.Tensor) -> _Reduced | None:
        known = self._reduced.get(tensor)
        if known is not None and known.version != _version(tensor):
            del self._reduced[tensor]
            return None
        return known

    def _check(
        self, name: str, tensors: list[torch.Tensor], losses: list[tuple[torch.Tensor, _Reduced]]
    ) -> None:
        """Raises or warns if `name` applies one of the tensors, as a mask, to one of the losses."""
        alone = [(loss, known) for loss, known in losses if not known.collected]
        if name in _ADD_PRODUCT:  # input + a * b: only a and b are multiplied
            tensors = tensors[1:]
            alone = [(loss, known) for loss, known in alone if any(loss is t for t in tensors)]
        if not alone:
            return
        known = alone[0][1]
        several = [t for t in tensors if t.numel() > 1 and self._recall(t) is None]
        per_token = [t for t in several if _can_be_mask(t, known.sizes)]
        if not per_token:
            return
        attached = any(loss.requires_grad for loss, _ in losses)
        if name in _CHOOSE:
            if not all(tensor.dtype == torch.bool for tensor in per_token):
                return  # a loss that takes the place of some values per token
        elif name not in _MULTIPLY | _CONTRACT | _ADD_PRODUCT:
            return
        for tensor in per_token:
            if tensor.requires_grad and not attached:
                continue  # a detached loss as a coefficient
            place = _caller()
            verb = "chooses from" if name in _CHOOSE else "multiplies"
            message = (
                f"detect_reduced_loss: a tensor of shape {list(tensor.shape)} {verb} a loss "
                "that is already a scalar, so as a mask it has no effect\n"
                f"  reduced ({known.how}): {known.place}\n"
                f"  masked: {place}\n"
                'Keep one loss per token (reduction="none") until the mask has been applied, or '
                "use masked_loss.masked_cross_entropy(logits, target, mask)."
            )
            if not self._warn:
                raise ReducedLossError(message)
            if (place.filename, place.line) not in self._warned:
                self._warned.add((place.filename, place.line))
                warnings.warn_explicit(message, UserWarning, place.filename, place.line)
            return


def _sizes(inputs: list[torch.Tensor]) -> frozenset[int]:
    """The numbers of elements of a mask or of weights for a loss of these tensors."""
    sizes: set[int] = set()
    for tensor in inputs:
        for dimensions in range(1, tensor.dim() + 1):
            sizes.add(tensor.shape[:dimensions].numel())
    return frozenset(sizes)


def _can_be_mask(tensor: torch.Tensor, sizes: frozenset[int]) -> bool:
    if tensor.dtype == torch.bool or tensor.numel() in sizes:
        return True
    ones = tensor == 1
    return bool(ones.any() and (ones | (tensor == 0)).all())


def _flat(values: tuple[Any, ...]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _flat(tuple(value))
        else:
            yield value


def _caller() -> _Place:
    """The innermost line outside torch and masked_loss."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith((_HERE, _TORCH)):
        frame = frame.f_back
    return _Place(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)


def _name(func: Callable[..., Any]) -> str:
    """mul of Tensor.mul and torch.ops.aten.mul.Tensor; data of the attribute's getter."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "")
    return name.split(".")[0]


def _version(tensor: torch.Tensor) -> int:
    """How often a tensor was written to, if that is counted."""
    return 0 if tensor.is_inference() else tensor._version


def _reduction_of(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str | None:
    """The reduction that a call of a loss asks for, None for any other function."""
    if getattr(func, "__module__", None) == _OPERATORS:
        return str(kwargs.get("reduction", "mean")) if _takes_reduction(func) else None
    signature = _loss_signature(func)
    return None if signature is None else _reduction(signature, args, kwargs)


@functools.lru_cache(maxsize=1024)
def _takes_reduction(func: Any) -> bool:
    """Of torch.ops.masked_loss.cross_entropy, or of an overload of it: by name only, if at all."""
    schema = getattr(func, "default", func)._schema
    return any(argument.name == "reduction" for argument in schema.arguments)


@functools.lru_cache(maxsize=1024)
def _loss_signature(func: Callable[..., Any]) -> inspect.Signature | None:
    """The signature of a loss of PyTorch or masked_loss, None for any other function."""
    module = getattr(func, "__module__", None) or ""
    if not module.startswith(_LOSSES) or not inspect.isfunction(func):
        return None
    signature = inspect.signature(func)
    return signature if "reduction" in signature.parameters else None


def _reduction(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """The reduction that a call of a loss asks for, in the spelling of today."""
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    average, reduce = bound.arguments.get("size_average"), bound.arguments.get("reduce")
    if average is None and reduce is None:
        return str(bound.arguments["reduction"])
    if reduce is not None and not reduce:
        return "none"
    return "mean" if average is None or average else "sum"
