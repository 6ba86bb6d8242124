# SPDX-License-Identifier: BSD-3-Clause
"""token_log_probs: the kernels' results and gradients."""

from __future__ import annotations

import pytest
import torch
from log_prob_samples import OPTIONS, check, sample
from opchecks import opchecks
from torch import Tensor

from masked_loss import masked_cross_entropy, token_log_probs


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("ids", [None, 1, 5], ids=lambda k: f"{k}_ids")
@pytest.mark.parametrize("classes", [1, 2, 9, 33, 130, 1025, 40_000])
def test_results_and_gradients(
    classes: int, ids: int | None, options: str, dtype: torch.dtype
) -> None:
    check(classes, ids, options, dtype)


@pytest.mark.parametrize("ids", [64, 65, 300])
def test_many_ids(ids: int) -> None:
    """More than fit on the stack, and each of a few classes many times."""
    for classes in (7, 1000):
        check(classes, ids, "entropy", torch.float32)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("ids", [None, 3])
def test_masked_rows_are_not_read(options: str, ids: int | None) -> None:
    clean, dirty = (sample(70, ids, options, torch.float32) for _ in range(2))
    masked = ~dirty.mask
    rows = masked.roll(-1, -1) if dirty.options.get("shift") else masked
    if dirty.options.get("shift"):
        rows[..., -1] = True  # scores nothing
    dirty.logits[rows] = torch.nan
    dirty.target[masked] = 1 << 40
    expected = clean.call(token_log_probs, torch.float32)
    for name, result in dirty.call(token_log_probs, torch.float32).items():
        assert torch.equal(result, expected[name]), name
    assert (expected["log_probs"][masked] == 0).all()


def test_is_the_cross_entropy() -> None:
    s = sample(500, None, "softcap", torch.float32)
    ours = token_log_probs(s.logits, s.target, s.mask, softcap=4.0)
    loss = masked_cross_entropy(s.logits, s.target, s.mask, softcap=4.0, reduction="none")
    assert torch.equal(ours, -loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_alone_has_the_same_bits(dtype: torch.dtype) -> None:
    """Importance ratios compare a token in two batches."""
    for classes in (50, 40_000):
        s = sample(classes, 3, "temperatures", dtype, (6, 3))
        together = token_log_probs(s.logits, s.target, return_entropy=True, temperature=0.7)
        for i in range(6):
            alone = token_log_probs(
                s.logits[i, 1], s.target[i, 1], return_entropy=True, temperature=0.7
            )
            for ours, expected in zip(alone, together, strict=True):
                assert torch.equal(ours, expected[i, 1])


def finite(gradient: Tensor) -> bool:
    return bool(gradient.isfinite().all())


def test_classes_of_probability_zero() -> None:
    logits = torch.randn(3, 40)
    logits[:, 5:20] = -torch.inf
    logits[1] = -torch.inf
    logits[1, 3] = 2.0
    logits.requires_grad_()
    log_probs, entropy = token_log_probs(logits, torch.tensor([1, 3, 7]), return_entropy=True)
    assert log_probs[1] == 0
    assert entropy[1] == 0
    assert log_probs[2] == -torch.inf
    assert finite(entropy)
    (gradient,) = torch.autograd.grad(log_probs[:2].sum() + entropy.sum(), logits)
    assert finite(gradient)
    (gradient,) = torch.autograd.grad(
        token_log_probs(logits, torch.tensor([1, 3, 7])).sum(), logits
    )
    assert finite(gradient)


def test_a_row_without_a_finite_logit() -> None:
    logits = torch.full((2, 40), -torch.inf)
    logits[1, 7] = torch.nan
    logits.requires_grad_()
    results = token_log_probs(logits, torch.tensor([3, 3]), return_entropy=True)
    assert all(result.isnan().all() for result in results)
    (gradient,) = torch.autograd.grad(results[0].sum(), logits)
    assert gradient[:, 3].isnan().all()


def test_large_logits_keep_their_digits() -> None:
    """The entropy is no difference of large numbers."""
    logits = torch.randn(4, 1000)
    for offset in (0.0, 1e4):
        shifted = (logits + offset).double()
        _, entropy = token_log_probs(logits + offset, torch.zeros(4).long(), return_entropy=True)
        _, truth = token_log_probs(shifted, torch.zeros(4).long(), return_entropy=True)
        torch.testing.assert_close(entropy.double(), truth, rtol=1e-6, atol=0)


@pytest.mark.parametrize("options", OPTIONS)
def test_compiles_whole(options: str) -> None:
    torch._dynamo.reset()
    s = sample(30, 2, options, torch.float32)
    leaf = s.logits.clone().requires_grad_()

    def function(x: Tensor) -> tuple[Tensor, ...]:
        results = token_log_probs(x * 1, s.target, s.mask, **s.options)
        return results if isinstance(results, tuple) else (results,)

    ours = function(leaf)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)(leaf)
    for a, b in zip(compiled, ours, strict=True):
        torch.testing.assert_close(a, b)
    gradients = [
        torch.autograd.grad([r.sum() for r in results], leaf)[0] for results in (compiled, ours)
    ]
    torch.testing.assert_close(*gradients)


def test_gradcheck() -> None:
    for options in ("softcap", "temperatures", "shift"):
        s = sample(6, 3, options, torch.float64, (1, 3))
        leaf = s.logits.clone().requires_grad_()
        assert torch.autograd.gradcheck(
            lambda x, s=s: token_log_probs(x, s.target, s.mask, **s.options), leaf
        )


@opchecks(
    "token_log_probs", "token_log_probs_entropy", "log_probs_weigh", "token_log_probs_forward",
    "token_log_probs_backward", "token_log_probs_backward_out",
)  # fmt: skip
@pytest.mark.parametrize("ids", [None, 3])
@pytest.mark.parametrize("shift", [False, True])
def test_opcheck(ids: int | None, shift: bool) -> None:
    s = sample(9, ids, "entropy", torch.float32)
    temperatures = 0.5 + torch.rand(2, 4)
    ops, opcheck = torch.ops.masked_loss, torch.library.opcheck
    leaf = s.logits.clone().requires_grad_()
    bounds = torch.tensor([0, 2, 2, 7])
    options = {"softcap": 4.0, "shift": shift}
    more = {"cu_seqlens": bounds, "temperatures": temperatures, **options}
    opcheck(ops.token_log_probs.default, (leaf, s.target, s.mask), more)
    opcheck(ops.token_log_probs_entropy.default, (leaf, s.target, s.mask), more)
    opcheck(ops.log_probs_weigh.default, (s.logits, s.target, s.mask, bounds, 9, -100, shift, True))
    inputs = (s.logits, s.target, s.mask, bounds, temperatures)
    opcheck(ops.token_log_probs_forward.default, (*inputs, True), options)
    opcheck(ops.token_log_probs_forward.default, (*inputs, False), options)
    log_probs, entropy, tokens = ops.token_log_probs_forward(*inputs, True, **options)
    formula = (log_probs, entropy, s.logits, s.target, tokens, temperatures)
    opcheck(ops.token_log_probs_backward.default, formula, options)
    opcheck(ops.token_log_probs_backward_out.default, (s.logits.clone(), *formula), options)
