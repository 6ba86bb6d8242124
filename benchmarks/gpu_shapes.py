# SPDX-License-Identifier: BSD-3-Clause
"""One forward and one fused launch of each shape, for a profiler: `ncu python gpu_shapes.py`.

Read first: smsp__issue_active (0.75 to 0.85 where the model says that issue slots are the limit),
the stalls long_scoreboard, math_pipe and barrier, and the occupancy that was reached.
"""

from __future__ import annotations

import sys

import torch

from masked_loss import masked_cross_entropy

SHAPES = [(8192, 4096), (8192, 6400), (8192, 32000), (8192, 50257), (8192, 128256), (16, 151936)]


def main(device: str = "cuda") -> None:
    for n, v in SHAPES if device == "cuda" else [(4, 4096)]:
        logits = torch.empty(n, v, device=device, dtype=torch.bfloat16).normal_(std=3)
        target = torch.randint(v, (n,), device=device)
        masked_cross_entropy(logits, target)
        masked_cross_entropy(logits.requires_grad_(), target)
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(*sys.argv[1:])
