# SPDX-License-Identifier: BSD-3-Clause
"""Which heads fuse_linear_loss finds; fused models are copied, compiled, traced, unfused."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fused_models import B, D, Model, T, V, assert_same_gradients, both, capped, flat, shifted
from torch import Tensor, nn

import masked_loss
from masked_loss.fuse import DenseLogits, FusedLinear, LazyLogits, head


def test_copies_and_pickles_stay_fused(batch: tuple[Tensor, Tensor]) -> None:
    fused = masked_loss.fuse_linear_loss(Model(tied=True))
    expected, _ = fused(*batch)
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    for other in (
        copy.deepcopy(fused),
        pickle.loads(pickle.dumps(fused)),
        torch.load(file, weights_only=False),
    ):
        assert type(other.lm_head) is FusedLinear
        assert other.lm_head.weight is other.embed.weight
        loss, logits = other(*batch)
        assert type(logits) is LazyLogits
        assert torch.equal(loss, expected)
    assert fused.state_dict().keys() == Model(tied=True).state_dict().keys()


def test_unfuse_undoes_it(batch: tuple[Tensor, Tensor]) -> None:
    model = Model()
    weight = model.lm_head.weight
    assert masked_loss.fuse_linear_loss(masked_loss.fuse_linear_loss(model)) is model
    assert masked_loss.unfuse(model) is model
    assert type(model.lm_head) is nn.Linear
    assert vars(model.lm_head).keys() == vars(nn.Linear(1, 1)).keys()
    assert model.lm_head.weight is weight
    assert type(model(*batch)[1]) is Tensor
    masked_loss.unfuse(model)


@pytest.mark.parametrize("name", ["lm_head", "output", "head"])
def test_heads_are_found_by_name_and_by_method(name: str) -> None:
    model = nn.Module()
    setattr(model, name, nn.Linear(D, V))
    masked_loss.fuse_linear_loss(model)
    assert type(getattr(model, name)) is FusedLinear

    model = nn.Module()
    model.lm_head, model.decoder = nn.Linear(D, V), nn.Linear(D, V)
    model.get_output_embeddings = lambda: model.decoder
    masked_loss.fuse_linear_loss(model)
    assert (type(model.decoder), type(model.lm_head)) == (FusedLinear, nn.Linear)


@pytest.mark.parametrize("function", ["fuse_linear_loss", "is_fused", "unfuse"])
def test_models_without_a_head_are_an_error(function: str) -> None:
    call = getattr(masked_loss, function)
    with pytest.raises(ValueError, match=rf"{function}: .*output head named lm_head.*got Seq"):
        call(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(TypeError, match=rf"{function}: .* must be a torch\.nn\.Module, got int"):
        call(3)


class Adapted(nn.Module):
    """A head that is more than a product, as LoRA's."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(D, 2), nn.Linear(2, V)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("first", ["adapt", "fuse"])
def test_adapted_heads_compute_their_logits(
    first: str, batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "_said", set())
    stock = Model(loss=lambda x, y: flat(capped(x, 0.5)[:, :-1], y[:, 1:]))
    stock.lm_head = Adapted(stock.lm_head)
    fused = copy.deepcopy(stock)
    if first == "adapt":
        with pytest.warns(UserWarning, match=r"head is a .*Adapted.*logits are computed"):
            masked_loss.fuse_linear_loss(fused)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            masked_loss.fuse_linear_loss(copy.deepcopy(fused))  # said once
    else:
        fused.lm_head.base.__class__ = FusedLinear
    got, logits = fused(*batch)
    assert type(logits) is (DenseLogits if first == "adapt" else Tensor)
    expected, _ = stock(*batch)
    torch.testing.assert_close(got, expected)
    expected.backward()
    got.backward()
    assert_same_gradients(stock, fused)
    assert fused(batch[0], torch.full_like(batch[0], -100))[0].isnan() == (first == "fuse")
    assert type(logits.argmax(-1)) is Tensor
    assert type(pickle.loads(pickle.dumps(logits.detach()))) is Tensor
    masked_loss.unfuse(fused)
    assert not fused.lm_head._forward_hooks


def test_functional_calls_and_transforms(batch: tuple[Tensor, Tensor]) -> None:
    stock, fused = both()
    parameters = dict(stock.named_parameters())

    def loss_of(model: Model) -> Callable[..., Tensor]:
        return lambda p: torch.func.functional_call(model, p, batch)[0]

    expected, got = (torch.func.grad(loss_of(m))(parameters) for m in (stock, fused))
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad)
    torch.testing.assert_close(loss_of(fused)(parameters), loss_of(stock)(parameters))


def test_compiled_models_use_the_masked_kernel(batch: tuple[Tensor, Tensor]) -> None:
    stock, fused = both(loss=lambda x, y: shifted(capped(x, 0.5), y))
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    expected, _ = stock(*batch)
    got, logits = torch.compile(fused, fullgraph=True, backend=backend)(*batch)
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert any("masked_loss.cross_entropy" in name for name in called)
    torch.testing.assert_close(got, expected)
    assert logits.shape == (B, T, V)
    expected.backward()
    got.backward()
    assert_same_gradients(stock, fused)


def test_compiled_losses_take_the_logits(batch: tuple[Tensor, Tensor]) -> None:
    """The model is eager, its trainer's loss is compiled."""
    ids, labels = batch
    stock, fused = both()
    loss = torch.compile(shifted, backend="eager")
    loss(stock(ids)[1], labels).backward()
    loss(fused(ids)[1], labels).backward()
    assert_same_gradients(stock, fused)


def test_traced_models(batch: tuple[Tensor, Tensor]) -> None:
    stock, fused = both()
    hidden = torch.randn(B, T, D)
    traced = torch.jit.trace(fused.lm_head, hidden)
    torch.testing.assert_close(traced(hidden), stock.lm_head(hidden))
    torch.testing.assert_close(torch.vmap(fused.lm_head)(hidden), stock.lm_head(hidden))
    on_meta = copy.deepcopy(fused).to("meta")
    assert on_meta(batch[0].to("meta"))[1].shape == (B, T, V)
    program = torch.export.export(fused, batch).module()
    torch.testing.assert_close(program(*batch)[0], stock(*batch)[0])
