# SPDX-License-Identifier: BSD-3-Clause
"""Several ranks: averaged gradients are those of one process that has the whole batch.

Real process groups (gloo). The ranks are spawned and do all cases of their number in one go.
"""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from rank_cases import ENDS, errors_of, needs_gloo, report
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import masked_loss
from masked_loss import (
    global_normalizer,
    linear_cross_entropy,
    masked_cross_entropy,
    masked_moments,
    masked_reduce,
    masked_whiten,
)
from masked_loss.fuse import LazyLogits
from masked_loss.fuse.parts import Parts

V, D, T = 41, 16, 9

pytestmark = needs_gloo


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.body = nn.ModuleList(nn.Linear(D, D) for _ in range(2))
        self.lm_head = nn.Linear(D, V, bias=False)

    def hidden(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.body:
            x = x + layer(x).tanh()
        return x

    def forward(self, ids: Tensor, normalizer: Tensor | None = None) -> Tensor:
        logits = self.lm_head(self.hidden(ids))
        if normalizer is None:
            return logits
        return masked_cross_entropy(logits, ids, normalizer=normalizer, shift=True)


def make_model() -> Model:
    torch.manual_seed(1)
    return Model().double()


def make_batch(rows: int) -> tuple[Tensor, Tensor]:
    """Rows of very unequal length; the first rows, which are rank 0's, are empty."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(V, (rows, T), generator=generator)
    lengths = torch.randint(1, T + 1, (rows, 1), generator=generator)
    lengths[:2] = 0
    return ids, torch.arange(T) < lengths


def expected_gradients(rows: int, mask: bool = True) -> dict[str, Tensor]:
    model = make_model()
    ids, real = make_batch(rows)
    masked_cross_entropy(model(ids), ids, real if mask else None, shift=True).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check(model: nn.Module, expected: dict[str, Tensor]) -> None:
    got = {
        name.removeprefix("module."): p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    assert got.keys() == expected.keys()
    for name, grad in got.items():
        whole = grad.full_tensor() if isinstance(grad, DTensor) else grad
        torch.testing.assert_close(whole, expected[name], rtol=1e-10, atol=1e-12)


def sharded(model: Model) -> nn.Module:
    for layer in model.body:
        fully_shard(layer)
    return fully_shard(model)


def head_sharded(model: Model) -> nn.Module:
    fully_shard(model.lm_head)
    return sharded(model)


WRAPPERS: dict[str, Callable[[Model], nn.Module]] = {
    "DDP": DistributedDataParallel,
    "DDP, unused": lambda m: DistributedDataParallel(m, find_unused_parameters=True),
    "DDP, static": lambda m: DistributedDataParallel(m, static_graph=True),
    "FSDP2": sharded,
    "FSDP2, head alone": head_sharded,
}


def one_step(wrap: str, fused: bool, rank: int, ranks: int) -> None:
    """The loss is computed outside of the model, on its logits."""
    ids, real = (x[2 * rank : 2 * rank + 2] for x in make_batch(2 * ranks))
    model = make_model()
    model = WRAPPERS[wrap](masked_loss.fuse_linear_loss(model) if fused else model)
    normalizer = global_normalizer(ids, real, shift=True)
    loss = masked_cross_entropy(model(ids), ids, real, normalizer=normalizer, shift=True)
    assert rank or loss.item() == 0
    loss.backward()
    check(model, expected_gradients(2 * ranks))
    dist.all_reduce(loss)
    whole = make_batch(2 * ranks)
    mean = masked_cross_entropy(make_model()(whole[0]), *whole, shift=True)
    torch.testing.assert_close(loss / ranks, mean, check_dtype=False)


def loss_inside(wrap: str, fused: bool, rank: int, ranks: int) -> None:
    """The loss is computed by the model, as transformers' and MiniMind do."""
    ids = make_batch(2 * ranks)[0][2 * rank : 2 * rank + 2]
    model = make_model()
    model = WRAPPERS[wrap](masked_loss.fuse_linear_loss(model) if fused else model)
    model(ids, global_normalizer(ids, shift=True)).backward()
    check(model, expected_gradients(2 * ranks, mask=False))


def accumulated(wrap: str, fused: bool, rank: int, ranks: int) -> None:
    """Micro-batches of one row; one count for the whole step."""
    ids, real = (x[2 * rank : 2 * rank + 2] for x in make_batch(2 * ranks))
    model = make_model()
    model = WRAPPERS[wrap](masked_loss.fuse_linear_loss(model) if fused else model)
    normalizer = global_normalizer(list(ids.split(1)), list(real.split(1)), shift=True)
    for i in range(2):
        last = i == 1
        if isinstance(model, DistributedDataParallel):
            model.require_backward_grad_sync = last
        else:
            model.set_requires_gradient_sync(last)
        micro, mask = ids[i : i + 1], real[i : i + 1]
        masked_cross_entropy(
            model(micro), micro, mask, normalizer=normalizer, shift=True
        ).backward()
    check(model, expected_gradients(2 * ranks))


def counts(rank: int, ranks: int) -> None:
    target = torch.full((3, rank + 2), 5)
    target[0, 0] = -100
    total = sum(3 * (r + 2) - 1 for r in range(ranks))
    got = global_normalizer(target)
    assert (got.dtype, got.dim(), got.item()) == (torch.float64, 0, total / ranks)
    got = global_normalizer(target, torch.full(target.shape, 0.25))
    assert got.item() == 0.25 * total / ranks
    group = dist.new_group([0, 1])
    if rank < 2:
        assert global_normalizer(target, group=group).item() == (5 + 8) / 2
    else:
        with pytest.raises(ValueError, match=f"global_normalizer: group .*; rank {rank} is not"):
            global_normalizer(target, group=group)
    everything_masked = global_normalizer(target, torch.zeros_like(target))
    assert everything_masked.item() == 0
    logits = torch.randn(3, rank + 2, V, requires_grad=True)
    loss = masked_cross_entropy(
        logits, target, torch.zeros_like(target), normalizer=everything_masked
    )
    assert loss.item() == 0

    # what people write, for comparison: a token of a rank with few of them counts for more
    ids, real = (x[2 * rank : 2 * rank + 2] for x in make_batch(2 * ranks))
    model = DistributedDataParallel(make_model())
    masked_cross_entropy(model(ids), ids, real, shift=True).backward()
    with pytest.raises(AssertionError):
        check(model, expected_gradients(2 * ranks))


def linear(rank: int, ranks: int) -> None:
    ids, real = (x[2 * rank : 2 * rank + 2] for x in make_batch(2 * ranks))
    model = make_model()
    normalizer = global_normalizer(ids, real, shift=True)
    linear_cross_entropy(
        model.hidden(ids), model.lm_head.weight, ids, real, normalizer=normalizer, shift=True
    ).backward()
    for p in model.parameters():
        dist.all_reduce(p.grad)
        p.grad /= ranks
    check(model, expected_gradients(2 * ranks))


def sequences(rank: int, ranks: int) -> None:
    """Every rank's mean over the sequences of all ranks, however many of them it has."""
    logits = torch.randn(5, T, V, generator=torch.Generator().manual_seed(3)).double()
    ids, real = make_batch(5)
    mine = slice(rank, 5, ranks)
    n = global_normalizer(ids[mine], real[mine], count="sequences")
    assert n.item() == 3 / ranks  # two are empty
    losses = masked_cross_entropy(logits[mine], ids[mine], real[mine], reduction="none")
    loss = masked_reduce(losses, real[mine], dim=-1).sum() / n
    dist.all_reduce(loss)
    whole = masked_cross_entropy(logits, ids, real, reduction="sequence_mean")
    torch.testing.assert_close(loss / ranks, whole)


def moments(rank: int, ranks: int) -> None:
    """Those of all values; the same bits on every rank; the last rank has no value."""
    generator = torch.Generator().manual_seed(4)
    values = 100 + torch.randn(ranks, 3, 7, generator=generator)
    mask = torch.rand(ranks, 3, 7, generator=generator)
    mask = mask * (mask < 0.7)
    mask[-1] = 0
    group = dist.group.WORLD
    for dim in (None, -1):
        options = {"dim": dim, "correction": 1}
        ours = torch.stack(masked_moments(values[rank], mask[rank], group=group, **options))
        together = (
            (values, mask)
            if dim is None
            else (x.transpose(0, 1).flatten(1) for x in (values, mask))
        )
        torch.testing.assert_close(ours, torch.stack(masked_moments(*together, **options)))
        everyones = [torch.empty_like(ours) for _ in range(ranks)]
        dist.all_gather(everyones, ours)
        assert all(torch.equal(ours, other) for other in everyones)
    leaf = values[rank].clone().requires_grad_()
    white = masked_whiten(leaf, mask[rank], group=group)
    torch.testing.assert_close(white, masked_whiten(values, mask)[rank])
    white.sum().backward()
    assert (leaf.grad != 0).equal(mask[rank] != 0)
    with pytest.raises(ValueError, match="values over a group is not differentiable"):
        masked_moments(leaf, group=group)
    part = dist.new_group([0, 1])
    if rank < 2:
        ours, _, _ = masked_moments(values[rank], mask[rank], group=part)
        torch.testing.assert_close(ours, masked_moments(values[:2], mask[:2])[0])
    else:
        with pytest.raises(ValueError, match=f"masked_moments: group .*; rank {rank} is not"):
            masked_moments(values[rank], group=part)


def stages(ranks: int, fused: bool) -> list[nn.Module]:
    """A model in so many pieces; the head is in the last."""
    model = make_model()
    if fused:
        masked_loss.fuse_linear_loss(model)
    layers = [model.embed, *model.body, model.lm_head]
    return [*layers[: ranks - 1], nn.Sequential(*layers[ranks - 1 :])]


def pipelined(rank: int, ranks: int) -> None:
    ids = make_batch(4)[0]

    def loss_of(logits: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())

    whole = nn.Sequential(*stages(ranks, fused=False))
    expected = whole(ids)
    loss_of(expected, ids).backward()

    piece = stages(ranks, fused=True)[rank]
    stage = PipelineStage(piece, rank, ranks, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, 2, loss_fn=loss_of)
    with mock.patch.object(Parts, "compute", side_effect=AssertionError("logits are computed")):
        if rank < ranks - 1:
            schedule.step(*[ids][: rank == 0])
        else:
            logits = schedule.step(target=ids, losses=[])
    if rank == ranks - 1:
        head = piece[-1]
        assert type(logits) is LazyLogits
        assert (head.uses.losses, head.uses.reason) == (1, None)
        torch.testing.assert_close(logits + 0, expected)
    for mine, theirs in zip(piece.parameters(), whole[rank].parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def fsdp1_head_alone(rank: int, ranks: int) -> None:
    """FSDP1 frees the head that it wraps by itself: what to do is FSDP1's advice."""
    model = masked_loss.fuse_linear_loss(make_model())
    model.lm_head = FullyShardedDataParallel(model.lm_head, device_id=torch.device("cpu"))
    ids = make_batch(2)[0]
    logits = FullyShardedDataParallel(model, device_id=torch.device("cpu"))(ids)
    with pytest.raises(RuntimeError, match="FSDP1, do not wrap the head by itself"):
        nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())


CASES: dict[str, Callable[[int, int], None]] = {
    "counts": counts,
    "linear": linear,
    "sequences": sequences,
    "moments": moments,
    "pipelining": pipelined,
    "FSDP1, head alone": fsdp1_head_alone,
}
for _wrap in WRAPPERS:
    for _fused in (False, True):
        for _case in (one_step, loss_inside, accumulated):
            if _case is accumulated and "static" in _wrap:
                continue  # DDP cannot
            CASES[f"{_case.__name__}, {_wrap}{', fused' * _fused}"] = (
                lambda rank, ranks, case=_case, wrap=_wrap, fused=_fused: case(
                    wrap, fused, rank, ranks
                )
            )


@pytest.fixture(scope="module")
def all_errors() -> dict[int, dict[str, str]]:
    return errors_of(__name__, (2, 3))


@pytest.mark.parametrize("number", [2, 3], ids=["2 ranks", "3 ranks"])
@pytest.mark.parametrize("case", [*CASES, ENDS])
def test_ranks(case: str, number: int, all_errors: dict[int, dict[str, str]]) -> None:
    report(case, all_errors[number])


def test_without_a_process_group_it_is_the_local_count() -> None:
    target = torch.tensor([[1, 2, -100], [3, -100, -100]])
    assert global_normalizer(target).item() == 3
    assert global_normalizer(target, shift=True).item() == 1
    assert global_normalizer(target, ignore_index=1).item() == 5
    assert global_normalizer(target.int(), target > 1).item() == 2
    assert global_normalizer([target, target[:1]]).item() == 5
    assert global_normalizer([target, target], [None, target > 1]).item() == 5
    mask = torch.tensor([[0.5, 2.0, torch.nan], [0.0, torch.inf, torch.nan]])
    assert global_normalizer(target, mask).item() == 2.5  # ignored tokens' weights are not read
    assert not global_normalizer(target, mask.requires_grad_()).requires_grad
    assert global_normalizer(torch.empty(0, 3, dtype=torch.int64)).item() == 0


def test_sequences_that_have_an_active_token() -> None:
    target = torch.tensor([[1, 2, -100], [3, -100, -100], [-100, -100, -100]])
    assert global_normalizer(target, count="sequences").item() == 2
    assert global_normalizer(target, target != 3, count="sequences").item() == 1
    assert global_normalizer(target, shift=True, count="sequences").item() == 1
    assert global_normalizer([target, target[0]], count="sequences").item() == 3


def test_errors_say_what_was_expected() -> None:
    target = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"global_normalizer: mask must have shape \[2, 3\]"):
        global_normalizer(target, target[0])
    with pytest.raises(TypeError, match=r"global_normalizer: mask must be bool.* got complex64"):
        global_normalizer(target, torch.ones(2, 3, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"global_normalizer: mask must be on the device cpu"):
        global_normalizer(target, torch.ones(2, 3, device="meta"))
    with pytest.raises(TypeError, match=r"global_normalizer: mask must be a tensor, got int"):
        global_normalizer(target, [1])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="mask must be a tensor or a sequence of them, got int"):
        global_normalizer(target, 1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="target must be integer class indices, got float32"):
        global_normalizer(target.float())  # probabilities, whose count would be another one
    with pytest.raises(TypeError, match="ignore_index must be int, got float"):
        global_normalizer(target, ignore_index=0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sequences of one length"):
        global_normalizer([target], [None, None])
    with pytest.raises(ValueError, match="dimension for time"):
        global_normalizer(target[0, 0], shift=True)
    with pytest.raises(ValueError, match=r'count="sequences" needs .* dimension for time'):
        global_normalizer(target[0, 0], count="sequences")
    with pytest.raises(ValueError, match=r'count must be "tokens" or "sequences", got .rows.'):
        global_normalizer(target, count="rows")
