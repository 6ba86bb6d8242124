# SPDX-License-Identifier: BSD-3-Clause
"""Whether the tensors that logits are to be computed from are still what they were.

PyTorch counts writes in a tensor's version, but not all of them: optimizers with ``fused=True``,
those of bitsandbytes, apex and DeepSpeed, which write through pointers, and writes through
``.data`` leave it alone. So one element of each row is kept and compared: a row of a weight that
anybody has written into as a whole has another one, whoever it was.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_WHOLE = 4096  # up to so many elements are all compared
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Snapshot:
    """Versions and samples of tensors [..., D], as they are now.

    A sample reads one element of each D, another column in each row: 1 / D of the bytes that the
    head's product reads. Its comparison waits for the device on CUDA; while a stream is captured
    nothing is sampled.
    """

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        self.tensors = [x for x in tensors if x is not None]
        self.versions = [_version(x) for x in self.tensors]
        self.samples = None if self._is_captured() else [_sample(x).clone() for x in self.tensors]

    def is_freed(self) -> bool:
        """Whether the memory of one was given back, as FSDP does: to read it would be a crash."""
        return any(x.numel() and not x.untyped_storage().nbytes() for x in self.tensors)

    def counts_a_write(self) -> bool:
        """What costs nothing to ask: whether PyTorch has counted a write."""
        return self.versions != [_version(x) for x in self.tensors]

    def differs(self) -> bool:
        """Whether the tensors have changed, counted or not."""
        if self.counts_a_write():
            return True
        if self.samples is None or self._is_captured():
            return False
        pairs = zip(self.tensors, self.samples, strict=True)
        return not all(torch.equal(_bits(_sample(x)), _bits(kept)) for x, kept in pairs)

    def _is_captured(self) -> bool:
        return self.tensors[0].is_cuda and torch.cuda.is_current_stream_capturing()


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _sample(x: Tensor) -> Tensor:
    flat = x.detach().reshape(-1)
    width = x.shape[-1] if x.dim() > 1 else 1
    return flat[:: max(1, width - 1)] if flat.numel() > _WHOLE else flat


def _bits(x: Tensor) -> Tensor:
    """As integers: a NaN equals itself."""
    return x.view(_BITS[x.element_size()])
