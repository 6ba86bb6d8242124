# SPDX-License-Identifier: BSD-3-Clause
"""What benchmarks/gpu.py compares with: each loss, ours and what other libraries have for it.

Every candidate takes logits and target (hidden states, weight and target) and gives the loss. A
package that is not there, or does not work here, is left out, and said to be.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import masked_loss
from masked_loss import linear_cross_entropy, masked_cross_entropy

Loss = Callable[..., Tensor]

OURS = "ours"


def ours(**options: Any) -> Loss:
    def loss(logits: Tensor, target: Tensor) -> Tensor:
        found = masked_cross_entropy(logits, target, **options)
        return found[0] if isinstance(found, tuple) else found

    return loss


def _modules(adapters: dict[str, tuple[str, Callable[[Any], Loss]]]) -> dict[str, Loss]:
    found: dict[str, Loss] = {}
    for name, (module, adapt) in adapters.items():
        try:
            found[name] = adapt(importlib.import_module(module))
        except Exception as error:  # a package may be there and not work here
            print(f"{name}: left out ({type(error).__name__}: {error})")
    return found


def cross_entropies(reduction: str, compile_too: bool) -> dict[str, Loss]:
    def eager(x: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(x, t, reduction=reduction)

    found: dict[str, Loss] = {"PyTorch eager": eager}
    if compile_too:
        found["PyTorch compiled"] = torch.compile(eager, dynamic=False)
    flash: Callable[[Any], Loss] = lambda m: lambda x, t: m.cross_entropy_loss(x, t)[0]  # noqa: E731
    if reduction == "mean":
        flash = lambda m: lambda x, t: m.cross_entropy_loss(x, t)[0].sum() / (t != -100).sum()  # noqa: E731
    return found | _modules(
        {
            "Liger": (
                "liger_kernel.transformers.functional",
                lambda m: lambda x, t: m.liger_cross_entropy(x, t, reduction=reduction),
            ),
            "quack": (
                "quack.cross_entropy",
                lambda m: lambda x, t: m.cross_entropy(x, t, reduction=reduction),
            ),
            "flash-attn": ("flash_attn.ops.triton.cross_entropy", flash),
        }
    )


def log_probabilities(compile_too: bool) -> dict[str, Loss]:
    """log p of each token's target, as reinforcement learning wants it."""

    def eager(x: Tensor, t: Tensor) -> Tensor:
        return -F.cross_entropy(x, t, reduction="none")

    found: dict[str, Loss] = {OURS: masked_loss.token_log_probs} if _has("token_log_probs") else {}
    found["PyTorch eager"] = eager
    if compile_too:
        found["PyTorch compiled"] = torch.compile(eager, dynamic=False)
    return found


def divergences(compile_too: bool) -> dict[str, Loss]:
    """KL(teacher || student), averaged over the tokens; the target is not looked at."""

    def teacher(x: Tensor) -> Tensor:
        return x.detach().roll(1, 0)

    def eager(x: Tensor, t: Tensor) -> Tensor:
        p = teacher(x).log_softmax(-1, dtype=torch.float32)
        return F.kl_div(x.log_softmax(-1, dtype=torch.float32), p, None, None, "batchmean", True)

    found: dict[str, Loss] = {}
    if _has("masked_divergence"):
        found[OURS] = lambda x, t: masked_loss.masked_divergence(x, teacher(x))
    found["PyTorch eager"] = eager
    if compile_too:
        found["PyTorch compiled"] = torch.compile(eager, dynamic=False)
    return found


def linear() -> dict[str, Loss]:
    """From hidden states, with no logits kept."""
    return {OURS: linear_cross_entropy} | _modules(
        {
            "cut-cross-entropy": (
                "cut_cross_entropy",
                lambda m: lambda h, w, t: m.linear_cross_entropy(h, w, t),
            ),
            "Liger": (
                "liger_kernel.transformers.functional",
                lambda m: lambda h, w, t: m.liger_fused_linear_cross_entropy(h, w, t),
            ),
        }
    )


def _has(name: str) -> bool:
    return hasattr(masked_loss, name)
