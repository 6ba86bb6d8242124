# SPDX-License-Identifier: BSD-3-Clause
"""Memory for large results on the CPU, kept from one step to the next.

A gradient of logits is the largest tensor of a training step. Allocated anew, its pages come from
the system one after the other, zeroed: for 128 MiB that takes longer than computing the gradient.
So the memory of the last one is used again as soon as nobody else refers to it.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
from contextlib import suppress

import torch
from torch import Tensor

# Smaller ones come from malloc, which keeps its memory itself.
_LARGE = 32 << 20

# Without the global interpreter lock a reference count is not exact: nothing is kept then.
_KEEPS = (
    os.environ.get("MASKED_LOSS_KEEP_MEMORY", "1") != "0"
    and getattr(sys, "_is_gil_enabled", lambda: True)()
)


class Kept:
    """The memory of the last tensor that was made here, for the next one: one block, or none."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.forget()

    def forget(self) -> None:
        self._block: mmap.mmap | None = None
        self._idle_references = 0  # of the block while no tensor refers to it

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor."""
        return _tensor(self._take(torch.Size(shape).numel() * dtype.itemsize), shape, dtype)

    def _take(self, size: int) -> mmap.mmap:
        """A block of at least ``size`` bytes that no tensor refers to."""
        if not _KEEPS:
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
    with suppress(OSError):  # only a wish: not every kernel has huge pages
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


def _tensor(block: mmap.mmap, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(block, dtype=dtype, count=torch.Size(shape).numel()).view(shape)


def huge_empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor on the CPU in huge pages, which come sooner than small ones."""
    return _tensor(_allocate(torch.Size(shape).numel() * dtype.itemsize), shape, dtype)


_logits = Kept()


def gradient_like(values: Tensor) -> Tensor:
    """An uninitialised, contiguous tensor like ``values``."""
    if values.numel() * values.element_size() < _LARGE:  # the same, sooner
        return torch.empty_like(values, memory_format=torch.contiguous_format)
    return kept_empty(values.shape, values)


def kept_empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An uninitialised tensor of ``shape``, of the type and on the device of ``like``."""
    if torch.Size(shape).numel() * like.element_size() < _LARGE or like.device.type != "cpu":
        return like.new_empty(shape)
    return _logits.empty(shape, like.dtype)
