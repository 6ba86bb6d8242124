# SPDX-License-Identifier: BSD-3-Clause
"""fuse_linear_loss: models compute what they computed, without their logits."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from fused_models import (
    B,
    D,
    T,
    V,
    assert_no_less_accurate,
    assert_same_gradients,
    both,
    capped,
    flat,
    grads,
    shifted,
)  # fmt: skip
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import masked_loss
from masked_loss.fuse import LazyLogits


def masked_after(logits: Tensor, labels: Tensor) -> Tensor:
    mask = labels != -100
    loss = F.cross_entropy(logits.view(-1, V), labels.clamp(min=0).view(-1), reduction="none")
    return (loss.view_as(mask) * mask).sum() / mask.sum()


WEIGHT = torch.linspace(0.5, 2, V)
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "shifted": shifted,
    "upcast": lambda x, y: flat(x.float()[:, :-1], y[:, 1:]),
    "to float64": lambda x, y: flat(x.to(torch.float64), y),
    "sum": lambda x, y: flat(x, y, reduction="sum") / 7,
    "old spelling": lambda x, y: flat(x, y, size_average=False),
    "positional": lambda x, y: F.cross_entropy(
        x.flatten(0, 1), y.clamp(min=0).flatten(), WEIGHT, None, 0
    ),
    "keywords": lambda x, y: F.cross_entropy(input=x.view(-1, V), target=y.view(-1)),
    "smoothing": lambda x, y: flat(x, y, label_smoothing=0.1),
    "none, then mask": masked_after,
    "module": lambda x, y: nn.CrossEntropyLoss(WEIGHT)(x.view(-1, V), y.view(-1)),
    "classes second": lambda x, y: F.cross_entropy(x.transpose(1, 2), y),
    "permuted": lambda x, y: F.cross_entropy(x.permute(0, 2, 1), y, reduction="none").mean(),
    "mT": lambda x, y: F.cross_entropy(x.mT[..., 1:], y[..., 1:]),
    "one row": lambda x, y: F.cross_entropy(x[0, 2], y[0, 2]),
    "every other": lambda x, y: flat(x[1:, ::2], y[1:, ::2]),
    "temperature": lambda x, y: flat(x / 2.5, y),
    "scale": lambda x, y: flat(0.5 * x * 3, y),
    "softcap": lambda x, y: flat(capped(x, 0.5), y),
    "scaled softcap": lambda x, y: flat(3 * (2 * x).tanh(), y),
    "masked_loss": lambda x, y: masked_loss.masked_cross_entropy(x, y, y > 5, shift=True),
    "masked_loss, keywords": lambda x, y: masked_loss.masked_cross_entropy(
        logits=x, target=y, mask=y > 5, z_loss=0.01
    ),
    "drop-in, keywords": lambda x, y: masked_loss.cross_entropy(input=x.mT, target=y),
    "masked_loss, softcap": lambda x, y: masked_loss.masked_cross_entropy(x, y, softcap=0.5),
    "masked_loss, temperature": lambda x, y: masked_loss.masked_cross_entropy(
        x, y, temperature=0.5
    ),
    "drop-in": lambda x, y: masked_loss.cross_entropy(x.mT, y, mask=y > 5),
    "sequence mean": lambda x, y: masked_loss.masked_cross_entropy(
        x, y, reduction="sequence_mean", z_loss=0.01
    ),
}


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.usefixtures("no_logits")
def test_a_loss_is_computed_without_logits(
    loss: Callable[[Tensor, Tensor], Tensor], bias: bool, batch: tuple[Tensor, Tensor]
) -> None:
    stock, fused = both(loss=loss, bias=bias, tied=not bias)
    expected, _ = stock(*batch)
    got, logits = fused(*batch)
    assert type(logits) is LazyLogits
    torch.testing.assert_close(got, expected)
    expected.backward()
    got.backward()
    assert_same_gradients(stock, fused)


@pytest.mark.parametrize("frozen", ["lm_head", "body", "both"])
def test_frozen_parts_get_no_gradient(frozen: str, batch: tuple[Tensor, Tensor]) -> None:
    stock, fused = both(bias=True)
    for model in (stock, fused):
        if frozen != "lm_head":
            model.embed.requires_grad_(False)
            model.body.requires_grad_(False)
        if frozen != "body":
            model.lm_head.requires_grad_(False)
        loss, logits = model(*batch)
        assert loss.requires_grad == logits.requires_grad == (frozen != "both")
        if loss.requires_grad:
            loss.backward()
    if frozen != "both":
        assert_same_gradients(stock, fused)


def test_masked_rows_and_empty_batches(batch: tuple[Tensor, Tensor]) -> None:
    ids, labels = batch
    _, fused = both()
    loss, _ = fused(ids, torch.full_like(labels, -100))
    loss.backward()
    assert loss.item() == 0
    assert all(not g.any() for g in grads(fused).values())

    hidden = torch.randn(B, T, D)
    hidden[labels == -100] = torch.nan
    loss = flat(fused.lm_head(hidden), labels)
    assert loss.isfinite()


def test_a_target_out_of_range_is_named(batch: tuple[Tensor, Tensor]) -> None:
    ids, labels = batch
    labels[1, 3] = V
    _, fused = both()
    with pytest.raises(IndexError, match=f"is {V}, expected"):
        fused(ids, labels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype: torch.dtype, batch: tuple[Tensor, Tensor]) -> None:
    stock, fused = (model.to(dtype) for model in both(bias=True))
    wide = copy.deepcopy(stock).double()
    results = []
    for model in (fused, stock, wide):
        loss, logits = model(*batch)
        loss.backward()
        results.append([loss.detach().double(), *(g.double() for g in grads(model).values())])
        if model is fused:
            assert (type(logits), logits.dtype, loss.dtype) == (LazyLogits, dtype, torch.float32)
    assert len(results[0]) == 6
    assert_no_less_accurate(*results, dtype)


SCALINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "scale": lambda x: x * 100,
    "negative scale": lambda x: -100 * x,
    "temperature": lambda x: x / 2.5,
    "capped, scaled": lambda x: 100 * (x / 30).tanh(),
    "scaled, capped": lambda x: capped(100 * x, 30),
}


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scaled_logits_of_half_precision(
    dtype: torch.dtype, scaling: Callable[[Tensor], Tensor], bias: bool
) -> None:
    """Logits that float16 can hold when scaled; the hidden states and the bias, scaled, are not."""
    hidden = (1000 * torch.randn(500, D)).to(dtype).requires_grad_()
    head = nn.Linear(D, V, bias=bias).to(dtype)
    with torch.no_grad():
        head.weight.copy_(torch.randn(V, D) / 10_000)
    target = torch.randint(V, (500,))

    def evaluate(head: nn.Module, hidden: Tensor) -> list[Tensor]:
        loss = F.cross_entropy(scaling(head(hidden)), target)
        leaves = [hidden, *head.parameters()]
        return [x.detach().double() for x in (loss, *torch.autograd.grad(loss, leaves))]

    truth = evaluate(copy.deepcopy(head).double(), hidden.detach().double().requires_grad_())
    model = nn.Module()
    model.lm_head = copy.deepcopy(head)
    stock = evaluate(head, hidden)
    fused = evaluate(masked_loss.fuse_linear_loss(model).lm_head, hidden)
    assert_no_less_accurate(fused, stock, truth, dtype)


def test_autocast_of_the_head_is_remembered(batch: tuple[Tensor, Tensor], no_logits: None) -> None:
    """Also where the loss is computed outside, as trainers that wrap forward in autocast do."""
    ids, labels = batch
    stock, fused = both()
    with torch.autocast("cpu", torch.bfloat16):
        expected, _ = stock(ids, labels)
        inside, logits = fused(ids, labels)
    outside = shifted(logits, labels)
    assert logits.dtype == torch.bfloat16
    assert inside.dtype == outside.dtype == torch.float32
    assert torch.equal(inside, outside)
    torch.testing.assert_close(inside, expected.float(), rtol=1e-2, atol=1e-2)
    expected.backward()
    outside.backward()
    assert_same_gradients(stock, fused, rtol=0.1, atol=1e-2)

    with torch.autocast("cpu", enabled=False):
        logits = fused(ids)[1]
    with torch.autocast("cpu", torch.bfloat16):  # the head was not under autocast, so neither here
        got = shifted(logits, labels)
    torch.testing.assert_close(got, stock(ids, labels)[0])


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("whole", [False, True], ids=["body", "model"])
def test_gradient_checkpointing(reentrant: bool, whole: bool, batch: tuple[Tensor, Tensor]) -> None:
    ids, labels = batch
    stock, fused = both()
    stock(ids, labels)[0].backward()
    x = fused.embed(ids)
    if whole:  # the logits leave a region that is run again: they are computed
        logits = checkpoint(
            lambda x: fused.lm_head(fused.body(x).tanh()), x, use_reentrant=reentrant
        )
    else:
        logits = fused.lm_head(
            checkpoint(lambda x: fused.body(x).tanh(), x, use_reentrant=reentrant)
        )
    shifted(logits, labels).backward()
    assert_same_gradients(stock, fused)


def test_accumulated_backwards_and_retain_graph(batch: tuple[Tensor, Tensor]) -> None:
    stock, fused = both(tied=True)
    for model in (stock, fused):
        loss, _ = model(*batch)
        loss.backward(retain_graph=True)
        loss.backward()
        model(*batch)[0].backward()
    assert_same_gradients(stock, fused)


def test_a_loss_may_be_scaled_in_place(batch: tuple[Tensor, Tensor]) -> None:
    stock, fused = both()
    for model in (stock, fused):
        loss, _ = model(*batch)
        loss /= 4
        loss *= 3
        loss.backward()
    assert_same_gradients(stock, fused)
