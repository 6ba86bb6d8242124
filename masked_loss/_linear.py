# SPDX-License-Identifier: BSD-3-Clause
"""Cross entropy from hidden states: matrix products by PyTorch, the rest by csrc/, chunk by chunk.

The tokens that have a weight are taken some at a time. A chunk's logits are computed into a buffer
that all chunks share, a kernel turns them in place into losses and their own gradient, and two more
products turn that into gradients of hidden and weight. The [tokens, V] logits never exist.
docs/linear_cross_entropy.md has the formulas and counts the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from masked_loss import _ops
from masked_loss._memory import _allocate, kept_empty
from masked_loss._ops import ops

_WHO = "linear_cross_entropy"
_library = torch.library.Library("masked_loss", "FRAGMENT")

# Bytes of a chunk's logits, where the caller does not say chunk_tokens.
_CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
# Bytes of the pieces in which a large tensor is converted or added to another type's.
_PIECE_BYTES = 4 << 20
_FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_PUBLIC = (
    "(Tensor hidden, Tensor weight, Tensor target, Tensor? mask=None, *, Tensor? bias=None, "
    'str reduction="mean", Tensor? normalizer=None, int ignore_index=-100, '
    "Tensor? class_weight=None, float label_smoothing=0.0, float z_loss=0.0, "
    "float? softcap=None, bool shift=False, int? chunk_tokens=None, "
    "ScalarType? accumulation_dtype=None, bool pack=True) -> "
)
_library.define(f"linear_cross_entropy{_PUBLIC}Tensor")
_library.define(f"linear_cross_entropy_stats{_PUBLIC}(Tensor loss, Tensor stats)")
_library.define(
    "linear_cross_entropy_forward(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, "
    "Tensor? mask, Tensor? normalizer, Tensor? class_weight, str reduction, int ignore_index, "
    "float label_smoothing, float z_loss, float? softcap, bool shift, bool stats, "
    "int? chunk_tokens, ScalarType? accumulation_dtype, bool pack, bool[3] needs) -> "
    "(Tensor loss, Tensor stats, Tensor tokens, Tensor groups, Tensor unit, Tensor dhidden, "
    "Tensor dweight, Tensor dbias)"
)
_library.define(
    "linear_cross_entropy_backward(Tensor dloss, Tensor hidden, Tensor weight, Tensor? bias, "
    "Tensor target, Tensor tokens, Tensor groups, Tensor? class_weight, float label_smoothing, "
    "float z_loss, float? softcap, bool shift, int? chunk_tokens, ScalarType? accumulation_dtype, "
    "bool pack, bool[3] needs) -> (Tensor dhidden, Tensor dweight, Tensor dbias)"
)


class Options(NamedTuple):
    """What a loss means, in the order of the operators' arguments, and how it is computed."""

    reduction: str
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float | None
    shift: bool
    stats: bool
    chunk_tokens: int | None
    accumulation_dtype: torch.dtype | None
    pack: bool

    @property
    def formula(self) -> tuple[float, float, float | None]:
        return self.label_smoothing, self.z_loss, self.softcap


# What the operators do


def _check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    chunk_tokens: int | None,
    accumulation_dtype: torch.dtype | None,
) -> None:
    def shape(what: str, x: Tensor, *expected: int | str) -> None:
        fits = x.dim() == len(expected) and all(
            isinstance(n, str) or n == size for n, size in zip(expected, x.shape, strict=True)
        )
        if not fits:
            wanted = ", ".join(map(str, expected))
            raise ValueError(f"{_WHO}: {what} must have shape [{wanted}], got {list(x.shape)}")

    if hidden.dtype not in _FLOATING:
        raise TypeError(
            f"{_WHO}: hidden must be float64, float32, bfloat16 or float16, got {_name(hidden)}"
        )
    if hidden.dim() == 0:
        raise ValueError(f"{_WHO}: hidden must have shape [..., D], got []")
    shape("weight", weight, "V", hidden.shape[-1])
    shape("target", target, *hidden.shape[:-1])
    if weight.shape[0] == 0:
        raise ValueError(f"{_WHO}: weight must have at least one class, got {list(weight.shape)}")
    if bias is not None:
        shape("bias", bias, weight.shape[0])
    for what, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.dtype != hidden.dtype:
            raise TypeError(f"{_WHO}: {what} must be {_name(hidden)} like hidden, got {_name(x)}")
    for what, x in (("weight", weight), ("bias", bias), ("target", target)):
        if x is not None and x.device != hidden.device:
            raise ValueError(f"{_WHO}: {what} must be on the device of hidden, {hidden.device}")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"{_WHO}: chunk_tokens must be at least 1, got {chunk_tokens}")
    if accumulation_dtype not in (None, weight.dtype, _ops._loss_dtype(weight)):
        raise ValueError(
            f"{_WHO}: accumulation_dtype must be {_ops._loss_dtype(weight)} or that of weight, "
            f"{weight.dtype}, got {accumulation_dtype}"
        )


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _largest_chunk(weight: Tensor, chunk_tokens: int | None, more: int = 0) -> int:
    if chunk_tokens is not None:
        return chunk_tokens
    limit = _CHUNK_BYTES.get(weight.device.type, _CHUNK_BYTES["cuda"])
    return max(1, limit // ((weight.shape[0] + more) * weight.element_size()))


def _dweight_dtype(
    weight: Tensor,
    tokens: int | torch.SymInt,
    chunk_tokens: int | None,
    accumulation_dtype: torch.dtype | None,
) -> torch.dtype:
    """What dweight accumulates in. One bfloat16 product accumulates inside, in float32.

    One float16 product does too, but its sum over many tokens may exceed the largest float16.
    Depends on shapes alone: a compiled graph has to know.
    """
    if accumulation_dtype is not None:
        return accumulation_dtype
    if weight.dtype == torch.bfloat16 and tokens <= _largest_chunk(weight, chunk_tokens):
        return weight.dtype
    return _ops._loss_dtype(weight)


def _empty_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Large memory on the CPU comes in large pages: small ones take as long as a kernel does."""
    size = x.numel() * dtype.itemsize
    if not (x.is_cpu and x.is_contiguous()) or size < _PIECE_BYTES:
        return torch.empty_like(x, dtype=dtype)
    block = _allocate(size)
    return torch.frombuffer(block, dtype=dtype, count=x.numel()).view(x.shape)


def _pieces(rows: int, row_bytes: int) -> Iterator[slice]:
    step = max(1, _PIECE_BYTES // max(1, row_bytes))
    for begin in range(0, rows, step):
        yield slice(begin, min(begin + step, rows))


def _may_wait(x: Tensor, pack: bool) -> bool:
    """Whether the host may ask for a number that x's device is still computing."""
    return x.is_cpu or (pack and not torch.cuda.is_current_stream_capturing())


class _Tokens:
    """The tokens that are computed, and where they are in hidden: that of token n is row n - shift.

    Packed, they are the tokens with a weight. Their number is only known on the device: where that
    must not be waited for, they are all tokens, those without a weight with zeros as hidden.
    """

    def __init__(self, hidden: Tensor, weights: Tensor, shift: bool, pack: bool) -> None:
        self.hidden, self.shift = hidden, int(shift)
        try:
            self.rows: Tensor | None = hidden.view(-1, hidden.shape[-1])
        except RuntimeError:  # a layout without rows: chunks are gathered from all its dimensions
            self.rows = None
        self.index: Tensor | None = None
        self.weights: Tensor | None = None
        self.first, self.count = self.shift, max(0, weights.numel() - self.shift)
        if not _may_wait(hidden, pack):
            self.weights = weights
            if self.rows is None:
                self.rows = hidden.reshape(-1, hidden.shape[-1])
            return
        index = weights.nonzero().view(-1)
        self.count = index.numel()
        everything = self.count == weights.numel()
        if not everything and not hidden.is_cuda and self.count:
            self.first = int(index[0])
            everything = int(index[-1]) - self.first + 1 == self.count
        if not everything or self.rows is None:
            self.index = index

    @property
    def gathers(self) -> bool:
        return self.index is not None or self.weights is not None

    def at(self, chunk: slice) -> Any:
        """The numbers of a chunk's tokens: a slice where they follow one another."""
        if self.index is not None:
            return self.index[chunk]
        return slice(self.first + chunk.start, self.first + chunk.stop)

    def rows_at(self, chunk: slice) -> Any:
        at = self.at(chunk)
        if isinstance(at, slice):
            return slice(at.start - self.shift, at.stop - self.shift)
        return at - self.shift if self.shift else at

    def hidden_at(self, chunk: slice, buffer: Tensor) -> Tensor:
        rows = self.rows_at(chunk)
        if self.rows is None:
            return self.hidden[torch.unravel_index(rows, self.hidden.shape[:-1])]
        if isinstance(rows, Tensor):
            return torch.index_select(self.rows, 0, rows, out=buffer)
        if self.weights is not None:
            masked = self.weights[self.at(chunk)] == 0
            return buffer.copy_(self.rows[rows]).masked_fill_(masked[:, None], 0)
        return self.rows[rows]


def _take(x: Tensor, at: Any) -> Tensor:
    return x[at] if isinstance(at, slice) else x.index_select(0, at)


class _WeightGrad:
    """dweight and dbias, summed over chunks; for half types in float32, unless told otherwise."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, needs_weight: bool, needs_bias: bool):
        wide = _ops._loss_dtype(weight)
        self.dweight = _empty_like(weight, dtype) if needs_weight else weight.new_empty(0)
        self.dbias = weight.new_zeros(weight.shape[0] if needs_bias else 0, dtype=wide)
        self.needs_weight, self.needs_bias = needs_weight, needs_bias
        self.empty = True

    def add(self, dlogits: Tensor, hidden: Tensor) -> None:
        if self.needs_weight:
            self._add_weight(dlogits.t(), hidden)
        if self.needs_bias:
            for piece in _pieces(self.dbias.numel(), 4 * dlogits.shape[0]):
                self.dbias[piece] += dlogits[:, piece].sum(0, dtype=self.dbias.dtype)
        self.empty = False

    def _add_weight(self, dlogits: Tensor, hidden: Tensor) -> None:
        total = self.dweight
        if total.dtype == hidden.dtype:
            if self.empty:
                torch.mm(dlogits, hidden, out=total)
            else:
                total.addmm_(dlogits, hidden)
        elif total.is_cuda:
            beta = 0 if self.empty else 1
            torch.ops.aten.addmm.dtype_out(
                total, dlogits, hidden, total.dtype, beta=beta, out=total
            )
        else:
            # No product of half types with a float32 result on the CPU: bfloat16 sums are rounded
            # once per chunk; float16 ones, which could overflow, are computed in float32.
            wide = hidden.dtype == torch.float16
            hidden = hidden.float() if wide else hidden
            for piece in _pieces(total.shape[0], total.element_size() * total.shape[1]):
                rows = dlogits[piece]
                part = torch.mm(rows.float() if wide else rows, hidden)
                if self.empty:
                    total[piece].copy_(part)
                else:
                    total[piece].add_(part)

    def results(self) -> tuple[Tensor, Tensor]:
        if self.empty:
            self.dweight.zero_()
        return self.dweight, self.dbias


def _unit(hidden: Tensor, tokens: Tensor, groups: Tensor, dloss: Tensor | None) -> Tensor | None:
    """A power of two that brings the gradients of float16 logits, which may be as small as
    1 / tokens, to about 1: float16 holds nothing below 6e-8. None stands for 1."""
    if hidden.dtype != torch.float16 or tokens.numel() == 0:
        return None
    largest = (tokens[0].abs().max() * groups[:, :2].abs().max()).float()
    if dloss is not None:
        largest = largest * dloss.abs().max()
    exponent = torch.frexp(largest).exponent.clamp(-100, 100)
    unit = torch.ldexp(torch.ones_like(largest), -exponent)
    return torch.where(largest.isfinite() & (largest > 0), unit, 1)


def _run(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    tokens: Tensor,
    groups: Tensor,
    class_weight: Tensor | None,
    options: Options,
    needs: list[bool],
    dloss: Tensor | None,
    forward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fills the table of tokens (``forward``), and returns the gradients that are needed.

    ``dloss``: None for 1, one value, or one for each token. dhidden is in its final type, dweight
    and dbias in what they accumulate in.
    """
    columns, width = weight.shape
    needs_hidden, needs_weight, needs_bias = needs
    gradient = any(needs)
    active = _Tokens(hidden, tokens[0], options.shift, options.pack)

    size = _largest_chunk(weight, options.chunk_tokens)
    if active.gathers and target.numel() > size:
        size = _largest_chunk(weight, options.chunk_tokens, more=width)
    if active.count > size and options.chunk_tokens is None:  # chunks of one size
        even = -(-active.count // -(-active.count // size))
        size = min(size, -(-even // 16) * 16)
    size = min(size, active.count)

    logits = kept_empty((size, columns), weight)
    gathered = hidden.new_empty((size if active.gathers else 0, width))
    dtype = _dweight_dtype(weight, target.numel(), options.chunk_tokens, options.accumulation_dtype)
    weight_grad = _WeightGrad(weight, dtype, needs_weight, needs_bias)
    dhidden = hidden.new_empty(0)
    if needs_hidden:
        partial_rows = active.index is not None or active.count < target.numel()
        make = hidden.new_zeros if partial_rows else hidden.new_empty
        dhidden = make(hidden.shape)
    dhidden_rows = dhidden.view(-1, width) if needs_hidden else dhidden
    flat_target = target.reshape(-1)
    by_token = tokens.t()
    if class_weight is not None:
        class_weight = class_weight.to(tokens.dtype)

    for begin in range(0, active.count, max(1, size)):
        chunk = slice(begin, min(begin + size, active.count))
        at, buffer = active.at(chunk), gathered[: chunk.stop - begin]
        h = active.hidden_at(chunk, buffer)
        y = logits[: chunk.stop - begin]
        if bias is None:
            torch.mm(h, weight.t(), out=y)
        else:
            torch.addmm(bias, h, weight.t(), out=y)

        table = _take(by_token, at).t().contiguous()
        groups_at = groups
        if groups.shape[0] > 1:
            numbers = at
            if isinstance(at, slice):
                numbers = torch.arange(at.start, at.stop, device=y.device)
            groups_at = groups.index_select(0, numbers // (target.numel() // groups.shape[0]))
        dloss_at = _take(dloss, at) if dloss is not None and dloss.dim() else dloss
        ops.linear_chunk.default(
            y, _take(flat_target, at), table, groups_at, class_weight, dloss_at,
            *options.formula, forward, gradient,
        )  # fmt: skip
        if forward:
            by_token[at] = table.t()

        weight_grad.add(y, h) if needs_weight or needs_bias else None
        if needs_hidden:
            rows = active.rows_at(chunk)
            if isinstance(rows, slice):
                torch.mm(y, weight, out=dhidden_rows[rows])
            else:
                # The gathered hidden states are used no more: their place is free.
                dhidden_rows.index_copy_(0, rows, torch.mm(y, weight, out=buffer))
    return dhidden, *weight_grad.results()


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype, reuse: bool) -> Tensor:
    """``gradient * factor``, rounded once to ``dtype``; ``reuse``: nobody else needs gradient."""
    if gradient.dtype == dtype:
        if not reuse:
            return gradient * factor
        return gradient if factor.is_cpu and factor.item() == 1 else gradient.mul_(factor)
    if not reuse or gradient.dim() != 2:
        return (gradient * factor).to(dtype)
    result = _empty_like(gradient, dtype)
    for piece in _pieces(gradient.shape[0], gradient.element_size() * gradient.shape[1]):
        result[piece].copy_(gradient[piece] * factor)
    return result


_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def _kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """What runs inside an operator is neither differentiated nor autocast."""

    def kernel(*args: Any) -> Any:
        with _ops._below_autograd(), torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return function(*args)

    return kernel


@_kernel
def _forward_kernel(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    mask: Tensor | None,
    normalizer: Tensor | None,
    class_weight: Tensor | None,
    *args: Any,
) -> tuple[Tensor, ...]:
    options, needs = Options(*args[:-1]), args[-1]
    _check(hidden, weight, bias, target, options.chunk_tokens, options.accumulation_dtype)
    wide = hidden.dtype == torch.float64
    tokens, groups = ops.linear_weigh.default(
        target, mask, normalizer, class_weight, options.reduction, options.ignore_index,
        weight.shape[0], *options.formula, wide, options.shift, options.stats,
    )  # fmt: skip
    tokens[1:].zero_()
    unit = _unit(hidden, tokens, groups, None) if any(needs) else None
    gradients = _run(
        hidden, weight, bias, target, tokens, groups, class_weight, options, needs, unit, True
    )
    loss, stats = ops.linear_reduce.default(
        tokens, groups, target, options.reduction, options.z_loss, options.stats
    )
    unit = tokens.new_ones(()) if unit is None else unit
    return loss, stats, tokens, groups, unit, *gradients


def _forward_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    mask: Tensor | None,
    normalizer: Tensor | None,
    class_weight: Tensor | None,
    *args: Any,
) -> tuple[Tensor, ...]:
    options, needs = Options(*args[:-1]), args[-1]
    _check(hidden, weight, bias, target, options.chunk_tokens, options.accumulation_dtype)
    rows = hidden.new_empty((*hidden.shape[:-1], 1))
    table = _ops._fake_forward(
        rows, target, mask, normalizer, class_weight, options.reduction, options.stats
    )
    dtype = _dweight_dtype(weight, target.numel(), options.chunk_tokens, options.accumulation_dtype)
    return *table, table[0].new_empty(()), *_fake_gradients(hidden, weight, needs, dtype)


def _fake_gradients(
    hidden: Tensor, weight: Tensor, needs: list[bool], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    wide = _ops._loss_dtype(weight)
    return (
        hidden.new_empty(hidden.shape if needs[0] else (0,)),
        torch.empty_like(weight, dtype=dtype) if needs[1] else weight.new_empty((0,)),
        weight.new_empty((weight.shape[0] if needs[2] else 0,), dtype=wide),
    )


@_kernel
def _backward_kernel(
    dloss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    tokens: Tensor,
    groups: Tensor,
    class_weight: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    shift: bool,
    chunk_tokens: int | None,
    accumulation_dtype: torch.dtype | None,
    pack: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    options = Options(
        "none", 0, label_smoothing, z_loss, softcap, shift, False, chunk_tokens,
        accumulation_dtype, pack,
    )  # fmt: skip
    dloss = dloss.reshape(-1) if dloss.dim() else dloss
    unit = _unit(hidden, tokens, groups, dloss)
    scaled = dloss if unit is None else dloss * unit
    gradients = _run(
        hidden, weight, bias, target, tokens, groups, class_weight, options, needs, scaled, False
    )
    factor = tokens.new_ones(()) if unit is None else 1 / unit
    dhidden, dweight, dbias = (_scaled(g, factor, hidden.dtype, True) for g in gradients)
    return dhidden, dweight, dbias


def _backward_fake(
    dloss: Tensor, hidden: Tensor, weight: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dhidden, dweight, dbias = _fake_gradients(hidden, weight, args[-1], weight.dtype)
    return dhidden, dweight, dbias.to(weight.dtype)


for _name_of_op, _run_op, _fake_op in (
    ("linear_cross_entropy_forward", _forward_kernel, _forward_fake),
    ("linear_cross_entropy_backward", _backward_kernel, _backward_fake),
):
    _library.impl(_name_of_op, _run_op, "CompositeExplicitAutograd")
    torch.library.register_fake(f"masked_loss::{_name_of_op}", _fake_op)
    _overload = getattr(ops, _name_of_op).default
    torch.library.register_vmap(_overload, _ops._loop(_overload))


# How they are differentiated


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    mask: Tensor | None,
    normalizer: Tensor | None,
    class_weight: Tensor | None,
    options: Options,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    with _ops._below_autograd():
        result: tuple[Tensor, ...] = ops.linear_cross_entropy_forward.default(
            hidden, weight, bias, target, mask, normalizer, class_weight, *options, needs
        )
    return result


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, target, mask, _, class_weight, ctx.options, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
    again = ctx.options.reduction == "none"  # or else the gradients are there
    ctx.inputs = (hidden, weight, bias)  # not saved: they may change before backward
    wants_mask = mask is not None and mask.requires_grad
    ctx.save_for_backward(
        *(ctx.inputs if again else (None, None, None)),
        target,
        mask if wants_mask else None,
        class_weight,
        *output[2:],
    )


def _backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * 9
    hidden, weight, bias, target, mask, class_weight, *tables = ctx.saved_tensors
    tokens, groups, unit, *gradients = tables
    needs = list(ctx.needs_input_grad[:3])
    options = ctx.options
    dmask = None
    with _ops._below_autograd():
        if ctx.needs_input_grad[4]:
            dmask = ops.mask_grad.default(
                dloss, mask, tokens, groups, target, class_weight, options.z_loss
            )
        if any(needs) and options.reduction == "none":
            gradients = ops.linear_cross_entropy_backward.default(
                dloss, hidden, weight, bias, target, tokens, groups, class_weight,
                *options.formula, options.shift, *options[-3:], needs,
            )  # fmt: skip
        elif any(needs):
            reuse = _ops._is_plain(dloss) and _ops._is_plain(tokens) and not _ops._keeps_graph()
            factor = dloss / unit
            gradients = [
                _scaled(gradient, factor, dtype, reuse) if needed else None
                for gradient, dtype, needed in zip(gradients, ctx.dtypes, needs, strict=True)
            ]
    results = [
        gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)
    ]
    return *results, None, dmask, None, None, None, None


LinearCrossEntropy = _ops.differentiable(
    "LinearCrossEntropy", _forward, _setup_context, _backward, results=2
)
"""Scalar reductions have their gradients, for dloss = 1, from forward, and only scale them in
backward. With "none" every token may have a dloss of its own: backward computes the logits again.
"""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    mask: Tensor | None,
    normalizer: Tensor | None,
    class_weight: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """loss and stats, with autograd and autocast."""
    if torch.is_autocast_enabled(hidden.device.type):
        hidden, weight = _autocast(hidden), _autocast(weight)
        bias = None if bias is None else _autocast(bias)
    inputs = (hidden, weight, bias)
    args = (*inputs, target, mask, normalizer, class_weight, options)
    if not _ops._differentiated(*inputs, mask):
        loss, stats, *_ = _forward(*args, [False] * 3)
    else:
        scalar = options.reduction != "none"
        needs = [scalar and x is not None and x.requires_grad for x in inputs]
        loss, stats, *_ = LinearCrossEntropy(*args, needs)
    return loss, stats


def _autocast(x: Tensor) -> Tensor:
    """As ``F.linear`` under autocast: everything but float64 in the lower precision."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if x.dtype in _FLOATING[1:] else x


def _public(call: Callable[..., Any], stats: bool) -> Callable[..., Any]:
    """``call`` takes the arguments in forward's order; the public operators take them by name."""

    def operator(
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        mask: Tensor | None = None,
        *,
        bias: Tensor | None = None,
        reduction: str = "mean",
        normalizer: Tensor | None = None,
        ignore_index: int = -100,
        class_weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        shift: bool = False,
        chunk_tokens: int | None = None,
        accumulation_dtype: torch.dtype | None = None,
        pack: bool = True,
    ) -> Any:
        options = Options(
            reduction, ignore_index, label_smoothing, z_loss, softcap, shift, stats,
            chunk_tokens, accumulation_dtype, pack,
        )  # fmt: skip
        loss, statistics, *_ = call(
            hidden, weight, bias, target, mask, normalizer, class_weight, options
        )
        return (loss, statistics) if stats else loss

    return operator


def _flat(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options one by one, and no gradient."""
    return lambda *args: function(*args[:-1], *args[-1], [False] * 3)


def _redispatch_autocast(op: Any, hidden: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
    if kwargs.get("bias") is not None:
        kwargs["bias"] = _autocast(kwargs["bias"])
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
        return op(_autocast(hidden), _autocast(weight), *args, **kwargs)


for _name_of_op, _stats in (("linear_cross_entropy", False), ("linear_cross_entropy_stats", True)):
    _overload = getattr(ops, _name_of_op).default
    torch.library.register_fake(
        f"masked_loss::{_name_of_op}", _public(_flat(_forward_fake), _stats)
    )
    _library.impl(_name_of_op, _public(_flat(_forward_kernel), _stats), "CompositeExplicitAutograd")
    _library.impl(_name_of_op, _public(linear_cross_entropy, _stats), "Autograd")
    for _key in ("AutocastCPU", "AutocastCUDA"):
        _library.impl(_name_of_op, partial(_redispatch_autocast, _overload), _key)
