# SPDX-License-Identifier: BSD-3-Clause
"""fuse_linear_loss under parallelize_module and FSDP2: a plan's gather of logits is not made."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from rank_cases import ENDS, Case, errors_of, needs_gloo, report
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import masked_loss
from masked_loss import fuse, global_normalizer, masked_cross_entropy
from masked_loss.fuse import LazyLogits
from masked_loss.fuse.parts import Parts

V, D, B, T = 41, 16, 4, 8

pytestmark = needs_gloo


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.norm = nn.LayerNorm(D)
        self.lm_head = nn.Linear(D, V)

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.norm(self.embed(ids)))


def make_model() -> Model:
    torch.manual_seed(1)
    return Model().double()


def make_batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(2))
    labels = ids.roll(-1, 1)
    labels[:, -1] = labels[-1] = -100
    return ids, labels


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def check(model: nn.Module) -> None:
    """The gradients are those of one process."""
    whole = make_model()
    ids, labels = make_batch()
    loss_of(whole(ids), labels).backward()
    for mine, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        grad = mine.grad.full_tensor() if isinstance(mine.grad, DTensor) else mine.grad
        torch.testing.assert_close(grad, theirs.grad, rtol=1e-10, atol=1e-12)


def tensor_mesh(ranks: int) -> DeviceMesh:
    return init_device_mesh("cpu", (ranks,))


COLUMNS = ColwiseParallel(output_layouts=Replicate())
PLANS = {
    "columns": {"lm_head": COLUMNS},
    "sequences": {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "lm_head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    },
}


def fused(rank: int, ranks: int) -> None:
    """The dense logits are computed nowhere, and nothing of their size is exchanged."""
    ids, labels = make_batch()
    for name, plan in PLANS.items():
        for before in (True, False):
            model = make_model()
            if before:
                masked_loss.fuse_linear_loss(model)
            parallelize_module(model, tensor_mesh(ranks), dict(plan))
            masked_loss.fuse_linear_loss(model)
            with mock.patch.object(Parts, "compute", side_effect=AssertionError("computed")):
                logits = model(ids)
                assert type(logits) is LazyLogits
                assert logits.shape == (B, T, V)
                with CommDebugMode() as exchanged:
                    loss = loss_of(logits, labels)
                assert exchanged.get_total_counts() == 1
                loss.backward()
            torch.testing.assert_close(loss, loss_of(make_model()(ids), labels))
            check(model)
            assert masked_loss.is_fused(model), name


def looked_at(rank: int, ranks: int) -> None:
    """Then the logits are gathered, as the plan says, with their gradients."""
    ids, labels = make_batch()
    model = masked_loss.fuse_linear_loss(make_model())
    parallelize_module(model, tensor_mesh(ranks), dict(PLANS["columns"]))
    logits = model(ids)
    torch.testing.assert_close(logits + 0, make_model()(ids))
    loss_of(2 * logits.tanh() / 2 + logits - logits.tanh(), labels).backward()
    check(model)
    assert not masked_loss.is_fused(model)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).argmax(-1), make_model()(ids).argmax(-1))


def of_dtensors(rank: int, ranks: int) -> None:
    """Logits that stay a DTensor have a loss that is one; this rank's columns are computed."""
    ids, labels = make_batch()
    mesh = tensor_mesh(ranks)
    for layout in (Shard(-1), Replicate()):
        model = masked_loss.fuse_linear_loss(make_model())
        columns = ColwiseParallel(output_layouts=layout, use_local_output=False)
        parallelize_module(model, mesh, {"lm_head": columns})
        logits = model(ids)
        assert logits.device_mesh == mesh
        assert logits.placements == ((Shard(2),) if layout == Shard(-1) else (Replicate(),))
        loss = masked_cross_entropy(logits, DTensor.from_local(labels, mesh, [Replicate()]))
        assert isinstance(loss, DTensor)
        loss.backward()
        check(model)
        assert masked_loss.is_fused(model)
        dense = (model(ids) + 0).full_tensor()
        torch.testing.assert_close(dense, make_model()(ids))
    model = masked_loss.fuse_linear_loss(make_model())
    parallelize_module(model, mesh, {"lm_head": ColwiseParallel()})
    mine = make_model()(ids).chunk(ranks, -1)[rank]
    torch.testing.assert_close(model(ids), mine)


def options(rank: int, ranks: int) -> None:
    """What is done to logits on their way, and what a loss is given, is of the whole vocabulary."""
    ids, labels = make_batch()
    added, weight = torch.linspace(-1, 1, V).double(), torch.linspace(0.5, 1, V).double()
    whole = make_model()
    model = masked_loss.fuse_linear_loss(make_model())
    parallelize_module(model, tensor_mesh(ranks), dict(PLANS["columns"]))
    calls: list[Callable[[Tensor], Tensor]] = [
        lambda x: loss_of(30 * (x / 30).tanh(), labels),
        lambda x: loss_of(x + added, labels),
        lambda x: F.cross_entropy(x.transpose(1, 2), labels, weight=weight, label_smoothing=0.1),
        lambda x: masked_cross_entropy(x, ids, labels > 0, shift=True, z_loss=0.1),
        lambda x: x.log_softmax(-1).gather(-1, ids[..., None]).sum(),
        lambda x: sum(
            loss_of(row[None], label[None]) for row, label in zip(x[:2], labels[:2], strict=True)
        ),
    ]
    for call in calls:
        torch.testing.assert_close(call(model(ids)), call(whole(ids)))
        assert masked_loss.is_fused(model)


def with_fsdp(rank: int, ranks: int) -> None:
    """Two ways at once: halves of the batch, halves of the head."""
    mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("dp", "tp"))
    ids, labels = (x.chunk(2)[mesh.get_local_rank("dp")] for x in make_batch())
    model = masked_loss.fuse_linear_loss(make_model())
    parallelize_module(model, mesh["tp"], dict(PLANS["sequences"]))
    fully_shard(model, mesh=mesh["dp"], reshard_after_forward=False)
    normalizer = global_normalizer(labels, group=mesh.get_group("dp"))
    masked_cross_entropy(model(ids), labels, normalizer=normalizer).backward()
    assert masked_loss.is_fused(model)
    check(model)


def not_fused(rank: int, ranks: int) -> None:
    """A head that is shared in another way has its logits computed, and that is said once."""
    ids, _ = make_batch()
    model = masked_loss.fuse_linear_loss(make_model())
    parallelize_module(model, tensor_mesh(ranks), {"lm_head": RowwiseParallel()})
    fuse.head._said.clear()
    hidden = make_model().norm(make_model().embed(ids)).chunk(ranks, -1)[rank]
    with pytest.warns(UserWarning, match=r"DTensors placed by .*Shard\(dim=1\).*are computed"):
        logits = model.lm_head(hidden)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.lm_head(hidden)
    assert masked_loss.is_fused(model).logits == "DTensor"
    torch.testing.assert_close(logits, make_model()(ids))


CASES: dict[str, Case] = {
    f.__name__: f for f in (fused, looked_at, of_dtensors, options, with_fsdp, not_fused)
}


@pytest.fixture(scope="module")
def all_errors() -> dict[int, dict[str, str]]:
    return errors_of(__name__, (4,))


@pytest.mark.parametrize("case", [*CASES, ENDS])
def test_ranks(case: str, all_errors: dict[int, dict[str, str]]) -> None:
    report(case, all_errors[4])
