# SPDX-License-Identifier: BSD-3-Clause
"""Which devices the tests run on."""

from __future__ import annotations

import torch

import masked_loss


def has_cuda() -> bool:
    """Whether there is a CUDA device and the library was built with CUDA kernels."""
    if not torch.cuda.is_available():
        return False
    try:
        masked_loss.masked_mean(torch.ones(1, device="cuda"), None)
    except RuntimeError as error:
        if "this build has no CUDA kernels" in str(error):
            return False
        raise
    return True
