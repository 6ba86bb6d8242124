# SPDX-License-Identifier: BSD-3-Clause
"""Every kernel once, on one small problem, for compute-sanitizer; also on the CPU: `... cpu`.

No reference, no pytest: a tool that makes a kernel a hundred times slower gets through in seconds.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import torch

from masked_loss import (
    linear_cross_entropy,
    masked_cross_entropy,
    masked_divergence,
    masked_reduce,
    token_log_probs,
)
from masked_loss.options import Shards

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Every team of warps; rows in parts; rows that begin anywhere.
CLASSES = (37, 1000, 3001, 5003, 20_001, 40_000)
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 10.0},
)
MASK = [1.0, 0.0, 2.0, 1.0, 0.5]


def rows(device: str, dtype: torch.dtype, classes: int, options: dict[str, Any]) -> None:
    tokens = len(MASK)
    target = torch.randint(classes, (tokens,), device=device)
    mask = torch.tensor(MASK, device=device, requires_grad=True)
    for first in (0, 1):  # at the beginning of 16 bytes, and not
        wide = torch.randn(tokens, classes + 7, device=device, dtype=dtype)
        logits = wide[:, first : first + classes].requires_grad_()
        loss, _ = masked_cross_entropy(logits, target, mask, return_stats=True, **options)
        (3 * loss).backward()  # a gradient of 1 was computed already: rescaled
        masked_cross_entropy(logits, target, reduction="none", **options).sum().backward()
    logits = torch.randn(tokens, classes, device=device, dtype=dtype, requires_grad=True)
    masked_cross_entropy(logits * 1, target, inplace_backward=True, **options).backward()


def other_losses(device: str, dtype: torch.dtype, classes: int) -> None:
    tokens = len(MASK)
    logits = torch.randn(tokens, classes, device=device, dtype=dtype, requires_grad=True)
    teacher = torch.randn(tokens, classes, device=device, dtype=dtype)
    for kind in ("forward_kl", "reverse_kl", "jsd"):
        masked_divergence(logits, teacher, kind=kind).backward()
        masked_divergence(logits.detach(), teacher, kind=kind)
    if classes < 5000:  # other types, options, and memory
        mask = torch.tensor(MASK, device=device)
        masked_divergence(logits, teacher, mask, softcap=10.0).backward()
        masked_divergence(logits, teacher.half(), mask, kind="skew_reverse_kl").backward()
        masked_divergence(logits * 1, teacher, return_stats=True, inplace_backward=True)[
            0
        ].backward()
    target = torch.randint(classes, (tokens,), device=device)
    ids = torch.randint(classes, (tokens, 3), device=device)
    log_probs, entropy = token_log_probs(logits, ids, return_entropy=True, temperature=0.7)
    (log_probs.sum() + entropy.sum()).backward()
    token_log_probs(logits, target).sum().backward()
    masked_cross_entropy(logits.detach(), target, label_smoothing=0.1, return_stats=True)
    one_shard = Shards("", [0, classes])
    masked_cross_entropy(logits, target, vocab=one_shard).backward()
    token_log_probs(logits, ids, vocab=one_shard).sum().backward()


def clusters(device: str) -> None:
    """Fused rows that several blocks share, most of them masked."""
    target = torch.full((300,), -100, device=device)
    target[::60] = 1
    for dtype, classes in ((torch.float32, 60_001), (torch.bfloat16, 110_001)):
        logits = torch.randn(300, classes, device=device, dtype=dtype, requires_grad=True)
        masked_cross_entropy(logits, target).backward()
        masked_cross_entropy(logits * 1, target, inplace_backward=True).backward()


def tokens_alone(device: str) -> None:
    # By one block; in pieces, in groups of pieces, many groups.
    for shape in ((5000,), (9000,), (3, 3049), (300, 2)):
        values = torch.randn(shape, device=device, requires_grad=True)
        masked_reduce(values, reduction="sequence_mean").backward()


def linear(device: str, dtype: torch.dtype) -> None:
    for classes in (4999, 5000):
        hidden = torch.randn(65, 33, device=device, dtype=dtype, requires_grad=True)
        weight = torch.randn(classes, 33, device=device, dtype=dtype, requires_grad=True)
        target = torch.randint(classes, (65,), device=device)
        for factor in (1, 3):  # the gradients are there already: they are scaled
            (factor * linear_cross_entropy(hidden, weight, target, chunk_tokens=24)).backward()


def main(device: str = "cuda") -> None:
    torch.manual_seed(0)
    for case in itertools.product(DTYPES, CLASSES, OPTIONS):
        rows(device, *case)
    for dtype, classes in itertools.product(DTYPES, CLASSES):
        other_losses(device, dtype, classes)
    tokens_alone(device)
    clusters(device)
    for dtype in DTYPES:
        linear(device, dtype)
    if device == "cuda":
        torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main(*sys.argv[1:])
