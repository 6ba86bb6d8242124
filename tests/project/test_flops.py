# SPDX-License-Identifier: BSD-3-Clause
"""FlopCounterMode counts the products of the losses from hidden states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import masked_loss

N, V, D = 24, 37, 16
PRODUCT = 2 * N * V * D


def flops_of(reduction: str, *needs: bool, **options: Any) -> tuple[int, int]:
    """Of forward and backward."""
    hidden, weight = (
        torch.randn(n, D, requires_grad=need) for n, need in zip((N, V), needs, strict=False)
    )
    target = torch.randint(V, (N,))
    mask = torch.arange(N) % 3 > 0
    with FlopCounterMode(display=False) as forward:
        loss: Tensor = masked_loss.linear_cross_entropy(
            hidden, weight, target, mask, reduction=reduction, **options
        )
    with FlopCounterMode(display=False) as backward:
        if loss.requires_grad:
            loss.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("reduction", ["mean", "sum", "sequence_mean"])
def test_scalar_reductions_compute_their_gradients_in_forward(reduction: str) -> None:
    for needs in ((True, True), (True, False), (False, True), (False, False)):
        assert flops_of(reduction, *needs) == (PRODUCT * (1 + sum(needs)), 0)


def test_none_computes_the_logits_again_in_backward() -> None:
    for needs in ((True, True), (True, False), (False, True)):
        assert flops_of("none", *needs) == (PRODUCT, PRODUCT * (1 + sum(needs)))
    assert flops_of("none", False, False) == (PRODUCT, 0)
    assert flops_of("none", True, True, chunk_tokens=5) == (PRODUCT, 3 * PRODUCT)


def test_without_autograd_and_with_statistics() -> None:
    hidden, weight, target = (
        torch.randn(2, N // 2, D),
        torch.randn(V, D),
        torch.ones(2, N // 2).long(),
    )
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode, FlopCounterMode(display=False) as counter:
            masked_loss.linear_cross_entropy(hidden, weight, target, return_stats=True)
            torch.ops.masked_loss.linear_cross_entropy(hidden, weight, target, bias=torch.ones(V))
        assert counter.get_total_flops() == 2 * PRODUCT


@pytest.mark.parametrize("entropy", [False, True])
def test_log_probabilities_compute_the_logits_again_in_backward(entropy: bool) -> None:
    hidden, weight, target = torch.randn(N, D), torch.randn(V, D), torch.randint(V, (N,))

    def log_probs() -> Tensor:
        found = masked_loss.linear_token_log_probs(hidden, weight, target, return_entropy=entropy)
        return found[1] if isinstance(found, tuple) else found

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        log_probs()
    assert counter.get_total_flops() == PRODUCT
    hidden.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        log_probs().sum().backward()
    assert counter.get_total_flops() == 3 * PRODUCT


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_teacher_has_logits_and_no_gradients(reduction: str) -> None:
    hidden, weight = torch.randn(N, D), torch.randn(V, D)
    teacher = torch.randn(N, 2 * D), torch.randn(V, 2 * D)
    logits = 3 * PRODUCT  # both
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        masked_loss.linear_divergence(hidden, weight, *teacher, return_stats=True)
    assert counter.get_total_flops() == logits
    hidden.requires_grad_(), weight.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        loss: Tensor = masked_loss.linear_divergence(hidden, weight, *teacher, reduction=reduction)
        loss.sum().backward()
    times = 1 if reduction == "mean" else 2
    assert counter.get_total_flops() == times * logits + 2 * PRODUCT


def test_a_fused_model_counts_as_much_as_the_stock_one() -> None:
    totals = []
    for fuse in (False, True):
        model = nn.Sequential(nn.Linear(D, D))
        model.lm_head = nn.Linear(D, V, bias=False)
        if fuse:
            masked_loss.fuse_linear_loss(model)
        with FlopCounterMode(display=False) as counter:
            logits = model.lm_head(model[0](torch.randn(N, D)))
            nn.functional.cross_entropy(logits, torch.randint(V, (N,))).backward()
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 3 * PRODUCT
