# SPDX-License-Identifier: BSD-3-Clause
"""The nn.Module forms say what the functions say."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from samples import REDUCTIONS

import masked_loss
from masked_loss import CrossEntropyLoss, MaskedCrossEntropyLoss


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(3, 4, 7), torch.randint(7, (3, 4)), torch.rand(3, 4)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_masked_cross_entropy_loss(reduction: str) -> None:
    logits, target, mask = problem()
    options = {
        "reduction": reduction,
        "ignore_index": 3,
        "class_weight": torch.rand(7),
        "label_smoothing": 0.1,
        "z_loss": 0.1,
        "softcap": 3.0,
        "temperature": 0.7,
        "shift": True,
    }
    module = MaskedCrossEntropyLoss(**options)
    expected = masked_loss.masked_cross_entropy(logits, target, mask, **options)
    assert torch.equal(module(logits, target, mask), expected)
    assert torch.equal(module(logits, target, mask=mask), expected)
    without = masked_loss.masked_cross_entropy(logits, target, **options)
    assert torch.equal(module(logits, target), without)


def test_normalizer_is_given_with_the_batch() -> None:
    logits, target, mask = problem()
    module = MaskedCrossEntropyLoss(reduction="sum")
    expected = masked_loss.masked_cross_entropy(logits, target, mask, reduction="sum", normalizer=9)
    assert torch.equal(module(logits, target, mask, normalizer=9), expected)


def test_statistics_from_a_module() -> None:
    logits, target, mask = problem()
    loss, stats = MaskedCrossEntropyLoss(return_stats=True)(logits, target, mask)
    assert isinstance(stats, masked_loss.LossStats)
    torch.testing.assert_close(stats.tokens, mask.sum().double())
    assert torch.equal(loss, masked_loss.masked_cross_entropy(logits, target, mask))


def test_log_probs_and_divergences_are_the_functions() -> None:
    logits, target, mask = problem()
    hidden, teacher = torch.randn(2, 3, 4, 5)
    head, teacher_head = torch.randn(2, 7, 5)
    bias, bounds = torch.randn(7), torch.tensor([0, 5, 12])
    scoring = {"temperature": 0.7, "softcap": 3.0, "shift": True, "return_entropy": True}
    apart = {"kind": "jsd", "beta": 0.3, "shift": True, "reduction": "none"}
    for module, function, inputs, options, at_call in (
        ("TokenLogProbs", "token_log_probs", (logits, target, mask), scoring, {}),
        ("LinearTokenLogProbs", "linear_token_log_probs", (hidden, head, target, mask), scoring,
         {"bias": bias}),
        ("MaskedDivergenceLoss", "masked_divergence", (logits, 2 * logits, mask), apart, {}),
        ("LinearDivergenceLoss", "linear_divergence", (hidden, head, teacher, teacher_head, mask),
         apart, {"bias": bias, "teacher_bias": -bias}),
    ):  # fmt: skip
        for more in (at_call, {**at_call, "cu_seqlens": bounds}):
            ours = getattr(masked_loss, module)(**options)(*inputs, **more)
            expected = getattr(masked_loss, function)(*inputs, **options, **more)
            for mine, theirs in zip([*ours], [*expected], strict=True):
                assert torch.equal(mine, theirs)


def test_cross_entropy_loss_is_pytorchs() -> None:
    input, target = torch.randn(3, 7, 4), torch.randint(7, (3, 4))
    weight = torch.rand(7)
    for arguments in (
        {},
        {"weight": weight, "ignore_index": 2, "reduction": "sum", "label_smoothing": 0.2},
        {"reduction": "none"},
    ):
        ours, theirs = CrossEntropyLoss(**arguments), torch.nn.CrossEntropyLoss(**arguments)
        torch.testing.assert_close(ours(input, target), theirs(input, target))
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        ours.load_state_dict(theirs.state_dict())
    args = (weight, None, 2, None, "sum", 0.1)
    torch.testing.assert_close(
        CrossEntropyLoss(*args)(input, target), torch.nn.CrossEntropyLoss(*args)(input, target)
    )


def test_cross_entropy_loss_takes_a_mask() -> None:
    input, target, mask = torch.randn(3, 7, 4), torch.randint(7, (3, 4)), torch.rand(3, 4)
    expected = masked_loss.cross_entropy(input, target, mask=mask)
    assert torch.equal(CrossEntropyLoss()(input, target, mask=mask), expected)


def test_legacy_arguments_of_the_module() -> None:
    input, target = torch.randn(3, 7), torch.randint(7, (3,))
    for size_average, reduce in ((False, None), (None, False), (True, True)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours = CrossEntropyLoss(size_average=size_average, reduce=reduce)
            theirs = torch.nn.CrossEntropyLoss(size_average=size_average, reduce=reduce)
        torch.testing.assert_close(ours(input, target), theirs(input, target))


@pytest.mark.parametrize(
    "module",
    [
        MaskedCrossEntropyLoss(class_weight=torch.arange(7.0), softcap=3.0, shift=True),
        CrossEntropyLoss(torch.arange(7.0), label_smoothing=0.1),
    ],
    ids=lambda module: type(module).__name__,
)
def test_a_module_is_a_module(module: torch.nn.Module) -> None:
    assert [name for name, _ in module.named_buffers()] != []
    assert module.to(torch.float64).state_dict()[next(iter(module.state_dict()))].dtype == (
        torch.float64
    )
    module = module.float()
    logits = torch.randn(3, 7) if isinstance(module, CrossEntropyLoss) else torch.randn(1, 3, 7)
    target = torch.randint(7, logits.shape[:-1])
    expected = module(logits, target)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(logits, target), expected)
    meta = copy.deepcopy(module).to("meta")
    assert next(iter(meta.buffers())).device.type == "meta"


def test_class_weight_is_a_buffer_of_the_losses_that_know_it() -> None:
    for module in (masked_loss.MaskedDivergenceLoss(), masked_loss.TokenLogProbs()):
        assert module._buffers == {}
        with pytest.raises(AttributeError, match="class_weight"):
            module.class_weight  # noqa: B018
    module = masked_loss.LinearCrossEntropyLoss(class_weight=torch.ones(7))
    assert [*module.state_dict()] == ["class_weight"]


def test_repr_names_what_differs() -> None:
    text = repr(MaskedCrossEntropyLoss(reduction="sum", z_loss=0.5, shift=True))
    assert text.startswith("MaskedCrossEntropyLoss(")
    for part in ("sum", "z_loss=0.5", "shift=True"):
        assert part in text


def test_bad_arguments_are_refused() -> None:
    """At the latest when the module is called, as by PyTorch's."""
    logits, target, mask = problem()
    for options in ({"reduction": "average"}, {"label_smoothing": -1.0}, {"softcap": 0.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            MaskedCrossEntropyLoss(**options)(logits, target, mask)
    with pytest.raises(ValueError, match="reduction"):
        CrossEntropyLoss(reduction="average")(logits, target)
    with pytest.raises(TypeError, match="ignore_indx"):
        MaskedCrossEntropyLoss(ignore_indx=3)
