# SPDX-License-Identifier: BSD-3-Clause
"""Defects of other cross entropies, each as a test of this one.

The comment above each test says what went wrong elsewhere.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from samples import REDUCTIONS
from torch import Tensor

import masked_loss
from masked_loss import masked_cross_entropy, masked_mean, masked_reduce, reference

NAN = float("nan")


def problem(*shape: int, classes: int = 11) -> tuple[Tensor, Tensor]:
    return torch.randn(*shape, classes, requires_grad=True), torch.randint(classes, shape)


# A trainer multiplied a loss that was already a mean with its mask: the mask did nothing.
def test_the_bug_of_the_reduced_loss() -> None:
    logits, target = problem(4, 6)
    mask = torch.rand(4, 6) < 0.5
    reduced = F.cross_entropy(logits.flatten(0, 1), target.flatten())
    torch.testing.assert_close((reduced * mask).sum() / mask.sum(), reduced)
    with pytest.raises(masked_loss.ReducedLossError):
        masked_mean(reduced, mask)
    assert masked_cross_entropy(logits, target, mask) != reduced


# PyTorch divides by the number of weights in the logits' type: 20001 rows of bfloat16 count 20000
# or 20480, and 70001 rows of float16 count infinity.
@pytest.mark.parametrize(
    ("dtype", "rows"), [(torch.bfloat16, 20_001), (torch.float16, 70_001)], ids=str
)
def test_tokens_are_counted_exactly(dtype: torch.dtype, rows: int) -> None:
    logits = torch.zeros(rows, 3, dtype=dtype, requires_grad=True)
    target = torch.zeros(rows, dtype=torch.long)
    loss, stats = masked_cross_entropy(logits, target, return_stats=True)
    torch.testing.assert_close(loss, torch.tensor(3.0).log())
    assert stats.tokens == rows
    (gradient,) = torch.autograd.grad(loss * rows, logits)
    torch.testing.assert_close(gradient[0].float(), torch.tensor([-2 / 3, 1 / 3, 1 / 3]),
                               rtol=0.01, atol=0)  # fmt: skip


# PyTorch rounds log-probabilities to half types, and its loss too: 7.34 in the place of 7.30.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_losses_are_not_quantised(dtype: torch.dtype) -> None:
    logits = (3 * torch.randn(64, 257)).to(dtype)
    target = torch.randint(257, (64,))
    loss = masked_cross_entropy(logits, target, reduction="none")
    truth = F.cross_entropy(logits.double(), target, reduction="none")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), truth, rtol=2e-6, atol=2e-6)


# float16 losses added up in float16 overflow: 70000 losses of log 3 are more than 65504.
def test_half_losses_do_not_overflow_in_the_sum() -> None:
    logits = torch.zeros(70_001, 3, dtype=torch.float16)
    loss = masked_cross_entropy(logits, torch.zeros(70_001, dtype=torch.long), reduction="sum")
    torch.testing.assert_close(loss, 70_001 * torch.tensor(3.0).log())


# NaN logits of an ignored row: the loss was fine, the gradient of that row NaN; or both were NaN.
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nan_in_an_ignored_row_stays_there(reduction: str) -> None:
    logits, target = problem(4, 5)
    with torch.no_grad():
        logits[1, 2] = NAN
    target[1, 2] = -100
    loss = masked_cross_entropy(logits, target, reduction=reduction).sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert (gradient[1, 2] == 0).all()


# A mask multiplied into losses cannot take a NaN out: 0 * NaN is NaN.
def test_nan_losses_times_a_mask_of_zero() -> None:
    values, mask = torch.tensor([1.0, NAN, 3.0]), torch.tensor([1.0, 0.0, 1.0])
    assert (values * mask).sum().isnan()
    assert masked_mean(values, mask) == 2


# A batch without tokens: NaN by definition in PyTorch, and a silent 0 elsewhere. Users want
# neither: here it is 0, attached to the graph, and the count says so.
def test_a_batch_without_tokens() -> None:
    logits, _ = problem(2, 3)
    loss, stats = masked_cross_entropy(logits, torch.full((2, 3), -100), return_stats=True)
    loss.backward()
    assert loss == 0
    assert stats.tokens == 0
    assert (logits.grad == 0).all()


# The zero of such a batch was made as ``logits.sum() * 0``, which overflows in float16 to NaN.
def test_the_zero_is_not_made_of_the_logits() -> None:
    logits = torch.full((2, 4), 60_000.0, dtype=torch.float16, requires_grad=True)
    assert (logits.sum() * 0).isnan()
    loss = masked_cross_entropy(logits, torch.tensor([-100, -100]))
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()


# Class weights with label smoothing and ignored targets read out of bounds, or synchronised.
def test_class_weights_with_smoothing_and_ignored_targets() -> None:
    for ignore_index in (-100, -1, 255, 3):
        logits, target = problem(6)
        target[[1, 4]] = ignore_index
        options: dict[str, Any] = {"ignore_index": ignore_index, "label_smoothing": 0.1}
        weight = torch.rand(11)
        loss = masked_cross_entropy(logits, target, class_weight=weight, **options)
        torch.testing.assert_close(loss, F.cross_entropy(logits, target, weight, **options))


# The gradient was written over the logits during forward, with no word to autograd.
def test_logits_survive() -> None:
    logits, target = problem(3, 4)
    scaled = logits * 2
    before = scaled.detach().clone()
    loss = masked_cross_entropy(scaled, target) + scaled.square().mean()
    assert torch.equal(scaled, before)
    loss.backward()
    assert torch.equal(scaled, before)


# Rows of ignored tokens were zeroed in the caller's logits, even without a gradient.
def test_logits_of_ignored_tokens_survive() -> None:
    logits, target = problem(3, 4)
    target[1] = -100
    before = logits.detach().clone()
    with torch.no_grad():
        masked_cross_entropy(logits, target)
        masked_cross_entropy(logits, target, inplace_backward=True)
    assert torch.equal(logits, before)


# ``.float()`` copies nothing where logits are float32: "a copy" was overwritten in place.
def test_float32_logits_survive() -> None:
    logits, target = problem(3, 4)
    before = logits.detach().clone()
    for reduction in REDUCTIONS:
        loss = masked_cross_entropy(logits, target, reduction=reduction, z_loss=0.1, softcap=5.0)
        loss.sum().backward()
    assert torch.equal(logits, before)


# The kernel did not write the loss of ignored rows and relied on a buffer of zeros, which the
# compiler does not keep: 61.7 in the place of 21.4.
def test_compiled_with_ignored_rows() -> None:
    logits, target = problem(4, 6)
    target[:, ::2] = -100
    compiled = torch.compile(masked_cross_entropy, fullgraph=True, backend="aot_eager")
    for reduction in REDUCTIONS:
        expected = masked_cross_entropy(logits, target, reduction=reduction)
        torch.testing.assert_close(compiled(logits, target, reduction=reduction), expected)


# reduction="none" returned a scalar; or gave no gradient, or one of its mean.
def test_none_is_a_loss_for_each_token() -> None:
    logits, target = problem(3, 4)
    loss = masked_cross_entropy(logits, target, reduction="none")
    assert loss.shape == (3, 4)
    upstream = torch.rand(3, 4)
    (gradient,) = torch.autograd.grad(loss, logits, upstream)
    expected = (logits.softmax(-1) - F.one_hot(target, 11)) * upstream[..., None]
    torch.testing.assert_close(gradient, expected)
    assert gradient.norm() > 0


# The upstream gradient was taken for 1, for its mean, or was compared with 1 on the host.
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_upstream_gradient_counts(reduction: str) -> None:
    logits, target = problem(3, 4)
    loss = masked_cross_entropy(logits, target, reduction=reduction).sum()
    (once,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (scaled,) = torch.autograd.grad(loss * -7.5, logits)
    torch.testing.assert_close(scaled, -7.5 * once)


# The gradient was computed in bfloat16 whatever the type of the logits.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradient_in_the_type_of_the_logits(dtype: torch.dtype) -> None:
    logits = torch.randn(4, 11, dtype=dtype, requires_grad=True)
    target = torch.randint(11, (4,))
    (ours,) = torch.autograd.grad(masked_cross_entropy(logits, target), logits)
    (expected,) = torch.autograd.grad(F.cross_entropy(logits, target), logits)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, expected)


# Small gradients were dropped.
def test_small_gradients_are_kept() -> None:
    logits = torch.zeros(1, 20_000)
    logits[0, 0] = 20
    logits.requires_grad_()
    loss = masked_cross_entropy(logits, torch.tensor([0]))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient != 0).all()
    wide = logits.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(reference.masked_cross_entropy(wide, torch.tensor([0])), wide)
    torch.testing.assert_close(gradient[0, 1:].double(), truth[0, 1:], rtol=1e-5, atol=0)


# A target out of range: read out of bounds, taken for a logit of 0, or a loss of 0 with a
# gradient; and a negative one passed a check that looked at the upper bound alone.
@pytest.mark.parametrize("bad", [11, 12, 10**6, -1, -5, -99, -101])
def test_target_out_of_range(bad: int) -> None:
    logits, target = problem(3, 4)
    target[1, 2] = bad
    for reduction in REDUCTIONS:
        with pytest.raises(IndexError, match=rf"target\[1, 2\] is {bad}, expected 0 <= target"):
            masked_cross_entropy(logits, target, reduction=reduction)


# The label of an ignored token was used as an index before it was masked.
def test_ignored_label_is_no_index() -> None:
    logits, target = problem(4)
    target[0] = -(2**60)
    loss = masked_cross_entropy(logits, target, ignore_index=-(2**60), class_weight=torch.rand(11))
    loss.backward()
    assert loss.isfinite()


# A padding index whose default is 0 ignored a real class.
def test_class_zero_counts() -> None:
    logits, _ = problem(3)
    target = torch.zeros(3, dtype=torch.long)
    _, stats = masked_cross_entropy(logits, target, return_stats=True)
    assert stats.tokens == 3


# int32 targets raised, or were cast and wrapped.
def test_int32_targets() -> None:
    logits, target = problem(3, 4)
    loss = masked_cross_entropy(logits, target.int())
    assert torch.equal(loss, masked_cross_entropy(logits, target))
    with pytest.raises(IndexError, match=str(2**32 + 1)):
        masked_cross_entropy(logits, torch.full((3, 4), 2**32 + 1))


# float32 class weights with bfloat16 logits raised.
def test_class_weights_of_another_type() -> None:
    logits, target = problem(3, 4)
    weight = torch.rand(11, dtype=torch.float64)
    half = logits.detach().bfloat16()
    loss = masked_cross_entropy(half, target, class_weight=weight)
    expected = reference.masked_cross_entropy(half.float(), target, class_weight=weight)
    torch.testing.assert_close(loss, expected)


# Unknown keywords were swallowed: label smoothing was asked for and did not happen.
def test_no_keyword_is_swallowed() -> None:
    logits, target = problem(3)
    for function in (masked_cross_entropy, masked_loss.cross_entropy, masked_reduce):
        kinds = {p.kind for p in inspect.signature(function).parameters.values()}
        assert inspect.Parameter.VAR_KEYWORD not in kinds
    with pytest.raises(TypeError, match="num_items_in_batch"):
        masked_cross_entropy(logits, target, num_items_in_batch=3)


# A mask was given and dropped where labels were not shifted.
def test_the_mask_counts_with_and_without_shift() -> None:
    logits, target = problem(3, 6)
    mask = torch.zeros(3, 6)
    mask[:, 3] = 1
    for shift in (False, True):
        loss = masked_cross_entropy(logits, target, mask, shift=shift)
        rows = logits[:, 2 if shift else 3]
        torch.testing.assert_close(loss, F.cross_entropy(rows, target[:, 3]))


# Labels were shifted twice; or the mask was off by one against them.
def test_shift_happens_once() -> None:
    logits = torch.full((1, 4, 5), -20.0)
    target = torch.tensor([[3, 1, 4, 2]])
    for step in range(3):
        logits[0, step, target[0, step + 1]] = 20.0
    losses = masked_cross_entropy(logits, target, shift=True, reduction="none")
    assert losses.max() < 1e-6
    losses = masked_cross_entropy(logits, target, torch.tensor([[0, 1, 1, 0]]), shift=True,
                                  reduction="none", z_loss=1.0)  # fmt: skip
    assert (losses != 0).tolist() == [[False, True, True, False]]


# Truncated tokens were left out of the numerator and counted in the denominator.
def test_numerator_and_denominator_agree() -> None:
    logits, target = problem(2, 6)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    target[1, 4:] = -100
    kept = (mask != 0) & (target != -100)
    expected = F.cross_entropy(logits[kept], target[kept])
    torch.testing.assert_close(masked_cross_entropy(logits, target, mask), expected)


# The mean of the means of micro-batches is not the mean of the batch.
def test_micro_batches_add_up() -> None:
    logits, target = problem(4, 6)
    mask = torch.arange(6) < torch.tensor([[6], [1], [2], [5]])
    whole = masked_cross_entropy(logits, target, mask)
    parts = [
        masked_cross_entropy(logits[i : i + 1], target[i : i + 1], mask[i : i + 1],
                             normalizer=mask.sum())
        for i in range(4)
    ]  # fmt: skip
    torch.testing.assert_close(sum(parts), whole)
    means = [masked_cross_entropy(logits[i], target[i], mask[i]) for i in range(4)]
    assert (sum(means) / 4 - whole).abs() > 1e-3


# The z-loss was weighed with the class weights.
def test_z_loss_without_class_weights() -> None:
    logits, target = problem(5)
    z = masked_cross_entropy(logits, target, z_loss=1.0, class_weight=torch.zeros(11).index_fill_(
        0, target, 1.0), reduction="none") - masked_cross_entropy(
        logits, target, class_weight=torch.zeros(11).index_fill_(0, target, 1.0),
        reduction="none")  # fmt: skip
    torch.testing.assert_close(z, logits.logsumexp(-1) ** 2)


# Backward refused bfloat16, whose test never passed that type on.
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_bfloat16_backward(reduction: str) -> None:
    logits = torch.randn(3, 4, 11, dtype=torch.bfloat16, requires_grad=True)
    loss = masked_cross_entropy(logits, torch.randint(11, (3, 4)), reduction=reduction)
    loss.sum().backward()
    assert logits.grad.dtype == torch.bfloat16
    assert (logits.grad != 0).any()


# The logsumexp was kept in the type of the input between forward and backward.
def test_backward_does_not_read_a_rounded_logsumexp() -> None:
    logits = (100 + torch.randn(8, 300)).bfloat16().requires_grad_()
    target = torch.randint(300, (8,))
    (gradient,) = torch.autograd.grad(
        masked_cross_entropy(logits, target, reduction="none").sum(), logits
    )
    wide = logits.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(F.cross_entropy(wide, target, reduction="sum"), wide)
    torch.testing.assert_close(gradient.double(), truth, rtol=2**-8, atol=0)


# Vocabularies had to be multiples of 8, or fell back to scalar loads that no test reached.
@pytest.mark.parametrize("classes", [50_257, 6_401, 127])
def test_odd_vocabularies(classes: int) -> None:
    logits = torch.randn(3, classes, requires_grad=True)
    target = torch.tensor([0, classes // 2, classes - 1])
    loss = masked_cross_entropy(logits, target)
    expected = F.cross_entropy(logits, target)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits)
    )


# Hidden dimensions of padded vocabularies were read again after they had been overwritten.
def test_padded_vocabulary_in_place() -> None:
    padded = torch.randn(4, 64)
    base = padded.clone()
    logits = base[:, :50]
    logits.requires_grad_()
    target = torch.randint(50, (4,))
    loss = masked_cross_entropy(logits, target, inplace_backward=True)
    (gradient,) = torch.autograd.grad(loss, logits)
    copy = padded[:, :50].clone().requires_grad_()
    (expected,) = torch.autograd.grad(masked_cross_entropy(copy, target), copy)
    assert torch.equal(gradient, expected)
    assert torch.equal(base[:, 50:], padded[:, 50:])


# A forward-mode derivative was 0 without a word.
def test_forward_mode_is_no_silent_zero() -> None:
    logits, target = problem(3)
    direction = torch.randn(3, 11)
    primal, tangent = torch.func.jvp(
        lambda x: masked_cross_entropy(x, target), (logits.detach(),), (direction,)
    )
    (gradient,) = torch.autograd.grad(masked_cross_entropy(logits, target), logits)
    torch.testing.assert_close(primal, masked_cross_entropy(logits.detach(), target))
    torch.testing.assert_close(tangent, (gradient * direction).sum())


# The gradient of a returned entropy was dropped without a word. Here statistics are detached.
def test_statistics_promise_no_gradient() -> None:
    logits, target = problem(3)
    _, stats = masked_cross_entropy(logits, target, return_stats=True)
    for value in stats:
        assert not value.requires_grad


# -100 where no ignore_index is known gave a plausible number.
def test_every_negative_target_is_known_or_refused() -> None:
    logits, target = problem(3)
    target[1] = -100
    assert masked_cross_entropy(logits, target, reduction="none")[1] == 0
    with pytest.raises(IndexError, match=r"target\[1\] is -100"):
        masked_cross_entropy(logits, target, ignore_index=-1)


# Results depended on how much memory was free, or on atomics.
def test_the_same_bits_twice() -> None:
    logits, target = problem(64, classes=5_000)
    results = []
    for _ in range(3):
        loss = masked_cross_entropy(logits, target)
        results.append((loss, *torch.autograd.grad(loss, logits)))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])


# Logits that were not contiguous gave strange results, or a hidden copy of all of them.
def test_transposed_logits() -> None:
    base = torch.randn(5, 3, 11, requires_grad=True)
    target = torch.randint(11, (3, 5))
    loss = masked_cross_entropy(base.transpose(0, 1), target)
    expected = F.cross_entropy(base.permute(1, 2, 0), target)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, base), torch.autograd.grad(expected, base))


# The weighted mean was not the mean of the weighted losses that users took it for: it is
# documented here, and both can be had.
def test_weighted_mean_is_what_it_says() -> None:
    logits, target = problem(6)
    c = torch.rand(11)
    losses = masked_cross_entropy(logits, target, class_weight=c, reduction="none")
    torch.testing.assert_close(
        masked_cross_entropy(logits, target, class_weight=c), losses.sum() / c[target].sum()
    )
    torch.testing.assert_close(
        masked_cross_entropy(logits, target, class_weight=c, normalizer=6), losses.mean()
    )
