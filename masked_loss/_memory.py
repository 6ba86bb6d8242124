# SPDX-License-Identifier: BSD-3-Clause
"""Memory for large gradients on the CPU, kept from one step to the next.

A gradient of logits is the largest tensor of a training step. Allocated anew, its pages come from
the system one after the other, zeroed: for 128 MiB that takes longer than computing the gradient.
So the memory of the last one is used again as soon as nobody else refers to it. At most one idle
block is kept.
"""

from __future__ import annotations

import mmap
import sys
import threading

import torch
from torch import Tensor

# Smaller ones come from malloc, which keeps its memory itself.
_LARGE = 32 << 20

_lock = threading.Lock()
_block: mmap.mmap | None = None
_idle_references = 0  # of _block while no tensor refers to it

# Without the global interpreter lock a reference count is not exact: nothing is kept then.
_KEEPS = getattr(sys, "_is_gil_enabled", lambda: True)()


def gradient_like(values: Tensor) -> Tensor:
    """An uninitialised, contiguous tensor like ``values``."""
    if values.numel() * values.element_size() < _LARGE:  # the same, sooner
        return torch.empty_like(values, memory_format=torch.contiguous_format)
    return kept_empty(values.shape, values)


def kept_empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An uninitialised tensor of ``shape``, of the type and on the device of ``like``."""
    count = torch.Size(shape).numel()
    size = count * like.element_size()
    if size < _LARGE or like.device.type != "cpu":
        return like.new_empty(shape)
    return torch.frombuffer(_take(size), dtype=like.dtype, count=count).view(shape)


def _take(size: int) -> mmap.mmap:
    """A block of at least ``size`` bytes that no tensor refers to."""
    global _block, _idle_references
    with _lock:
        if not _KEEPS or _block is None or not _is_idle() or not _fits(size, len(_block)):
            _block = None  # an idle block that does not fit goes first
            _block = _allocate(size)
            _idle_references = _references()
        return _block


def _references() -> int:
    # What the interpreter itself adds to the count differs between its versions, so the count is
    # only ever compared with one that this same line took.
    return sys.getrefcount(_block)


def _is_idle() -> bool:
    """A tensor made of the block holds a reference to it."""
    return _references() <= _idle_references


def _fits(size: int, capacity: int) -> bool:
    return size <= capacity <= size + size // 4


def _allocate(size: int) -> mmap.mmap:
    if sys.platform != "linux":
        return mmap.mmap(-1, size)
    # Private: by default a forked child would go on writing into its parent's gradient, and shared
    # memory gets no huge pages.
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.madvise(mmap.MADV_HUGEPAGE)
    return block
