# SPDX-License-Identifier: BSD-3-Clause
"""Log-probabilities for the tests of every backend: inputs, and the check against the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accuracy import accumulation_dtype, compare
from torch import Tensor

from masked_loss import reference, token_log_probs

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "entropy": {"return_entropy": True},
    "softcap": {"softcap": 4.0, "return_entropy": True},
    "temperature": {"temperature": 0.7},
    "temperatures": {"temperature": "tokens", "return_entropy": True},
    "shift": {"shift": True, "return_entropy": True},
    "packed": {"cu_seqlens": "tokens", "shift": True, "return_entropy": True},
    "everything": {
        "temperature": "tokens",
        "softcap": 4.0,
        "shift": True,
        "return_entropy": True,
        "inplace_backward": True,
    },
}


@dataclass
class LogProbSample:
    logits: Tensor
    target: Tensor
    mask: Tensor
    options: dict[str, Any]

    def call(self, function: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        """The results of a function, and the gradient of all of them, computed in ``dtype``."""
        leaf = self.logits.to(dtype).requires_grad_()
        options = dict(self.options)
        if function is reference.token_log_probs:
            options.pop("inplace_backward", None)
        if isinstance(options.get("temperature"), Tensor):
            options["temperature"] = options["temperature"].to(accumulation_dtype(dtype))
        # Not a leaf: in backward it may be overwritten.
        results = function(leaf * 1, self.target, self.mask, **options)
        results = results if isinstance(results, tuple) else (results,)
        random = torch.Generator().manual_seed(1)
        upstream = [torch.randn(r.shape, generator=random).to(r) for r in results]
        (gradient,) = torch.autograd.grad(results, leaf, upstream)
        named = dict(zip(("log_probs", "entropy"), results, strict=False))
        return {name: x.detach() for name, x in {**named, "gradient": gradient}.items()}


def sample(
    classes: int, ids: int | None, options: str, dtype: torch.dtype, shape: tuple[int, ...] = (2, 4)
) -> LogProbSample:
    """A third of the tokens masked, a tenth of the ids ignored, and of several ids some equal."""
    random = torch.Generator().manual_seed(classes)
    logits = (3 * torch.randn(*shape, classes, generator=random)).to(dtype)
    target = torch.randint(classes, (*shape, *(() if ids is None else (ids,))), generator=random)
    if ids and ids > 2:
        target[..., 2] = target[..., 0]
    target[torch.rand(target.shape, generator=random) < 0.1] = -100
    mask = torch.rand(shape, generator=random) < 0.7
    mask[..., -1] = True
    chosen = dict(OPTIONS[options])
    if chosen.get("temperature") == "tokens":
        chosen["temperature"] = 0.5 + torch.rand(shape, generator=random)
    if chosen.get("cu_seqlens") == "tokens":  # an empty sequence, and tokens behind the last
        tokens = mask.numel()
        chosen["cu_seqlens"] = torch.tensor([0, tokens // 3, tokens // 3, tokens - 1])
    return LogProbSample(logits, target, mask, chosen)


def check(
    classes: int,
    ids: int | None,
    options: str,
    dtype: torch.dtype,
    function: Callable[..., Any] = token_log_probs,
) -> None:
    """As exact as eager PyTorch, and one rounding more."""
    s = sample(classes, ids, options, dtype)
    ours = s.call(function, dtype)
    eager = s.call(reference.token_log_probs, accumulation_dtype(dtype))
    truth = s.call(reference.token_log_probs, torch.float64)
    assert ours.keys() == truth.keys()
    eager["gradient"] = eager["gradient"].to(dtype)
    for name, expected in truth.items():
        what = f"{classes} classes, {ids} ids, {options}: {name}"
        errors = compare(ours[name], eager[name], expected, dtype, what, 2)
        assert errors.ours <= errors.eager + errors.rounding, (what, errors)
