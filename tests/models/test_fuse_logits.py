# SPDX-License-Identifier: BSD-3-Clause
"""Whoever asks a fused model for its logits gets those that it would have had."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from fused_models import B, D, Model, T, V, assert_same_gradients, both, capped, flat, shifted
from torch import Tensor

import masked_loss

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
