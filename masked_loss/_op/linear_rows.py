# SPDX-License-Identifier: BSD-3-Clause
"""Logits from hidden states, chunk by chunk, for losses of rows: matrix products by PyTorch.

The chunks are those of linear_chunks.py. What is done with a chunk's logits is a function: it
leaves the tokens' results where they belong, and turns the logits into their gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from masked_loss._op import tables
from masked_loss._op.linear_chunks import (
    Head,
    _largest_chunk,
    _take,
    _Tokens,
    _WeightGrad,
    dweight_dtype,
)
from masked_loss._op.memory import logits_pool
from masked_loss.options import Chunking

Places = Any
"""Which tokens a chunk has: a slice, or their numbers."""
Take = Callable[[Tensor, Places], Tensor]
take: Take = _take


class Source:
    """Where a chunk's logits come from: the hidden states of the tokens that have a weight."""

    def __init__(self, head: Head, weights: Tensor, shift: bool, chunking: Chunking) -> None:
        self.head = head
        self.tokens = _Tokens(head.hidden, weights, shift, chunking.pack)
        self.count = self.tokens.count

    def allocate(self, size: int, dtype: torch.dtype) -> None:
        hidden, weight, _ = self.head
        width = weight.shape[1] if self.tokens.gathers else 0
        self._gathered = hidden.new_empty((size if width else 0, width))
        self._logits = logits_pool.empty((size, weight.shape[0]), weight, dtype)

    def logits(self, chunk: slice) -> tuple[Tensor, Tensor]:
        """hidden and logits of a chunk."""
        _, weight, bias = self.head
        h = self.tokens.hidden_at(chunk, self._gathered[: chunk.stop - chunk.start])
        y = self._logits[: chunk.stop - chunk.start]
        if y.dtype == weight.dtype:
            torch.mm(h, weight.t(), out=y)
        elif y.is_cuda:
            torch.ops.aten.mm.dtype_out(h, weight.t(), y.dtype, out=y)
        else:  # no product of half types with a float32 result on the CPU
            wide = h.to(y.dtype)
            for begin in range(0, weight.shape[0], 4096):
                piece = slice(begin, begin + 4096)
                y[:, piece] = wide @ weight[piece].to(y.dtype).t()
        if bias is not None:
            y += bias
        return h, y


def run_rows(
    source: Source,
    tokens: int,
    chunking: Chunking,
    needs: list[bool],
    rows: Callable[[Tensor, Places, slice], Tensor],
    dtype: torch.dtype,
    prepare: Callable[[int], None] = lambda size: None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients that are needed, in what they accumulate in.

    ``rows(logits, places, chunk)`` gives the gradient of the logits, where one is needed, in the
    type of hidden. ``prepare(size)`` is told the largest chunk before the first one.
    """
    hidden, weight, _ = source.head
    width = weight.shape[1]
    needs_hidden, needs_weight, needs_bias = needs
    active = source.tokens
    # Chunks hold logits of ``dtype``, which may be wider than the weight.
    wider = (weight.shape[0] * (dtype.itemsize - weight.element_size())) // weight.element_size()
    size = _largest_chunk(weight, chunking.chunk_tokens, more=width + wider)
    if active.count > size and chunking.chunk_tokens is None:  # chunks of one size
        even = -(-active.count // -(-active.count // size))
        size = min(size, -(-even // 16) * 16)
    size = min(size, active.count)
    source.allocate(size, dtype)
    prepare(size)

    weight_grad = _WeightGrad(
        weight, dweight_dtype(weight, tokens, chunking), needs_weight, needs_bias
    )
    dhidden = hidden.new_zeros(hidden.shape if needs_hidden else (0,))
    dhidden_rows = dhidden.view(tokens, width) if needs_hidden else dhidden
    for begin in range(0, active.count, max(1, size)):
        chunk = slice(begin, min(begin + size, active.count))
        h, y = source.logits(chunk)
        dlogits = rows(y, active.at(chunk), chunk)
        if needs_weight or needs_bias:
            weight_grad.add(dlogits, h)
        if needs_hidden:
            dhidden_rows[active.rows_at(chunk)] = torch.mm(dlogits, weight)
    return dhidden, *weight_grad.results()


def check_head(who: str, head: Head, chunking: Chunking, prefix: str = "") -> None:
    """As csrc/ops/check.h would, of what only PyTorch's products see."""
    hidden, weight, bias = head

    def fail(error: type[Exception], text: str) -> None:
        raise RuntimeError(f"{error.__name__}: {who}: {text}")

    floating = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    if hidden.dtype not in floating:
        names = "float64, float32, bfloat16 or float16"
        fail(TypeError, f"{prefix}hidden must be {names}, got {_name(hidden)}")
    if hidden.dim() == 0:
        fail(ValueError, f"{prefix}hidden must have shape [..., D], got []")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        wanted = f"[V, {hidden.shape[-1]}]"
        fail(ValueError, f"{prefix}weight must have shape {wanted}, got {list(weight.shape)}")
    if bias is not None and list(bias.shape) != [weight.shape[0]]:
        fail(
            ValueError,
            f"{prefix}bias must have shape [{weight.shape[0]}], got {list(bias.shape)}",
        )
    for what, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.dtype != hidden.dtype:
            like = f"{_name(hidden)} like {prefix}hidden"
            fail(TypeError, f"{prefix}{what} must be {like}, got {_name(x)}")
    if chunking.chunk_tokens is not None and chunking.chunk_tokens < 1:
        fail(ValueError, f"chunk_tokens must be at least 1, got {chunking.chunk_tokens}")
    allowed = (None, weight.dtype, tables.loss_dtype(weight))
    if chunking.accumulation_dtype not in allowed:
        fail(
            ValueError,
            f"accumulation_dtype must be {tables.loss_dtype(weight)} or that of weight, "
            f"{weight.dtype}, got {chunking.accumulation_dtype}",
        )


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def unit_for(hidden: Tensor, *upstream: Tensor | None) -> Tensor | None:
    """A power of two that brings float16 gradients to about 1; see unit_of."""
    given = [g for g in upstream if g is not None and g.numel()]
    if hidden.dtype != torch.float16 or not given:
        return None
    largest = torch.stack([g.abs().max().float() for g in given]).max()
    exponent = torch.frexp(largest).exponent.clamp(-100, 100)
    unit = torch.ldexp(torch.ones_like(largest), -exponent)
    return torch.where(largest.isfinite() & (largest > 0), unit, 1)
