# SPDX-License-Identifier: BSD-3-Clause
"""Logits from hidden states, chunk by chunk: matrix products by PyTorch, the rest by csrc/.

The tokens that have a weight are taken some at a time. A chunk's logits are computed into a buffer
that all chunks share, a function of the loss turns them in place into the tokens' results and their
own gradient, and two more products turn that into gradients of hidden and weight. The [tokens, V]
logits never exist. docs/linear_cross_entropy.md has the formulas and counts the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from masked_loss import reference
from masked_loss._op import checks, exchange, tables
from masked_loss._op.autograd import Inputs
from masked_loss._op.factory import AUTOCAST, Signature, library
from masked_loss._op.memory import fresh, logits_pool, weight_pool
from masked_loss._op.tables import ops
from masked_loss.options import ALL_CLASSES, Chunking, Shards

# Bytes of a chunk's logits, where the caller does not say chunk_tokens.
_CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
# With fewer tokens in a chunk than this, reading the weight takes as long as multiplying by it.
_FAST_TOKENS = 128
# Bytes of the pieces in which a large tensor is converted or added to another type's.
_PIECE_BYTES = 4 << 20


class Head(NamedTuple):
    """What makes logits: hidden [..., D], weight [V, D], bias [V]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


Places = Any
"""Which tokens a chunk has: a slice where they follow one another, else their numbers."""


def _largest_chunk(token: int, weight: Tensor, chunk_tokens: int | None) -> int:
    """token: the bytes that one takes."""
    if chunk_tokens is not None:
        return chunk_tokens
    limit = _CHUNK_BYTES.get(weight.device.type, _CHUNK_BYTES["cuda"])
    if weight.is_cpu and weight.element_size() >= 4:
        # MKL packs these types, into 5 to 12 MiB for each thread: the other half is for that, as
        # far as the tokens are enough for fast products.
        limit = max(limit // 2, min(limit, _FAST_TOKENS * token))
    return max(1, limit // token)


def columns_of(weight: Tensor, shards: Shards) -> int:
    """What chunks are measured by: ranks that share the classes all have to take equally many."""
    bounds = shards.bounds
    return -(-bounds[-1] // (len(bounds) - 1)) if bounds else weight.shape[0]


def _sums_dtype(weight: Tensor, chunking: Chunking) -> torch.dtype:
    """What the gradient of weight is summed in over several chunks."""
    return chunking.accumulation_dtype or tables.loss_dtype(weight)


def _most_at_once(
    logits: torch.dtype, weight: Tensor, needs_weight: bool, chunking: Chunking, shards: Shards
) -> int:
    """How many tokens are one chunk: more than a chunk of several may have, where the sums of
    several would take the memory that the further logits do. Sums are written, read and written
    again, and cast in the end; one product writes its result.

    On the CPU small chunks are for its caches. A sum of float16 may exceed the largest one, so
    there are sums of one chunk, too. Logits wider than the weight are not the only ones.
    """
    columns = columns_of(weight, shards)
    token = columns * logits.itemsize
    most = _largest_chunk(token, weight, chunking.chunk_tokens)
    sums = _sums_dtype(weight, chunking)
    replaced = needs_weight and logits == weight.dtype == torch.bfloat16 != sums
    if replaced and chunking.chunk_tokens is None and not weight.is_cpu:
        most = max(most, columns * weight.shape[1] * sums.itemsize // token)
    return most


def dweight_dtype(
    logits: torch.dtype,
    weight: Tensor,
    tokens: int | torch.SymInt,
    chunking: Chunking,
    shards: Shards = ALL_CLASSES,
) -> torch.dtype:
    """What dweight accumulates in. One bfloat16 product accumulates inside, in float32.

    One float16 product does too, but its sum over many tokens may exceed the largest float16.
    Depends on shapes alone: a compiled graph has to know.
    """
    at_once = weight.dtype == torch.bfloat16 and tokens <= _most_at_once(
        logits, weight, True, chunking, shards
    )
    return weight.dtype if at_once else _sums_dtype(weight, chunking)


def _is_large(x: Tensor, dtype: torch.dtype) -> bool:
    return x.is_cpu and x.is_contiguous() and x.numel() * dtype.itemsize >= _PIECE_BYTES


def _pieces(rows: int, row_bytes: int, of: Tensor) -> Iterator[slice]:
    """Rows that a CPU's caches hold together; elsewhere all of them: a piece is a launch there."""
    step = max(1, _PIECE_BYTES // max(1, row_bytes)) if of.is_cpu else max(1, rows)
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
            self.rows: Tensor | None = hidden.view(weights.numel(), hidden.shape[-1])
        except RuntimeError:  # a layout without rows: chunks are gathered from all its dimensions
            self.rows = None
        self.index: Tensor | None = None
        self.weights: Tensor | None = None
        self.first, self.count = self.shift, max(0, weights.numel() - self.shift)
        if not _may_wait(hidden, pack):
            self.weights = weights
            if self.rows is None:
                self.rows = hidden.reshape(weights.numel(), hidden.shape[-1])
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

    def at(self, chunk: slice) -> Places:
        if self.index is not None:
            return self.index[chunk]
        return slice(self.first + chunk.start, self.first + chunk.stop)

    def rows_at(self, chunk: slice) -> Places:
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


def take(x: Tensor, at: Places) -> Tensor:
    return x[at] if isinstance(at, slice) else x.index_select(0, at)


class TokenTables:
    """The tables of tokens and groups (tables.py), of which a chunk gets its own part."""

    def __init__(self, tokens: Tensor, groups: Tensor) -> None:
        self._by_token, self._groups = tokens.t(), groups

    def of(self, at: Places) -> tuple[Tensor, Tensor]:
        """The tokens' own table, and their groups': one, or one for each token."""
        table = take(self._by_token, at).t().contiguous()
        if self._groups.shape[0] == 1:
            return table, self._groups
        count = self._by_token.shape[0]
        if isinstance(at, slice):
            at = torch.arange(at.start, at.stop, device=table.device)
        return table, tables.groups_at(self._groups, at, count)

    def write(self, at: Places, table: Tensor) -> None:
        self._by_token[at] = table.t()


class Source:
    """Where a chunk's logits come from: the hidden states of the tokens that have a weight."""

    def __init__(self, head: Head, weights: Tensor, shift: bool, chunking: Chunking) -> None:
        self.head = head
        self.tokens = _Tokens(head.hidden, weights, shift, chunking.pack)

    def allocate(self, size: int, dtype: torch.dtype) -> None:
        hidden, weight, _ = self.head
        gathered = size if self.tokens.gathers else 0
        self._gathered = hidden.new_empty((gathered, weight.shape[1]))
        self._logits = logits_pool.empty((size, weight.shape[0]), weight, dtype)

    def buffer(self, chunk: slice) -> Tensor:
        """The place of a chunk's hidden states, where they are gathered."""
        return self._gathered[: chunk.stop - chunk.start]

    def logits(self, chunk: slice) -> tuple[Tensor, Tensor]:
        """hidden and logits of a chunk."""
        _, weight, bias = self.head
        h = self.tokens.hidden_at(chunk, self.buffer(chunk))
        y = self._logits[: chunk.stop - chunk.start]
        if y.dtype == weight.dtype:
            if bias is None:
                torch.mm(h, weight.t(), out=y)
            else:
                torch.addmm(bias, h, weight.t(), out=y)
            return h, y
        if y.is_cuda:
            torch.ops.aten.mm.dtype_out(h, weight.t(), y.dtype, out=y)
        else:  # no product of half types with a float32 result on the CPU
            wide = h.to(y.dtype)
            for piece in _pieces(weight.shape[0], y.element_size() * max(h.shape), weight):
                y[:, piece] = wide @ weight[piece].to(y.dtype).t()
        if bias is not None:
            y += bias
        return h, y


class _WeightGrad:
    """dweight and dbias, summed over chunks; for half types in float32, unless told otherwise."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, needs_weight: bool, needs_bias: bool):
        wide = tables.loss_dtype(weight)
        self.dweight = weight.new_empty(0)
        if needs_weight and _is_large(weight, dtype):
            self.dweight = weight_pool.empty(weight.shape, weight, dtype)
        elif needs_weight:
            self.dweight = torch.empty_like(weight, dtype=dtype)
        self.dbias = weight.new_zeros(weight.shape[0] if needs_bias else 0, dtype=wide)
        self.needs_weight, self.needs_bias = needs_weight, needs_bias
        self.empty = True

    def add(self, dlogits: Tensor, hidden: Tensor) -> None:
        if self.needs_weight:
            self._add_weight(dlogits.t(), hidden)
        if self.needs_bias:
            for piece in _pieces(self.dbias.numel(), 4 * dlogits.shape[0], dlogits):
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
            for piece in _pieces(total.shape[0], total.element_size() * max(hidden.shape), total):
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


def autocast_head(inputs: Inputs, count: int) -> Inputs:
    """The first ``count`` inputs as ``F.linear`` takes them under autocast."""
    hidden, *_ = inputs
    if hidden.is_meta or not torch.is_autocast_enabled(hidden.device.type):
        return inputs
    return (*map(_autocast, inputs[:count]), *inputs[count:])


def cast_under_autocast(head: tuple[str, ...], *names: str) -> None:
    """The same for calls of operators that come as such: by torch.ops, and from compiled graphs."""
    for name in names:
        signature = Signature(name)

        # The default argument keeps this round's signature.
        def call(*args: Any, _of: Signature = signature, **kwargs: Any) -> Any:
            named = vars(_of.bind(args, kwargs))
            named |= {name: _autocast(named[name]) for name in head}
            with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
                return _of.overload(**named)

        for key in ("AutocastCPU", "AutocastCUDA"):
            library.impl(name, call, key)


def _autocast(x: Tensor | None) -> Tensor | None:
    """Everything but float64 in the lower precision."""
    if x is None or x.dtype not in checks.FLOATING or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def fake_gradients(
    a: SimpleNamespace, needs: list[bool], of_weight: torch.dtype, of_bias: torch.dtype
) -> tuple[Tensor, ...]:
    """As run_chunks() gives them, of the arguments hidden and weight."""
    needs_hidden, needs_weight, needs_bias = needs
    dweight = a.weight.new_empty((0,))
    return (
        a.hidden.new_empty(a.hidden.shape if needs_hidden else (0,)),
        torch.empty_like(a.weight, dtype=of_weight) if needs_weight else dweight,
        a.weight.new_empty((a.weight.shape[0] if needs_bias else 0,), dtype=of_bias),
    )


def dense_logits(head: Head, weights: Tensor, shift: bool) -> Tensor:
    """Of all tokens, in the accumulation type, for the derivatives that have no kernel."""
    hidden, weight, bias = head
    wide = tables.loss_dtype(hidden)
    bias = None if bias is None else bias.to(wide)
    return reference.linear_logits(hidden.to(wide), weight.to(wide), bias, weights, shift)


def unit_of(hidden: Tensor, tokens: Tensor, groups: Tensor, dloss: Tensor | None) -> Tensor | None:
    """A power of two that brings the gradients of float16 logits, which may be as small as
    1 / tokens, to about 1: float16 holds nothing below 6e-8. None stands for 1."""
    if hidden.dtype != torch.float16 or tokens.numel() == 0:
        return None
    largest = tables.weights(tokens).abs().max() * tables.scales(groups).abs().max()
    largest = largest.float()
    return _unit(largest if dloss is None else largest * dloss.abs().max())


def unit_for(hidden: Tensor, *upstream: Tensor | None) -> Tensor | None:
    """The same, of gradients that come with a factor of their own for each token."""
    given = [g for g in upstream if g is not None and g.numel()]
    if hidden.dtype != torch.float16 or not given:
        return None
    return _unit(torch.stack([g.abs().max().float() for g in given]).max())


def _unit(largest: Tensor) -> Tensor:
    exponent = torch.frexp(largest).exponent.clamp(-100, 100)
    unit = torch.ldexp(torch.ones_like(largest), -exponent)
    return torch.where(largest.isfinite(), unit, 1)  # of 0 it is 1


def run_chunks(
    source: Source,
    tokens: int,
    chunking: Chunking,
    needs: list[bool],
    rows: Callable[[Tensor, Places, slice], Tensor],
    dtype: torch.dtype,
    prepare: Callable[[int], None] = lambda size: None,
    shards: Shards = ALL_CLASSES,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients that are needed of hidden, weight and bias.

    ``rows(logits, places, chunk)`` does what a loss does with a chunk's logits, of ``dtype``, and
    gives their gradient where one is needed, in the type of hidden. ``prepare(size)`` is told the
    largest chunk before the first one. dhidden is in its final type, dweight and dbias in what
    they accumulate in. Of a shard of the classes dhidden is this rank's part, or with
    ``shards.reduce_hidden`` the sum of all ranks'.
    """
    hidden, weight, _ = source.head
    width = weight.shape[1]
    needs_hidden, needs_weight, needs_bias = needs
    active = source.tokens

    size = _most_at_once(dtype, weight, needs_weight, chunking, shards)
    if tokens > size:
        token = columns_of(weight, shards) * dtype.itemsize
        if active.gathers:
            token += width * weight.element_size()
        size = _largest_chunk(token, weight, chunking.chunk_tokens)
    if active.count > size and chunking.chunk_tokens is None:  # chunks of one size
        even = -(-active.count // -(-active.count // size))
        size = min(size, -(-even // 16) * 16)
    size = min(size, active.count)
    source.allocate(size, dtype)
    prepare(size)

    of_weight = dweight_dtype(dtype, weight, tokens, chunking, shards)
    weight_grad = _WeightGrad(weight, of_weight, needs_weight, needs_bias)
    dhidden = hidden.new_empty(0)
    if needs_hidden:
        partial_rows = active.index is not None or active.count < tokens
        make = hidden.new_zeros if partial_rows else hidden.new_empty
        dhidden = make(hidden.shape)
    dhidden_rows = dhidden.view(tokens, width) if needs_hidden else dhidden

    for begin in range(0, active.count, max(1, size)):
        chunk = slice(begin, min(begin + size, active.count))
        h, y = source.logits(chunk)
        dlogits = rows(y, active.at(chunk), chunk)
        if needs_weight or needs_bias:
            weight_grad.add(dlogits, h)
        if needs_hidden:
            places = active.rows_at(chunk)
            if isinstance(places, slice):
                torch.mm(dlogits, weight, out=dhidden_rows[places])
            else:
                # The gathered hidden states are used no more: their place is free.
                part = torch.mm(dlogits, weight, out=source.buffer(chunk))
                dhidden_rows.index_copy_(0, places, part)
    if needs_hidden and shards.reduce_hidden:
        exchange.add_up(dhidden, shards)
    return dhidden, *weight_grad.results()


def scaled_by(gradient: Tensor, factor: Tensor | None, dtype: torch.dtype, reuse: bool) -> Tensor:
    """``gradient * factor``, rounded once to ``dtype``; ``reuse``: nobody else needs gradient.

    None stands for 1, of which a device does not know before it has read it.
    """
    if gradient.dtype == dtype:
        if factor is None:
            return gradient
        if not reuse:
            return gradient * factor
        if factor.is_cpu:
            return gradient if factor.item() == 1 else gradient.mul_(factor)
        return _scaled_on_device(gradient, factor, gradient)
    if not reuse or gradient.dim() != 2:
        return (gradient if factor is None else gradient * factor).to(dtype)
    if factor is not None and not factor.is_cpu:
        return _scaled_on_device(gradient, factor, torch.empty_like(gradient, dtype=dtype))
    if _is_large(gradient, dtype):
        result = fresh.empty(gradient.shape, gradient, dtype)
    else:
        result = torch.empty_like(gradient, dtype=dtype)
    row_bytes = gradient.element_size() * gradient.shape[1]
    for piece in _pieces(gradient.shape[0], row_bytes, gradient):
        if factor is None:
            result[piece].copy_(gradient[piece])
        else:  # no product in gradient.dtype
            torch.mul(gradient[piece], factor, out=result[piece])
    return result


def _scaled_on_device(gradient: Tensor, factor: Tensor, into: Tensor) -> Tensor:
    """PyTorch's product with a number on the device computes an index for each element."""
    if not gradient.is_contiguous():
        return torch.mul(gradient, factor, out=into)
    ops.scale.default(into, gradient, factor)
    return into
