# SPDX-License-Identifier: BSD-3-Clause
"""detect_reduced_loss: what it stops, what it lets pass, and what it costs."""

from __future__ import annotations

import gc
import importlib
import inspect
import operator
import re
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import masked_loss
from masked_loss import detect
from masked_loss.detect import detect_reduced_loss
from masked_loss.errors import ReducedLossError
from masked_loss.integrations.trl import generalized_jsd_loss

TOKENS, CLASSES = 6, 5
MASK = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0])


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(TOKENS, CLASSES, requires_grad=True)


@pytest.fixture
def target() -> Tensor:
    return torch.arange(TOKENS) % CLASSES


def reduced(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target)


# What it stops


MULTIPLICATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "loss * mask": lambda loss, mask: loss * mask,
    "mask * loss": lambda loss, mask: mask * loss,
    "loss.mul": lambda loss, mask: loss.mul(mask),
    "mask.mul": lambda loss, mask: mask.mul(loss),
    "torch.mul": lambda loss, mask: torch.mul(loss, mask),
    "torch.multiply": lambda loss, mask: torch.multiply(mask, loss),
    "mask *= loss": lambda loss, mask: mask.clone().mul_(loss.detach()),
    "einsum": lambda loss, mask: torch.einsum(",n->n", loss, mask),
    "aten": lambda loss, mask: torch.ops.aten.mul(loss, mask),
    "torch.where": lambda loss, mask: torch.where(mask.bool(), loss, 0),
    "torch.where, tensors": lambda loss, mask: torch.where(mask > 0, loss, torch.zeros(())),
    "loss.where": lambda loss, mask: loss.where(mask > 0, torch.zeros(())),
    "masked_fill": lambda loss, mask: loss.masked_fill(mask == 0, 0.0),
    "masked_select": lambda loss, mask: loss.masked_select(mask > 0),
    "torch.masked_select": lambda loss, mask: torch.masked_select(loss, mask.bool()),
    "expanded and indexed": lambda loss, mask: loss.expand(TOKENS)[mask.bool()],
    "dot": lambda loss, mask: loss.expand(TOKENS).dot(mask),
    "matmul": lambda loss, mask: loss.expand(TOKENS) @ mask,
    "outer": lambda loss, mask: torch.outer(loss[None], mask),
    "addcmul": lambda loss, mask: torch.addcmul(torch.zeros(()), loss, mask),
    "a mask of another size": lambda loss, mask: loss * torch.cat([mask, mask, torch.ones(1)]),
}


@pytest.mark.parametrize("how", MULTIPLICATIONS)
def test_every_way_to_multiply_is_stopped(how: str, logits: Tensor, target: Tensor) -> None:
    with detect_reduced_loss(), pytest.raises(ReducedLossError):
        MULTIPLICATIONS[how](reduced(logits, target), MASK)


DERIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "scaled": lambda loss: 0.5 * loss,
    "divided": lambda loss: loss / 8,
    "divided in place": lambda loss: loss.clone().div_(8),
    "negated": lambda loss: -loss,
    "cast": lambda loss: loss.to(torch.float64),
    "float": lambda loss: loss.double().float(),
    "bfloat16": lambda loss: loss.bfloat16(),
    "cloned": lambda loss: loss.clone(),
    "detached": lambda loss: loss.detach(),
    "moved": lambda loss: loss.cpu(),
    "plus a number": lambda loss: loss + 1e-3,
    "added to zero": lambda loss: 0 + loss,
    "minus a scalar tensor": lambda loss: loss - torch.tensor(0.25),
    "plus a regulariser": lambda loss: loss + 1e-4 * torch.ones(3, 3).pow(2).sum(),
    "accumulated": lambda loss: torch.zeros(()).add(loss),
    "viewed": lambda loss: loss.view(1),
    "unsqueezed": lambda loss: loss.unsqueeze(0),
    "averaged again": lambda loss: loss.mean(),
    "two losses": lambda loss: loss + loss,
    "times a weight": lambda loss: loss * torch.tensor(0.1),
    "indexed": lambda loss: loss[None],
    "data": lambda loss: loss.data,
    "expanded": lambda loss: loss.expand(TOKENS),
    "expanded like the mask": lambda loss: loss.expand_as(MASK) / 2,
    "broadcast": lambda loss: torch.broadcast_to(loss, (TOKENS,)),
    "repeated": lambda loss: loss.repeat(TOKENS),
    "one of several": lambda loss: torch.stack([loss, loss])[0],
    "the mean of several": lambda loss: torch.stack([loss, loss]).mean(),
    "the weighted sum of several": lambda loss: (torch.stack([loss, loss]) * 0.5).sum(),
    "concatenated": lambda loss: torch.cat([loss[None], 2 * loss[None]]).sum(),
    "stacked alone": lambda loss: torch.stack([loss]),
    "switched": lambda loss: torch.where(torch.tensor(True), loss, 0.0),
    "copied": lambda loss: torch.zeros(()).copy_(loss),
    "added in place": lambda loss: torch.ones(()).add_(loss.detach()),
}


@pytest.mark.parametrize("how", DERIVATIONS)
def test_a_loss_is_remembered(how: str, logits: Tensor, target: Tensor) -> None:
    with detect_reduced_loss(), pytest.raises(ReducedLossError):
        DERIVATIONS[how](reduced(logits, target)) * MASK


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": lambda x, t: F.cross_entropy(x, t),
    "cross_entropy sum": lambda x, t: F.cross_entropy(x, t, reduction="sum"),
    "cross_entropy size_average": lambda x, t: F.cross_entropy(x, t, size_average=False),
    "cross_entropy of probabilities": lambda x, t: F.cross_entropy(x, x.detach().softmax(-1)),
    "nll_loss": lambda x, t: F.nll_loss(x.log_softmax(-1), t),
    "bce": lambda x, t: F.binary_cross_entropy(x.sigmoid()[:, 0], (t > 2).float()),
    "bce logits": lambda x, t: F.binary_cross_entropy_with_logits(x[:, 0], (t > 2).float()),
    "mse_loss": lambda x, t: F.mse_loss(x[:, 0], t.float()),
    "l1_loss": lambda x, t: F.l1_loss(x[:, 0], t.float()),
    "smooth_l1_loss": lambda x, t: F.smooth_l1_loss(x[:, 0], t.float()),
    "huber_loss": lambda x, t: F.huber_loss(x[:, 0], t.float()),
    "kl_div": lambda x, t: F.kl_div(x.log_softmax(-1), x.softmax(-1), reduction="batchmean"),
    "CrossEntropyLoss": lambda x, t: nn.CrossEntropyLoss()(x, t),
    "NLLLoss": lambda x, t: nn.NLLLoss()(x.log_softmax(-1), t),
    "BCEWithLogitsLoss": lambda x, t: nn.BCEWithLogitsLoss()(x[:, 0], (t > 2).float()),
    "MSELoss": lambda x, t: nn.MSELoss(reduction="sum")(x[:, 0], t.float()),
}


@pytest.mark.filterwarnings("ignore:size_average and reduce")
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_known(name: str, logits: Tensor, target: Tensor) -> None:
    with detect_reduced_loss(), pytest.raises(ReducedLossError):
        LOSSES[name](logits, target) * MASK


def test_every_function_with_a_reduction_is_known() -> None:
    """Not a list of our own: whatever the installed PyTorch reduces is recognised."""
    functions = [f for f in vars(F).values() if inspect.isfunction(f)]
    losses = [f for f in functions if "reduction" in inspect.signature(f).parameters]
    assert len(losses) >= 18
    assert all(detect._loss_signature(f) is not None for f in losses)
    assert detect._loss_signature(F.softmax) is None

    ours = [getattr(masked_loss, name) for name in masked_loss.__all__]
    functions = [f for f in ours if inspect.isfunction(f)]
    reducing = [f for f in functions if "reduction" in inspect.signature(f).parameters]
    assert len(reducing) >= 7
    assert all(detect._loss_signature(f) is not None for f in reducing)
    assert detect._loss_signature(masked_loss.token_log_probs) is None


def test_the_message_shows_both_lines(logits: Tensor, target: Tensor) -> None:
    with detect_reduced_loss():
        loss = F.cross_entropy(logits, target)
        loss = loss / 4
        with pytest.raises(ReducedLossError) as caught:
            loss = (loss * MASK).sum() / MASK.sum()
    message = str(caught.value)
    assert "shape [6]" in message
    assert 'cross_entropy, reduction="mean"' in message
    assert "loss = F.cross_entropy(logits, target)" in message
    assert "loss = (loss * MASK).sum() / MASK.sum()" in message
    assert message.count(__file__) == 2


def test_what_is_compiled_runs_uncompiled_and_is_seen(logits: Tensor, target: Tensor) -> None:
    compiled = torch.compile(
        lambda x, t: F.cross_entropy(x, t) * MASK, fullgraph=True, backend="eager"
    )
    with detect_reduced_loss(), pytest.raises(ReducedLossError):
        compiled(logits, target)
    assert compiled(logits, target).shape == MASK.shape

    right = torch.compile(lambda x, t: F.cross_entropy(x, t) / 2, fullgraph=True, backend="eager")
    with detect_reduced_loss():
        loss = right(logits, target)
        with pytest.raises(ReducedLossError):
            loss * MASK


def test_it_finds_the_line_behind_a_module(logits: Tensor, target: Tensor) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.criterion = nn.CrossEntropyLoss()

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.criterion(x, t)

    with detect_reduced_loss(), pytest.raises(ReducedLossError, match="in forward"):
        Model()(logits, target) * MASK


def test_it_works_under_autocast_and_through_backward(target: Tensor) -> None:
    layer = nn.Linear(4, CLASSES)
    x = torch.randn(TOKENS, 4)
    with detect_reduced_loss():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(layer(x), target)
            with pytest.raises(ReducedLossError):
                loss * MASK
        loss.backward()
    assert layer.weight.grad is not None


OURS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "masked_cross_entropy": lambda x, t: masked_loss.masked_cross_entropy(x, t, MASK),
    "with stats": lambda x, t: masked_loss.masked_cross_entropy(x, t, return_stats=True)[0],
    "cross_entropy": lambda x, t: masked_loss.cross_entropy(x, t, reduction="sum"),
    "linear_cross_entropy": lambda x, t: masked_loss.linear_cross_entropy(x, torch.eye(5), t),
    "masked_divergence": lambda x, t: masked_loss.masked_divergence(x, x.detach(), MASK),
    "linear_divergence": lambda x, t: masked_loss.linear_divergence(
        x, torch.eye(5), x.detach(), torch.eye(5), reduction="sum"
    ),
    "topk_divergence": lambda x, t: masked_loss.topk_divergence(x, x.detach(), MASK),
    "of TRL": lambda x, t: generalized_jsd_loss(x, x.detach(), reduction="mean"),
    "masked_reduce": lambda x, t: masked_loss.masked_reduce(x[:, 0], MASK, reduction="sum"),
    "masked_mean": lambda x, t: masked_loss.masked_mean(x[:, 0], MASK),
    "module": lambda x, t: masked_loss.MaskedCrossEntropyLoss()(x, t, MASK),
    "operator": lambda x, t: torch.ops.masked_loss.cross_entropy(x, t, MASK),
    "overload": lambda x, t: torch.ops.masked_loss.cross_entropy.default(x, t, reduction="sum"),
    "operator with stats": lambda x, t: torch.ops.masked_loss.cross_entropy_stats(x, t)[0],
    "reduce operator": lambda x, t: torch.ops.masked_loss.masked_reduce(x[:, 0]),
    "linear operator": lambda x, t: torch.ops.masked_loss.linear_cross_entropy(x, torch.eye(5), t),
    "operator of a divergence": lambda x, t: torch.ops.masked_loss.masked_divergence(x, x.detach()),
}


@pytest.mark.parametrize("name", OURS)
def test_every_loss_of_masked_loss_is_known(name: str, logits: Tensor, target: Tensor) -> None:
    with detect_reduced_loss():
        loss = OURS[name](logits, target)
        with pytest.raises(ReducedLossError, match=r"test_detect\.py"):
            loss * MASK


def test_masked_loss_itself_refuses_a_reduced_loss(logits: Tensor, target: Tensor) -> None:
    with pytest.raises(ReducedLossError):
        masked_loss.masked_mean(F.cross_entropy(logits, target), MASK)


def test_a_trainer_with_the_bug_is_stopped_at_its_first_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The two files of MiniMind's case, which the linter's tests read, are run here."""
    monkeypatch.syspath_prepend(
        Path(__file__).parents[2] / "lint" / "tests" / "corpus" / "wrong" / "minimind"
    )
    for name in ("model", "pretrain"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    pretrain = importlib.import_module("pretrain")
    pretrain.model = pretrain.TinyModel(vocab=50, dim=8).to(pretrain.DEVICE)
    pretrain.optimizer = torch.optim.SGD(pretrain.model.parameters(), lr=0.1)
    ids = torch.randint(50, (2, 4), device=pretrain.DEVICE)
    loader = [(ids, ids, torch.ones(2, 4))]
    pretrain.train_epoch(loader, 1)  # nothing fails
    with detect_reduced_loss(), pytest.raises(ReducedLossError) as caught:
        pretrain.train_epoch(loader, 1)
    assert re.search(r"model\.py:\d+, in forward\n +self\.last_loss = ", str(caught.value))
    assert re.search(r"pretrain\.py:\d+, in train_epoch\n +loss = torch\.sum", str(caught.value))
    for name in ("model", "pretrain"):
        sys.modules.pop(name, None)


# What it lets pass


CORRECT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mask before reducing": lambda x, t: (F.cross_entropy(x, t, reduction="none") * MASK).sum(),
    "reduce=False": lambda x, t: (F.cross_entropy(x, t, reduce=False) * MASK).sum(),
    "our own, unreduced": lambda x, t: masked_loss.cross_entropy(x, t, reduction="none") * MASK,
    "unreduced module": lambda x, t: nn.CrossEntropyLoss(reduction="none")(x, t) * MASK,
    "a scalar weight": lambda x, t: F.cross_entropy(x, t) * torch.tensor(0.5),
    "a learned weight of one element": lambda x, t: F.cross_entropy(x, t)
    * nn.Parameter(torch.ones(1)),
    "times the count": lambda x, t: F.cross_entropy(x, t) * MASK.sum(),
    "selection before the loss": lambda x, t: F.cross_entropy(x[MASK.bool()], t[MASK.bool()]) * 2,
    "mask on the logits": lambda x, t: F.cross_entropy(x * MASK[:, None], t),
    "adding something per token": lambda x, t: (F.cross_entropy(x, t) + x.pow(2).sum(-1)) * MASK,
    "a regulariser": lambda x, t: F.cross_entropy(x, t) + 1e-2 * (x * x).sum(),
    "an optimizer's step": lambda x, t: torch.ones(4, 3) * 0.5 * F.cross_entropy(x, t).detach(),
    "a vector of penalties": lambda x, t: F.cross_entropy(x, t) * torch.tensor([0.1, 0.2, 0.5]),
    "a product added to a loss": lambda x, t: torch.addcmul(F.cross_entropy(x, t), MASK, MASK),
    "two scalar losses": lambda x, t: F.cross_entropy(x, t) * F.mse_loss(x[:, 0], t.float()),
    "stacked task losses": lambda x, t: torch.stack([F.cross_entropy(x, t)] * 6) * MASK,
    "a detached loss as reward": lambda x, t: F.cross_entropy(x, t).detach() * x[:, 0],
    "operator, unreduced": lambda x, t: torch.ops.masked_loss.cross_entropy(x, t, reduction="none")
    * MASK,
    "a loss for what has none": lambda x, t: torch.where(MASK > 0, x[:, 0], F.cross_entropy(x, t)),
    "a switch": lambda x, t: torch.where(MASK.any(), F.cross_entropy(x, t), 0.0),
    "a mask of task losses": lambda x, t: (
        torch.stack([F.cross_entropy(x, t), F.mse_loss(x[:, 0], t.float())]) / 2
    ).where(torch.tensor([True, False]), torch.zeros(())),
    "one sample, not reduced": lambda x, t: F.cross_entropy(x[0], t[0], reduction="none") * MASK,
}


@pytest.mark.filterwarnings("ignore:size_average and reduce")
@pytest.mark.parametrize("name", CORRECT)
def test_correct_code_passes(name: str, logits: Tensor, target: Tensor) -> None:
    expected = CORRECT[name](logits, target)
    with detect_reduced_loss():
        got = CORRECT[name](logits, target)
    torch.testing.assert_close(got, expected)


def test_a_training_step_is_unchanged(target: Tensor) -> None:
    def step() -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, CLASSES))
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(3):
            loss = F.cross_entropy(model(torch.randn(TOKENS, 4)), target)
            optimizer.zero_grad()
            (loss / 2).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    expected = step()
    with detect_reduced_loss():
        got = step()
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


# Modes, cost and lifetime


def test_warn_speaks_once_per_place(logits: Tensor, target: Tensor) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with detect_reduced_loss(warn=True):
            loss = F.cross_entropy(logits, target)
            for _ in range(3):
                first = loss * MASK
            loss * MASK
    assert first.shape == MASK.shape
    assert len(caught) == 2
    assert {w.filename for w in caught} == {__file__}
    assert caught[0].lineno != caught[1].lineno


def test_outside_nothing_is_detected(logits: Tensor, target: Tensor) -> None:
    with detect_reduced_loss():
        loss = F.cross_entropy(logits, target)
    assert (loss * MASK).shape == MASK.shape
    with detect_reduced_loss():
        assert (loss * MASK).shape == MASK.shape  # it was not watched when it was reduced


def test_it_ends_after_an_error(logits: Tensor, target: Tensor) -> None:
    with pytest.raises(KeyError), detect_reduced_loss():
        raise KeyError
    assert (F.cross_entropy(logits, target) * MASK).shape == MASK.shape


WRITTEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "zeroed": lambda buffer, loss: buffer.add_(loss).zero_(),
    "zeroed and counted": lambda buffer, loss: buffer.add_(loss).zero_().add_(1),
    "copied and zeroed": lambda buffer, loss: buffer.copy_(loss).zero_(),
    "copied over": lambda buffer, loss: buffer.copy_(loss).copy_(torch.ones(())),
    "filled": lambda buffer, loss: buffer.copy_(loss).fill_(2),
    "set": lambda buffer, loss: (operator.setitem(buffer.copy_(loss), ..., 3), buffer)[1],
    "out": lambda buffer, loss: torch.add(torch.ones(()), 1, out=buffer.copy_(loss)),
    "through a view": lambda buffer, loss: buffer.copy_(loss).view(1).zero_() * 0 + buffer,
}


@pytest.mark.parametrize("how", WRITTEN)
def test_a_tensor_that_was_written_to_is_no_loss_any_more(
    how: str, logits: Tensor, target: Tensor
) -> None:
    with detect_reduced_loss():
        loss = reduced(logits, target).detach()
        buffer = torch.zeros(())
        assert (WRITTEN[how](buffer, loss) * MASK).shape == MASK.shape
        assert (buffer * MASK).shape == MASK.shape
        with pytest.raises(ReducedLossError):
            buffer.copy_(loss) * MASK


def test_tensors_whose_writes_are_not_counted(logits: Tensor, target: Tensor) -> None:
    with torch.inference_mode(), detect_reduced_loss(), pytest.raises(ReducedLossError):
        reduced(logits, target) / 2 * MASK


def test_outside_nothing_is_installed() -> None:
    def installed() -> list[object]:
        """Modes, hooks, and the functions that a detector could have replaced."""
        hooks = [v for k, v in vars(torch.nn.modules.module).items() if k.endswith("_hooks")]
        return [
            torch._C._len_torch_function_stack(),
            torch._C._len_torch_dispatch_stack(),
            torch._C._autograd._top_saved_tensors_default_hooks(True),
            *map(len, hooks),
            *map(id, (vars(F) | vars(torch.Tensor) | vars(masked_loss)).values()),
        ]

    before = installed()
    assert before[:3] == [0, 0, None]
    with detect_reduced_loss():
        assert installed() == [1, *before[1:]]
    assert installed() == before


def test_nested_detectors(logits: Tensor, target: Tensor) -> None:
    with detect_reduced_loss():
        with detect_reduced_loss():
            inner = F.cross_entropy(logits, target)
        with pytest.raises(ReducedLossError):
            inner * MASK


def test_it_keeps_no_tensor_alive(logits: Tensor, target: Tensor) -> None:
    gc.collect()
    with detect_reduced_loss() as detector:
        loss = F.cross_entropy(logits, target)
        scaled = loss / 2
        references = [weakref.ref(loss), weakref.ref(scaled)]
        assert len(detector._reduced) == 2
        del loss, scaled
        gc.collect()
        assert [r() for r in references] == [None, None]
        assert len(detector._reduced) == 0


def test_another_thread_is_not_disturbed(logits: Tensor, target: Tensor) -> None:
    shapes = []

    def work() -> None:
        shapes.append((F.cross_entropy(logits, target) * MASK).shape)

    with detect_reduced_loss():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert shapes == [MASK.shape]


def test_the_error_is_a_value_error() -> None:
    assert issubclass(ReducedLossError, ValueError)
