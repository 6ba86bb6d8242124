# SPDX-License-Identifier: BSD-3-Clause
"""is_fused says what happened, and a model that gains nothing is told, once."""

from __future__ import annotations

import pickle
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import masked_loss
from masked_loss.fuse import DenseLogits, FusedLinear, Fusion, LazyLogits, head

V, D = 37, 16


@dataclass
class Output:
    loss: Tensor
    logits: Tensor


class Model(nn.Module):
    """A model with transformers' outputs, that may do something to its logits first."""

    def __init__(self, change: Any = None) -> None:
        super().__init__()
        self.embed, self.lm_head = nn.Embedding(V, D), nn.Linear(D, V)
        self.register_buffer("final_logits_bias", torch.randn(1, V))
        self.change = change

    def forward(self, ids: Tensor) -> Any:
        logits = self.lm_head(self.embed(ids))
        logits = self.change(self, logits) if self.change else logits
        loss = F.cross_entropy(logits.view(-1, V), ids.view(-1))
        return Output(loss=loss, logits=logits)


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_said", set())


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(V, (3, 5))


def test_before_and_after(ids: Tensor) -> None:
    model = Model()
    assert masked_loss.is_fused(model) == Fusion(False, "Linear", 0, None)
    masked_loss.fuse_linear_loss(model)
    assert masked_loss.is_fused(model) == Fusion(True, "FusedLinear", 0, None)
    output = model(ids)
    assert masked_loss.is_fused(model) == Fusion(True, "FusedLinear", 1, None)
    output.logits.argmax(-1)  # looked at for a metric, after the loss
    assert masked_loss.is_fused(model) == Fusion(True, "FusedLinear", 1, "argmax")
    with torch.no_grad():
        model.lm_head(torch.randn(2, D)).softmax(-1)  # generation
    assert masked_loss.is_fused(model) == Fusion(True, "FusedLinear", 0, "softmax")
    assert masked_loss.is_fused(pickle.loads(pickle.dumps(model)))
    assert not masked_loss.is_fused(masked_loss.unfuse(model))
    assert "uses" not in vars(model.lm_head)
    assert not model._forward_hooks
    with pytest.raises(TypeError, match=r"is_fused: model must be a torch\.nn\.Module, got str"):
        masked_loss.is_fused("model")  # type: ignore[arg-type]


CHANGES = {
    "multiplied": lambda model, x: x * model.final_logits_bias,
    "clamped": lambda model, x: x.clamp(-5, 5),
    "written into": lambda model, x: x.index_fill_(-1, torch.tensor([3]), -1e9),
    "added, with gradient": lambda model, x: x + model.lm_head.bias,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_loss_from_logits_is_reported_once(change: str, ids: Tensor) -> None:
    model = masked_loss.fuse_linear_loss(Model(CHANGES[change]))
    with pytest.warns(UserWarning, match=r"Model has computed its loss from logits, which \w+ ask"):
        model(ids)
    state = masked_loss.is_fused(model)
    assert not state
    assert state.losses == 0
    assert state.logits is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_a_constant_added_to_the_logits_is_a_bias(
    bias: bool, scale: float, dtype: torch.dtype, ids: Tensor
) -> None:
    """BART, Marian, Pegasus and their relatives add a buffer [1, V]."""

    def change(model: nn.Module, logits: Tensor) -> Tensor:
        logits = logits * scale + model.final_logits_bias.to(logits.device)
        return logits if dtype == torch.float64 else logits.float()

    model = Model(change).to(dtype)
    if not bias:
        model.lm_head.bias = None
    model.zero_grad()
    expected = model(ids)
    expected.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    got = masked_loss.fuse_linear_loss(model)(ids)
    assert type(got.logits) is LazyLogits
    assert masked_loss.is_fused(model) == Fusion(True, "FusedLinear", 1, None)
    got.loss.backward()
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(got.loss, expected.loss, **close)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], **close)
    model.final_logits_bias.data.zero_()  # the logits are still those of this forward
    torch.testing.assert_close(got.logits + 0, expected.logits, **close)


def test_what_is_no_constant_per_class_is_computed(ids: Tensor) -> None:
    model = masked_loss.fuse_linear_loss(Model())
    hidden = torch.randn(3, V, D)  # as many tokens as classes
    expected = F.linear(hidden, model.lm_head.weight, model.lm_head.bias)
    others: list[Any] = [
        torch.randn(V, 1),
        torch.randn(3, V, V),
        torch.randn(1, 1, 1, V),
        torch.randn(1),
        2.5,
        torch.randn(V, dtype=torch.float64).requires_grad_(),
    ]
    for other in others:
        torch.testing.assert_close(model.lm_head(hidden) + other, expected + other)
        torch.testing.assert_close(other + model.lm_head(hidden), other + expected)
    logits = model.lm_head(hidden)
    torch.testing.assert_close(logits.mT + torch.ones(V), expected.mT + torch.ones(V))
    twice = logits + torch.ones(V) + torch.ones(V)
    torch.testing.assert_close(twice + 0, expected + 2)
    torch.testing.assert_close((logits + torch.ones(V)) * 2 + 0, (expected + 1) * 2)


def test_heads_that_compute_say_why(ids: Tensor) -> None:
    class Scaled(Tensor):
        pass

    model = masked_loss.fuse_linear_loss(Model())
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.data.as_subclass(Scaled))
    with pytest.warns(UserWarning, match=r"head works on Scaled .*logits are computed"):
        model(ids)
    assert masked_loss.is_fused(model).logits == "Scaled"

    model = Model()
    model.lm_head = nn.Sequential(nn.Linear(D, D), nn.Linear(D, V))
    model.lm_head.weight = None
    with pytest.warns(UserWarning, match=r"head is a torch.*Sequential.*logits are computed"):
        masked_loss.fuse_linear_loss(model)
    assert type(model(ids).logits) is DenseLogits
    assert not masked_loss.is_fused(model)
    assert masked_loss.is_fused(model).head == "Sequential"


def test_compiled_models_say_so(ids: Tensor) -> None:
    model = masked_loss.fuse_linear_loss(Model())
    torch.compile(model, fullgraph=True, backend="eager")(ids)
    assert masked_loss.is_fused(model).logits == "torch.compile"


def test_pipelines_ask_for_views_and_detach_in_place() -> None:
    """torch.distributed.pipelining does this to what its last stage returns."""
    model = masked_loss.fuse_linear_loss(Model())
    hidden, target = torch.randn(4, D), torch.tensor([1, 5, 2, 7])
    pieces = []
    for half, y in zip(hidden.chunk(2), target.chunk(2), strict=True):
        logits = model.lm_head(half)
        F.cross_entropy(logits, y).backward()
        assert not logits._is_view()
        assert logits.detach_() is logits
        assert not logits.requires_grad
        pieces.append(logits)
    merged = torch.cat(pieces)
    assert type(merged) is LazyLogits
    assert model.lm_head.uses.reason is None
    expected = F.linear(hidden, model.lm_head.weight, model.lm_head.bias).detach()
    torch.testing.assert_close(merged + 0, expected)
    assert not (pieces[0] + 0).requires_grad
    torch.testing.assert_close(torch.cat([*pieces, torch.ones(1, V)])[:4], expected)
    torch.testing.assert_close(torch.cat(pieces, 1), torch.cat(expected.chunk(2), 1))
    other = masked_loss.fuse_linear_loss(Model())
    with torch.no_grad():
        mixed = torch.cat((pieces[0], other.lm_head(hidden)))
    assert type(mixed) is Tensor
    seen = model.lm_head(hidden)
    seen.sum()
    assert not seen.detach_().requires_grad
    assert not (seen * seen).requires_grad


def test_types_are_public() -> None:
    for kind in (LazyLogits, DenseLogits, FusedLinear):
        assert kind.__module__ == "masked_loss.fuse"
