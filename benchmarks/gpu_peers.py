# SPDX-License-Identifier: BSD-3-Clause
"""What benchmarks/gpu.py compares with: each loss, ours and what other libraries have for it.

Every candidate takes logits and target (a divergence the teacher's logits; of hidden states hidden,
weight and target) and gives the loss. A package that is not there, or does not work here, is left
out, and said to be.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from gpu_report import OURS
from torch import Tensor

from masked_loss import (
    linear_cross_entropy,
    masked_cross_entropy,
    masked_divergence,
    token_log_probs,
)

Loss = Callable[..., Tensor]


def ours(**options: Any) -> Loss:
    def loss(logits: Tensor, target: Tensor) -> Tensor:
        found = masked_cross_entropy(logits, target, **options)
        return found[0] if isinstance(found, tuple) else found

    return loss


def _eager_and_compiled(eager: Loss, compile_too: bool) -> dict[str, Loss]:
    found = {"PyTorch eager": eager}
    if compile_too:
        found["PyTorch compiled"] = torch.compile(eager, dynamic=False)
    return found


def _modules(adapters: dict[str, tuple[str, Callable[[Any], Loss]]]) -> dict[str, Loss]:
    found: dict[str, Loss] = {}
    for name, (module, adapt) in adapters.items():
        if (imported := _imported(name, module)) is not None:
            found[name] = adapt(imported)
    return found


@cache
def _imported(name: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:  # a package may be there and not work here
        print(f"{name}: left out ({type(error).__name__}: {error})")
        return None


def cross_entropies(reduction: str, compile_too: bool) -> dict[str, Loss]:
    def eager(x: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(x, t, reduction=reduction)

    found = _eager_and_compiled(eager, compile_too)
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


def with_options(
    compile_too: bool, label_smoothing: float, z_loss: float, softcap: float
) -> dict[str, Loss]:
    """The mean with all of these at a time."""

    def eager(x: Tensor, t: Tensor) -> Tensor:
        y = softcap * torch.tanh(x.float() / softcap)
        loss = F.cross_entropy(y, t, label_smoothing=label_smoothing)
        return loss + z_loss * y.logsumexp(-1).square().mean()

    def liger(module: Any) -> Loss:
        return lambda x, t: module.liger_cross_entropy(
            x, t, label_smoothing=label_smoothing, lse_square_scale=z_loss, softcap=softcap
        )

    adapters = {"Liger": ("liger_kernel.transformers.functional", liger)}
    return _eager_and_compiled(eager, compile_too) | _modules(adapters)


def log_probabilities(compile_too: bool) -> dict[str, Loss]:
    """log p of each token's target, as reinforcement learning wants it: by the usual formula."""

    def eager(x: Tensor, t: Tensor) -> Tensor:
        return x.log_softmax(-1).gather(-1, t[:, None])[:, 0]

    return {OURS: token_log_probs, **_eager_and_compiled(eager, compile_too)}


def divergences(compile_too: bool) -> dict[str, Loss]:
    """KL(teacher || student), averaged over the tokens."""

    def log_softmax(x: Tensor) -> Tensor:
        return x.log_softmax(-1, dtype=torch.float32)

    def eager(x: Tensor, y: Tensor) -> Tensor:
        return F.kl_div(log_softmax(x), log_softmax(y), None, None, "batchmean", True)

    found = {OURS: masked_divergence, **_eager_and_compiled(eager, compile_too)}
    return found | _modules(
        {
            "Liger": (
                "liger_kernel.transformers.functional",
                lambda m: lambda x, y: m.liger_kl_div(
                    log_softmax(x), log_softmax(y), reduction="batchmean", log_target=True
                ),
            )
        }
    )


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
