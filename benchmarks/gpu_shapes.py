# SPDX-License-Identifier: BSD-3-Clause
"""A few launches of each row kernel, for a profiler: `ncu python gpu_shapes.py`.

The losses alone and with the gradient in the same pass, by shape; then other losses and options.
gpu_counters.py reads what the profiler counted.
"""

from __future__ import annotations

import sys

import torch

from masked_loss import masked_cross_entropy, masked_divergence, token_log_probs

SHAPES = [
    *((8192, v, torch.bfloat16) for v in (4096, 6400, 32000, 50257, 128256)),
    (4096, 128256, torch.float32),
    (16, 151936, torch.bfloat16),
]
OTHERS = 8192, 32000, torch.bfloat16


def problem(
    tokens: int, classes: int, dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.empty(tokens, classes, device=device, dtype=dtype).normal_(std=3)
    return logits, torch.randint(classes, (tokens,), device=device)


def main(device: str = "cuda") -> None:
    small = [(4, 4096, torch.bfloat16)]
    for shape in SHAPES if device == "cuda" else small:
        logits, target = problem(*shape, device)
        masked_cross_entropy(logits, target)
        masked_cross_entropy(logits.requires_grad_(), target)
    logits, target = problem(*(OTHERS if device == "cuda" else small[0]), device)
    teacher = logits.roll(1, 0)
    token_log_probs(logits, target)
    logits.requires_grad_()
    masked_cross_entropy(logits, target, label_smoothing=0.1, z_loss=1e-3, softcap=30.0)
    masked_divergence(logits, teacher)
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(*sys.argv[1:])
