# SPDX-License-Identifier: BSD-3-Clause
"""Cross entropy from hidden states: matrix products by PyTorch, the rest by csrc/, chunk by chunk.

The tokens that have a weight are taken some at a time. A chunk's logits are computed into a buffer
that all chunks share, a kernel turns them in place into losses and their own gradient, and two more
products turn that into gradients of hidden and weight. The [tokens, V] logits never exist.
docs/linear_cross_entropy.md has the formulas and counts the memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from masked_loss._op import tables
from masked_loss._op.memory import fresh, logits_pool, weight_pool
from masked_loss._op.tables import ops
from masked_loss.options import Chunking, Meaning

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


class Rows(NamedTuple):
    """What is known of every token before its logits are."""

    target: Tensor
    tokens: Tensor
    groups: Tensor
    class_weight: Tensor | None
    temperatures: Tensor | None
    dloss: Tensor | None  # None for 1, one value, or one for each token


def _largest_chunk(weight: Tensor, chunk_tokens: int | None, more: int = 0) -> int:
    if chunk_tokens is not None:
        return chunk_tokens
    token = (weight.shape[0] + more) * weight.element_size()
    limit = _CHUNK_BYTES.get(weight.device.type, _CHUNK_BYTES["cuda"])
    if weight.is_cpu and weight.element_size() >= 4:
        # MKL packs these types, into 5 to 12 MiB for each thread: the other half is for that, as
        # far as the tokens are enough for fast products.
        limit = max(limit // 2, min(limit, _FAST_TOKENS * token))
    return max(1, limit // token)


def dweight_dtype(weight: Tensor, tokens: int | torch.SymInt, chunking: Chunking) -> torch.dtype:
    """What dweight accumulates in. One bfloat16 product accumulates inside, in float32.

    One float16 product does too, but its sum over many tokens may exceed the largest float16.
    Depends on shapes alone: a compiled graph has to know.
    """
    if chunking.accumulation_dtype is not None:
        return chunking.accumulation_dtype
    if weight.dtype == torch.bfloat16 and tokens <= _largest_chunk(weight, chunking.chunk_tokens):
        return weight.dtype
    return tables.loss_dtype(weight)


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


def unit_of(hidden: Tensor, tokens: Tensor, groups: Tensor, dloss: Tensor | None) -> Tensor | None:
    """A power of two that brings the gradients of float16 logits, which may be as small as
    1 / tokens, to about 1: float16 holds nothing below 6e-8. None stands for 1."""
    if hidden.dtype != torch.float16 or tokens.numel() == 0:
        return None
    largest = tables.weights(tokens).abs().max() * tables.scales(groups).abs().max()
    largest = largest.float()
    if dloss is not None:
        largest = largest * dloss.abs().max()
    exponent = torch.frexp(largest).exponent.clamp(-100, 100)
    unit = torch.ldexp(torch.ones_like(largest), -exponent)
    return torch.where(largest.isfinite() & (largest > 0), unit, 1)


def run_chunks(
    head: Head, rows: Rows, meaning: Meaning, chunking: Chunking, needs: list[bool], forward: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Fills the table of tokens (``forward``), and returns the gradients that are needed.

    dhidden is in its final type, dweight and dbias in what they accumulate in.
    """
    hidden, weight, bias = head
    target, tokens, groups, class_weight, temperatures, dloss = rows
    columns, width = weight.shape
    needs_hidden, needs_weight, needs_bias = needs
    gradient = any(needs)
    active = _Tokens(hidden, tables.weights(tokens), meaning.shift, chunking.pack)

    size = _largest_chunk(weight, chunking.chunk_tokens)
    if active.gathers and target.numel() > size:
        size = _largest_chunk(weight, chunking.chunk_tokens, more=width)
    if active.count > size and chunking.chunk_tokens is None:  # chunks of one size
        even = -(-active.count // -(-active.count // size))
        size = min(size, -(-even // 16) * 16)
    size = min(size, active.count)

    logits = logits_pool.empty((size, columns), weight)
    gathered = hidden.new_empty((size if active.gathers else 0, width))
    dtype = dweight_dtype(weight, target.numel(), chunking)
    weight_grad = _WeightGrad(weight, dtype, needs_weight, needs_bias)
    dhidden = hidden.new_empty(0)
    if needs_hidden:
        partial_rows = active.index is not None or active.count < target.numel()
        make = hidden.new_zeros if partial_rows else hidden.new_empty
        dhidden = make(hidden.shape)
    dhidden_rows = dhidden.view(target.numel(), width) if needs_hidden else dhidden
    flat_target = target.reshape(-1)
    by_token = tokens.t()
    if class_weight is not None:
        class_weight = class_weight.to(tokens.dtype)
    if temperatures is not None:
        temperatures = temperatures.reshape(-1)

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
            groups_at = tables.groups_at(groups, numbers, target.numel())
        dloss_at = _take(dloss, at) if dloss is not None and dloss.dim() else dloss
        each = None if temperatures is None else _take(temperatures, at)
        ops.rows.default(
            y, _take(flat_target, at), table, groups_at, class_weight, each, dloss_at, forward,
            gradient, *meaning,
        )  # fmt: skip
        if forward:
            by_token[at] = table.t()

        weight_grad.add(y, h) if needs_weight or needs_bias else None
        if needs_hidden:
            places = active.rows_at(chunk)
            if isinstance(places, slice):
                torch.mm(y, weight, out=dhidden_rows[places])
            else:
                # The gathered hidden states are used no more: their place is free.
                dhidden_rows.index_copy_(0, places, torch.mm(y, weight, out=buffer))
    return dhidden, *weight_grad.results()


def scaled_by(gradient: Tensor, factor: Tensor, dtype: torch.dtype, reuse: bool) -> Tensor:
    """``gradient * factor``, rounded once to ``dtype``; ``reuse``: nobody else needs gradient."""
    if gradient.dtype == dtype:
        if not reuse:
            return gradient * factor
        return gradient if factor.is_cpu and factor.item() == 1 else gradient.mul_(factor)
    if not reuse or gradient.dim() != 2:
        return (gradient * factor).to(dtype)
    if _is_large(gradient, dtype):
        result = fresh.empty(gradient.shape, gradient, dtype)
    else:
        result = torch.empty_like(gradient, dtype=dtype)
    row_bytes = gradient.element_size() * gradient.shape[1]
    for piece in _pieces(gradient.shape[0], row_bytes, gradient):
        torch.mul(gradient[piece], factor, out=result[piece])  # no product in gradient.dtype
    return result
