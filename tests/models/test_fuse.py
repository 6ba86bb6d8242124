# SPDX-License-Identifier: BSD-3-Clause
"""fuse_linear_loss: models compute what they computed, without their logits."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import masked_loss
from masked_loss.fuse import DenseLogits, FusedLinear, LazyLogits, head

V, D, B, T = 37, 16, 3, 7


def shifted(logits: Tensor, ids: Tensor) -> Tensor:
    """The loss as MiniMind writes it."""
    x, y = logits[..., :-1, :].contiguous(), ids[..., 1:].contiguous()
    return F.cross_entropy(x.view(-1, x.size(-1)), y.view(-1), ignore_index=-100)


class Model(nn.Module):
    """A body, a head, a loss: what the tests vary is the loss."""

    def __init__(
        self,
        loss: Callable[[Tensor, Tensor], Any] = shifted,
        bias: bool = False,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.body = nn.Linear(D, D)
        self.lm_head = nn.Linear(D, V, bias=bias)
        if tied:
            self.lm_head.weight = self.embed.weight
        self.loss = loss

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> tuple[Any, Tensor]:
        logits = self.lm_head(self.body(self.embed(ids)).tanh())
        return (None if labels is None else self.loss(logits, labels)), logits


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(V, (B, T))
    labels = ids.clone()
    labels[0, 4:] = labels[2, :3] = -100
    return ids, labels


@pytest.fixture
def no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test in which logits are computed."""

    def computed(self: LazyLogits, reason: str) -> Tensor:
        raise AssertionError(f"the logits were computed for {reason}")

    monkeypatch.setattr(LazyLogits, "_value", computed)


def both(**options: Any) -> tuple[Model, Model]:
    """A model, and its like with fused loss."""
    model = Model(**options)
    return model, masked_loss.fuse_linear_loss(copy.deepcopy(model))


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(stock: nn.Module, fused: nn.Module, **tolerance: float) -> None:
    expected, got = grads(stock), grads(fused)
    assert expected.keys() == got.keys()
    assert any(g.abs().max() > 0 for g in expected.values())
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad, msg=lambda m, n=name: f"{n}: {m}", **tolerance)


def assert_no_less_accurate(
    got: Iterable[Tensor], stock: Iterable[Tensor], truth: Iterable[Tensor], dtype: torch.dtype
) -> None:
    """No further from the truth than the stock computation in the same type, and two roundings."""
    info = torch.finfo(dtype)
    for ours, theirs, right in zip(got, stock, truth, strict=True):
        least = right.numel() ** 0.5 * info.smallest_normal
        rounding = info.eps * max(least, right.norm().item())
        assert (ours - right).norm() <= (theirs - right).norm() + 2 * rounding


def flat(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(logits.reshape(-1, V), labels.reshape(-1), **options)


def capped(logits: Tensor, cap: float) -> Tensor:
    logits = logits / cap
    logits = torch.tanh(logits)
    return logits * cap


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


USES: dict[str, Callable[[Tensor], Tensor]] = {
    "product": lambda x: x * x,
    "softmax": lambda x: x.softmax(-1),
    "log_softmax, gather": lambda x: F.log_softmax(x, -1)[..., 3],
    "row": lambda x: x[:, -1, :],
    "rows by list": lambda x: x[[1, 0, 2]],
    "rows by mask": lambda x: x.reshape(-1, V)[torch.arange(B * T) % 2 == 0],
    "some classes": lambda x: x[..., 1:],
    "classes of a flat view": lambda x: x.flatten(),
    "transposed": lambda x: x.transpose(1, 2),
    "tokens transposed": lambda x: x.transpose(0, 1),
    "transposed copy": lambda x: x.transpose(1, 2).contiguous(),
    "chunk": lambda x: x.chunk(2, dim=1)[1],
    "split classes": lambda x: x.split([30, 7], dim=-1)[1],
    "unsqueezed": lambda x: x[:, None].squeeze(1),
    "narrower": lambda x: x.bfloat16(),
    "wider": lambda x: x.double(),
    "copy": lambda x: x[:, -1].to(copy=True, dtype=torch.float32, device="cpu"),
    "clone": lambda x: x.clone()[1:],
    "number": lambda x: x / 3 * 2,
    "tensor": lambda x: x * torch.tensor(2.0),
    "capped twice": lambda x: capped(capped(x, 2), 3),
    "capped": lambda x: capped(x[:, 1:], 0.5),
    "kl": lambda x: F.kl_div(F.log_softmax(x, -1), torch.full((V,), 1 / V), reduction="none"),
    "probability targets": lambda x: F.cross_entropy(x.view(-1, V), torch.full((B * T, V), 1 / V)),
    "no argument of one's own": lambda x: torch.cat((x[:1], x[1:])),
    "as mask": lambda x: torch.where(x > 0, x, 2 * x),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_everything_else_gets_the_logits(
    use: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor]
) -> None:
    stock, fused = both(bias=True)
    expected, got = use(stock(batch[0])[1]), use(fused(batch[0])[1])
    assert (got.shape, got.dtype, got.device) == (expected.shape, expected.dtype, expected.device)
    assert got.requires_grad
    upstream = torch.randn_like(expected)
    expected.backward(upstream)
    got.backward(upstream)
    torch.testing.assert_close(got.detach(), expected.detach())
    assert_same_gradients(stock, fused)


def test_as_many_tokens_as_classes_are_told_apart() -> None:
    """Where T = V, sizes do not tell which dimension holds the classes."""
    hidden, head = torch.randn(2, V, D), masked_loss.fuse_linear_loss(Model()).lm_head
    expected = F.linear(hidden, head.weight)
    uses: list[Callable[[Tensor], Tensor]] = [
        lambda x: x.mT,
        lambda x: x.mT.contiguous(),
        lambda x: x.mT[:, :, :-1],
        lambda x: x.reshape(2, V, V)[:, 1:],
        lambda x: x.transpose(0, 1)[2],
        lambda x: x.mT.flatten(1),
    ]
    for use in uses:
        torch.testing.assert_close(use(head(hidden)) + 0, use(expected))
    target = torch.randint(V, (2, V))
    got = F.cross_entropy(head(hidden).mT, target)
    torch.testing.assert_close(got, F.cross_entropy(expected.mT, target))
    got = F.cross_entropy(head(hidden), target)  # classes are dimension 1 by F.cross_entropy's rule
    torch.testing.assert_close(got, F.cross_entropy(expected, target))


def test_looking_is_free_of_computing(batch: tuple[Tensor, Tensor], no_logits: None) -> None:
    _, fused = both()
    logits = fused(batch[0])[1]
    assert logits.shape == (B, T, V)
    assert logits.size(-1) == logits.shape[2] == V
    assert len(logits) == B
    assert (logits.dtype, logits.device.type, logits.dim()) == (torch.float32, "cpu", 3)
    assert logits.requires_grad
    assert not logits.is_leaf
    assert logits.is_floating_point()
    assert logits.is_contiguous()
    assert logits.numel() == B * T * V
    with pytest.raises(AssertionError, match="computed"):
        logits.sum()


def test_values_come_out_everywhere(batch: tuple[Tensor, Tensor]) -> None:
    stock, fused = both()
    expected = stock(batch[0])[1].detach()
    with torch.no_grad():
        logits = fused(batch[0])[1]
    assert not logits.requires_grad
    assert "tensor(" in repr(logits)
    assert logits.tolist() == expected.tolist()
    assert (logits.numpy() == expected.numpy()).all()
    assert float(logits[0, 0, 0]) == pytest.approx(float(expected[0, 0, 0]), abs=1e-6)
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))
    assert torch.equal(pickle.loads(pickle.dumps(logits)), expected)
    assert torch.equal(copy.deepcopy(logits), expected)
    file = io.BytesIO()
    torch.save(logits, file)
    file.seek(0)
    assert torch.equal(torch.load(file), expected)
    torch.testing.assert_close(torch.stack(list(logits)), expected)
    assert type(logits.detach()) is Tensor
    assert type(logits.data) is Tensor


def test_without_torch_function_the_logits_are_right_too(batch: tuple[Tensor, Tensor]) -> None:
    """What calls torch from C++ meets a tensor with a graph: its values and gradients."""
    stock, fused = both(bias=True)
    expected, logits = stock(batch[0])[1], fused(batch[0])[1]
    with torch._C.DisableTorchFunctionSubclass():
        got = logits.exp().sum() + logits[:, :-1].sum()
    (expected.exp().sum() + expected[:, :-1].sum()).backward()
    got.backward()
    assert_same_gradients(stock, fused)


def test_loss_and_logits_both_give_gradients(batch: tuple[Tensor, Tensor]) -> None:
    ids, labels = batch
    stock, fused = both()
    for model in (stock, fused):
        loss, logits = model(ids, labels)
        (loss + 0.01 * logits.logsumexp(-1).square().mean()).backward()
    assert_same_gradients(stock, fused)


def test_changes_in_place_are_seen_by_the_loss(batch: tuple[Tensor, Tensor]) -> None:
    ids, labels = batch
    losses = []
    for model in both():
        logits = model(ids)[1]
        early = logits[..., :-1, :]  # shares memory with logits
        logits[:, 0] = 0.0
        logits /= 2
        losses.append(flat(early, labels[:, 1:]) + shifted(logits, labels))
    torch.testing.assert_close(losses[1], losses[0])


def test_no_grad_stays_no_grad(batch: tuple[Tensor, Tensor], no_logits: None) -> None:
    ids, labels = batch
    _, fused = both()
    with torch.no_grad():
        loss, logits = fused(ids, labels)
        assert not loss.requires_grad
    assert not shifted(logits, labels).requires_grad
    with torch.inference_mode():
        loss, _ = fused(ids, labels)
        assert loss.is_inference()
    with torch.no_grad():
        part = fused(ids)[1][:, 1:]
    assert not flat(part, labels[:, 1:]).requires_grad


def test_logits_seen_under_no_grad_still_give_gradients(batch: tuple[Tensor, Tensor]) -> None:
    ids, labels = batch
    stock, fused = both()
    for model in (stock, fused):
        logits = model(ids)[1]
        with torch.no_grad():
            assert logits.argmax(-1).shape == ids.shape
        with torch.inference_mode():
            assert (logits * 2).is_inference()
        shifted(logits, labels).backward()
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


def test_changed_weights_are_an_error_not_other_logits(batch: tuple[Tensor, Tensor]) -> None:
    _, fused = both()
    optimizer = torch.optim.SGD(fused.parameters(), lr=0.1)
    loss, logits = fused(*batch)
    loss.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"fuse_linear_loss: .*changed in place"):
        logits.sum()
    with pytest.raises(RuntimeError, match="changed in place"):
        shifted(logits[:, 1:], batch[1][:, 1:])
    _, seen = fused(*batch)
    expected = seen + 0
    optimizer.step()
    assert torch.equal(seen, expected)  # computed before


def test_hooks_on_logits(batch: tuple[Tensor, Tensor]) -> None:
    ids, labels = batch
    stock, fused = both()
    seen: list[Tensor] = []
    kept = []
    for model in (stock, fused):
        logits = model(ids)[1]
        logits.register_hook(seen.append)
        logits.retain_grad()
        shifted(logits, labels).backward()
        kept.append(logits.grad)
    torch.testing.assert_close(seen[1], seen[0])
    torch.testing.assert_close(kept[1], kept[0])
    _, logits = fused(ids, labels)
    with pytest.raises(RuntimeError, match=r"register_hook: the loss was computed without"):
        logits.register_hook(seen.append)


def test_gradients_of_logits(batch: tuple[Tensor, Tensor]) -> None:
    ids, labels = batch
    stock, fused = both()
    results = []
    for model in (stock, fused):
        logits = model(ids)[1]
        loss = shifted(logits * logits.sigmoid(), labels)  # a loss of computed logits
        results.append(torch.autograd.grad(loss, logits))
    torch.testing.assert_close(results[1], results[0])
    loss, logits = fused(ids, labels)
    for differentiate in (
        lambda: torch.autograd.grad(loss, logits),
        lambda: torch.autograd.grad(loss, [ids.float(), logits], allow_unused=True),
        lambda: torch.autograd.backward(loss, inputs=[logits]),
        lambda: loss.backward(inputs=[logits]),
    ):
        with pytest.raises(RuntimeError, match=r"(grad|backward): the loss was computed without"):
            differentiate()


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


def test_models_without_a_head_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"fuse_linear_loss: .*output head named lm_head.*got Seq"):
        masked_loss.fuse_linear_loss(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got int"):
        masked_loss.fuse_linear_loss(3)  # type: ignore[type-var]


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
