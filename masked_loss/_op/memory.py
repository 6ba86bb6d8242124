# SPDX-License-Identifier: BSD-3-Clause
"""Where large results on the CPU lie: in memory that is kept from one step to the next.

A gradient of logits is the largest tensor of a training step. Allocated anew, its pages come from
the system one after the other, zeroed: for 128 MiB that takes longer than computing the gradient.
So each kind of result has a pool, which uses the memory of its last one again as soon as nobody
else refers to it. Memory that is not kept at least comes in huge pages.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
from contextlib import suppress

import torch
from torch import Tensor


def _is_kept() -> bool:
    setting = os.environ.get("MASKED_LOSS_KEEP_MEMORY", "1")
    if setting.lower() not in ("0", "false", "no", "off", "1", "true", "yes", "on"):
        raise ValueError(f"masked_loss: MASKED_LOSS_KEEP_MEMORY must be 0 or 1, got {setting!r}")
    # Without the global interpreter lock a reference count is not exact: nothing is kept then.
    gil = getattr(sys, "_is_gil_enabled", lambda: True)()
    return gil and setting.lower() in ("1", "true", "yes", "on")


_KEEPS = _is_kept()


class Pool:
    """The memory of the last tensor that was made here, for the next one: one block, or none.

    Results below ``at_least`` bytes come from malloc, which keeps its memory itself.
    """

    def __init__(self, at_least: int, keeps: bool = _KEEPS) -> None:
        self._at_least, self._keeps = at_least, keeps
        self.start_anew()

    def start_anew(self) -> None:
        """With a lock of its own: in a forked child nobody releases one that was held."""
        self._lock = threading.Lock()
        self._block: mmap.mmap | None = None
        self._idle_references = 0  # of the block while no tensor refers to it

    def forget(self) -> None:
        with self._lock:
            self._block = None

    def empty(
        self, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        """An uninitialised tensor of ``shape`` on the device of ``like``, and of its type."""
        dtype = dtype or like.dtype
        size = torch.Size(shape).numel() * dtype.itemsize
        if size < self._at_least or not like.is_cpu:
            return like.new_empty(shape, dtype=dtype)
        try:
            block = self._take(size)
        except (OSError, OverflowError):
            return like.new_empty(shape, dtype=dtype)  # succeeds, or fails as PyTorch does
        return torch.frombuffer(block, dtype=dtype, count=size // dtype.itemsize).view(shape)

    def empty_like(self, values: Tensor) -> Tensor:
        """An uninitialised, contiguous tensor like ``values``."""
        if values.nbytes < self._at_least:  # the same, sooner
            return torch.empty_like(values, memory_format=torch.contiguous_format)
        return self.empty(values.shape, values)

    def _take(self, size: int) -> mmap.mmap:
        """A block of at least ``size`` bytes that no tensor refers to."""
        if not self._keeps:
            return _allocate(size)
        with self._lock:
            block = self._block
            if block is None or not self._is_idle() or not _fits(size, len(block)):
                del block
                self._block = None  # an idle block that does not fit goes first
                self._block = block = _allocate(size)
                self._idle_references = self._references()
            return block

    def _references(self) -> int:
        # What the interpreter itself adds to the count differs between its versions, so the count
        # is only ever compared with one that this same line took.
        return sys.getrefcount(self._block)

    def _is_idle(self) -> bool:
        """A tensor made of the block holds a reference to it."""
        return self._references() <= self._idle_references


def _fits(size: int, capacity: int) -> bool:
    return size <= capacity <= size + size // 4


def _allocate(size: int) -> mmap.mmap:
    if sys.platform != "linux":
        return mmap.mmap(-1, size)
    # Private: by default a forked child would go on writing into its parent's gradient, and shared
    # memory gets no huge pages.
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # madvise is advisory: not every kernel has huge pages
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


logits_pool = Pool(32 << 20)
"""Gradients of logits, and the logits of one chunk of a linear loss."""
weight_pool = Pool(4 << 20)
"""Sums of a head's gradient."""
fresh = Pool(4 << 20, keeps=False)
"""Results that their owner keeps for longer than a step: in huge pages, which come sooner."""

_POOLS = (logits_pool, weight_pool, fresh)


def empty_cache() -> None:
    """Gives back the memory that is kept for the next large gradient.

    As :func:`torch.cuda.memory.empty_cache`, for the CPU: what a tensor still refers to goes with
    that tensor. With ``MASKED_LOSS_KEEP_MEMORY=0`` in the environment nothing is kept at all.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.cuda.memory.empty_cache.html

    >>> import masked_loss
    >>> masked_loss.empty_cache()
    """
    for pool in _POOLS:
        pool.forget()


def _start_anew() -> None:
    for pool in _POOLS:
        pool.start_anew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)
