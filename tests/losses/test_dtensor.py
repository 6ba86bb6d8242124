# SPDX-License-Identifier: BSD-3-Clause
"""DTensors in and out: every function as in one process that has the whole, on meshes of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import combinations_with_replacement, product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_cases import ENDS, Case, errors_of, needs_gloo, report
from samples import OPTIONS, concrete
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor import distribute_tensor as distributed
from torch.distributed.tensor.debug import CommDebugMode

import masked_loss
from masked_loss import (
    cross_entropy,
    global_normalizer,
    linear_cross_entropy,
    masked_cross_entropy,
    masked_divergence,
    masked_mean,
    masked_moments,
    masked_reduce,
    masked_whiten,
    token_log_probs,
    topk_divergence,
)

V, SHAPE = 13, (5, 7)
REDUCTIONS = ("none", "sum", "mean", "sequence_mean")
Placements = tuple[Placement, ...]

pytestmark = needs_gloo


@cache
def mesh_of(ranks: int) -> DeviceMesh:
    return init_device_mesh("cpu", (2,) if ranks == 2 else (2, 2))


def layouts(ranks: int, classes: bool = False) -> Iterator[tuple[DeviceMesh, Placements]]:
    """Every way to share tokens [batch, time] and, at most once, the classes; the dimensions of a
    mesh in one of their two orders."""
    each = (Shard(0), *[Shard(2)] * classes, Shard(1), Replicate())
    mesh = mesh_of(ranks)
    every = combinations_with_replacement(each, mesh.ndim)
    yield from ((mesh, p) for p in every if p.count(Shard(2)) < 2)


def of_tokens(placements: Placements) -> Placements:
    return tuple(Replicate() if p == Shard(2) else p for p in placements)


class Problem:
    """Seven tokens of five sequences; the last one is masked, some others are too."""

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(5)

        def numbers(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=random, dtype=torch.float64)

        self.logits, self.teacher, self.values = (
            numbers(*SHAPE, V),
            numbers(*SHAPE, V),
            numbers(*SHAPE),
        )
        self.target = torch.randint(V, SHAPE, generator=random)
        self.target[1, 2:] = -100
        mask = torch.rand(SHAPE, generator=random, dtype=torch.float64)
        self.mask = mask * (mask > 0.3)
        self.mask[-1] = 0
        self.logits[-1] = torch.nan  # never read, whatever is shifted


def gathered(x: Any) -> Any:
    """On every rank the whole; a scalar has to be there already."""
    if isinstance(x, tuple):
        return tuple(map(gathered, x))
    assert isinstance(x, DTensor)
    assert x.dim() or all(p.is_replicate() for p in x.placements)
    return x.full_tensor()


def assert_same(got: Any, expected: Any) -> None:
    torch.testing.assert_close(gathered(got), expected, rtol=1e-10, atol=1e-12)


def compare(
    call: Callable[..., Any], given: dict[str, Tensor], mesh: DeviceMesh, placements: Placements
) -> None:
    """Results and gradients of ``call``, of tensors and of DTensors."""
    whole = [x.clone().requires_grad_() for x in given.values()]
    parts = [
        distributed(x, mesh, placements if name == "logits" else of_tokens(placements))
        for name, x in given.items()
    ]
    parts = [x.requires_grad_() for x in parts]
    results = [call(*whole), call(*parts)]
    assert_same(results[1], results[0])
    for result in results:
        loss = result[0] if isinstance(result, tuple) else result
        (loss * 1.5).sum().backward()
    for x, d in zip(whole, parts, strict=True):
        assert_same(d.grad, x.grad)


def losses(rank: int, ranks: int) -> None:
    """Every reduction, however tokens and classes are shared; gradients of logits and mask too."""
    p = Problem()
    options = {"label_smoothing": 0.1, "z_loss": 0.05, "return_stats": True}
    for mesh, placements in layouts(ranks, classes=True):
        target = distributed(p.target, mesh, of_tokens(placements))
        for reduction in REDUCTIONS:
            compare(
                lambda x, m, t=target, r=reduction: masked_cross_entropy(
                    x, t if isinstance(x, DTensor) else p.target, m, reduction=r, **options
                ),
                {"logits": p.logits, "mask": p.mask},
                mesh,
                placements,
            )


def options(rank: int, ranks: int) -> None:
    """Every option, where tokens are shared both ways, and where the classes are."""
    p = Problem()
    for mesh, placements in layouts(ranks, classes=True):
        if placements not in ((Shard(0), Shard(1)), (Shard(2), Shard(1)), (Shard(2),)):
            continue
        for name, given in OPTIONS.items():
            if name == "inplace" or (given.get("shift") and Shard(1) in placements):
                continue
            whole = concrete(given, SHAPE, V, torch.float64)
            ignored = given.get("ignore_index", -100)
            target = p.target.where(p.target != -100, ignored)
            parts = {**whole, "target": distributed(target, mesh, of_tokens(placements))}
            whole["target"] = target
            if name == "temperatures":
                each = whole["temperature"]
                parts["temperature"] = distributed(each, mesh, of_tokens(placements))
            for reduction in ("mean", "sequence_mean"):
                compare(
                    lambda x, m, w=whole, d=parts, r=reduction: masked_cross_entropy(
                        x, mask=m, reduction=r, **(d if isinstance(x, DTensor) else w)
                    ),
                    {"logits": p.logits, "mask": p.mask},
                    mesh,
                    placements,
                )


def log_probs(rank: int, ranks: int) -> None:
    p = Problem()
    several = torch.stack([p.target, p.target.flip(0)], dim=-1)
    for mesh, placements in layouts(ranks, classes=True):
        for target in (p.target, several):
            placed = distributed(target, mesh, of_tokens(placements))
            mask = distributed(p.mask, mesh, of_tokens(placements))
            compare(
                lambda x, whole=target, t=placed, m=mask: token_log_probs(
                    x, *((t, m) if isinstance(x, DTensor) else (whole, p.mask)),
                    return_entropy=True,
                ),
                {"logits": p.logits},
                mesh,
                placements,
            )  # fmt: skip


def divergences(rank: int, ranks: int) -> None:
    p = Problem()
    for mesh, placements in layouts(ranks):
        teacher = distributed(p.teacher, mesh, placements)
        for reduction in REDUCTIONS:
            compare(
                lambda x, m, t=teacher, r=reduction: masked_divergence(
                    x, t if isinstance(x, DTensor) else p.teacher, m, reduction=r,
                    return_stats=True,
                ),
                {"logits": p.logits, "mask": p.mask},
                mesh,
                placements,
            )  # fmt: skip
        top = [x.log_softmax(-1)[..., :3] for x in (p.logits.nan_to_num(), p.teacher)]
        mask = distributed(p.mask, mesh, placements)
        got = topk_divergence(*(distributed(x, mesh, placements) for x in top), mask)
        assert_same(got, topk_divergence(*top, p.mask))


def reductions(rank: int, ranks: int) -> None:
    p = Problem()
    for mesh, placements in layouts(ranks):
        given = {"values": p.values, "mask": p.mask}
        for reduction in REDUCTIONS:
            for dim in (None, 0, 1, (0, 1)) if reduction in ("sum", "mean") else (None,):
                compare(
                    lambda v, m, r=reduction, d=dim: masked_reduce(v, m, reduction=r, dim=d),
                    given,
                    mesh,
                    placements,
                )
        compare(masked_mean, given, mesh, placements)
        values, mask = (distributed(x, mesh, placements) for x in given.values())
        for dim in (None, 0, 1):
            got = masked_moments(values, mask, dim=dim, correction=0.5)
            assert_same(got, masked_moments(p.values, p.mask, dim=dim, correction=0.5))
        assert_same(masked_whiten(values, mask), masked_whiten(p.values, p.mask))


def counts(rank: int, ranks: int) -> None:
    """Of the whole, and not a share of it: so is the loss that is divided by it."""
    p = Problem()
    weight = p.mask * (p.target != -100)
    for mesh, placements in layouts(ranks):
        target, mask = (distributed(x, mesh, placements) for x in (p.target, p.mask))
        number = global_normalizer(target, mask, count="sequences")
        assert_same(number, weight.any(dim=-1).double().sum())
        total = global_normalizer([target, target], [mask, mask])
        assert_same(total, 2 * weight.sum())
        logits = distributed(p.logits, mesh, placements)
        got = masked_cross_entropy(logits, target, mask, normalizer=total)
        assert_same(got, masked_cross_entropy(p.logits, p.target, p.mask) / 2)
        if Shard(1) not in placements:
            shifted = global_normalizer(target, mask, shift=True)
            assert_same(shifted, weight[:, 1:].sum())


def drop_in(rank: int, ranks: int) -> None:
    p = Problem()
    images = p.logits.movedim(-1, 1)
    weight = torch.arange(V, dtype=torch.float64)
    mesh = mesh_of(ranks)
    placements = (Shard(0),) + (Shard(2),) * (mesh.ndim - 1)
    of_targets = (Shard(0),) + (Shard(1),) * (mesh.ndim - 1)
    target, mask = (distributed(x, mesh, of_targets) for x in (p.target, p.mask))
    got = cross_entropy(distributed(images, mesh, placements), target, weight, mask=mask)
    assert_same(got, cross_entropy(images, p.target, weight, mask=p.mask))


def heads(mesh: DeviceMesh) -> Iterator[tuple[Placements, Placements]]:
    """Placements of hidden states [batch, time, width] and of a weight [classes, width]."""
    each = (
        (Replicate(), Shard(0)), (Shard(0), Shard(0)), (Shard(1), Replicate()),
        (Shard(2), Shard(1)), (Replicate(), Replicate()),
    )  # fmt: skip
    for pairs in product(each, repeat=mesh.ndim):
        hidden, weight = zip(*pairs, strict=True)
        if weight.count(Shard(0)) < 2:
            yield hidden, weight


def linear(rank: int, ranks: int) -> None:
    """However the head is shared; what each rank has of a gradient is added up by who needs it."""
    p = Problem()
    random = torch.Generator().manual_seed(7)
    hidden = torch.randn(*SHAPE, 6, generator=random, dtype=torch.float64)
    hidden[-1] = torch.nan
    weight = torch.randn(V, 6, generator=random, dtype=torch.float64)
    bias = torch.randn(V, generator=random, dtype=torch.float64)
    mesh = mesh_of(ranks)
    for i, (of_hidden, of_weight) in enumerate(heads(mesh)):
        given = {"hidden": hidden, "weight": weight, "bias": bias}
        whole = {name: x.clone().requires_grad_() for name, x in given.items()}
        of_bias = tuple(Replicate() if w == Shard(1) else w for w in of_weight)
        places = (of_hidden, of_weight, of_bias)
        parts = {
            name: distributed(x, mesh, place).requires_grad_()
            for (name, x), place in zip(given.items(), places, strict=True)
        }
        tokens = tuple(h if h in (Shard(0), Shard(1)) else Replicate() for h in of_hidden)
        target, mask = (distributed(x, mesh, tokens) for x in (p.target, p.mask))
        options = {"reduction": ("none", "mean")[i % 2], "label_smoothing": 0.1, "chunk_tokens": 4}
        expected = linear_cross_entropy(**whole, target=p.target, mask=p.mask, **options)
        got = linear_cross_entropy(**parts, target=target, mask=mask, **options)
        assert_same(got, expected)
        for loss in (got, expected):
            (1.5 * loss).sum().backward()
        for name, x in whole.items():
            assert_same(parts[name].grad, x.grad)


def compiled(rank: int, ranks: int) -> None:
    """Without a break in the graph: logits of two dimensions of a mesh, a sharded sequence."""
    if ranks > 2:  # it would take each of them as long
        return
    p = Problem()
    hidden, weight = p.teacher[..., :6], p.teacher[0, 0, :, None] * p.teacher[0, 1, :6]
    of_logits = [(p.logits, (Shard(0), Shard(2)))]
    of_head = [(hidden, (Shard(1),)), (weight, (Shard(0),))]
    for function, mesh, given, tokens in (
        (masked_cross_entropy, init_device_mesh("cpu", (1, 2)), of_logits, (Shard(0), Replicate())),
        (masked_cross_entropy, init_device_mesh("cpu", (2, 1)), of_logits, (Shard(0), Replicate())),
        (linear_cross_entropy, mesh_of(2), of_head, (Replicate(),)),
    ):

        @torch.compile(backend="aot_eager", fullgraph=True, dynamic=False)
        def loss(x: Tensor, *others: Tensor, _of: Callable[..., Tensor] = function) -> Tensor:
            return _of(2 * x, *others)

        parts = [distributed(x, mesh, places).requires_grad_() for x, places in given]
        whole = [x.clone().requires_grad_() for x, _ in given]
        got = loss(*parts, *(distributed(x, mesh, tokens) for x in (p.target, p.mask)))
        expected = function(2 * whole[0], *whole[1:], p.target, p.mask)
        assert_same(got, expected)
        got.backward()
        expected.backward()
        for part, x in zip(parts, whole, strict=True):
            assert_same(part.grad, x.grad)


def exchanges(rank: int, ranks: int) -> None:
    """One gather for the classes, a sum for what is above and below; nothing in backward, but of a
    linear loss the sum of the gradient of hidden states (or of a weight that all ranks have)."""
    p = Problem()
    mesh = mesh_of(ranks)
    hidden = torch.randn(*SHAPE, 6, dtype=torch.float64)
    weight = torch.randn(V, 6, dtype=torch.float64)
    options = {"label_smoothing": 0.1, "z_loss": 0.1}
    for placements, most in (((Shard(0), Replicate()), 2), ((Shard(2), Replicate()), 1)):
        placements = placements[: mesh.ndim]
        tokens = of_tokens(placements)
        target, mask = (distributed(x, mesh, tokens) for x in (p.target, p.mask))
        logits = distributed(p.logits, mesh, placements)
        rows = [Shard(0) if x == Shard(2) else Replicate() for x in placements]
        head = [distributed(hidden, mesh, tokens), distributed(weight, mesh, rows)]
        on_cpu = int(Shard(0) in placements)  # whether a target is out of range
        for inputs, function, backwards in (
            ([logits], masked_cross_entropy, 0),
            (head, linear_cross_entropy, 1),
        ):
            inputs = [x.requires_grad_() for x in inputs]
            with CommDebugMode() as forward:
                loss = function(*inputs, target, mask, **options)
            with CommDebugMode() as backward:
                loss.backward()
            assert forward.get_total_counts() == most + on_cpu
            assert backward.get_total_counts() == backwards


def partial(rank: int, ranks: int) -> None:
    """Logits that are still to be added up are, and plain targets are the same on every rank."""
    p = Problem()
    mesh = mesh_of(ranks)
    logits = DTensor.from_local(p.logits / ranks, mesh, [Partial()] * mesh.ndim)
    got = masked_cross_entropy(logits, p.target, p.mask)
    assert_same(got, masked_cross_entropy(p.logits, p.target, p.mask))


def extremes(rank: int, ranks: int) -> None:
    """A rank without tokens or classes, nothing active, a target that no class has."""
    p = Problem()
    mesh = mesh_of(ranks)
    same = [Replicate()] * (mesh.ndim - 1)
    for placement, tokens in ((Shard(0), Shard(0)), (Shard(2), Replicate())):
        places, of_targets = [placement, *same], [tokens, *same]
        for rows, classes in ((1, V), (5, 1)):
            given = p.logits[:rows, :, :classes], p.target[:rows].clamp(max=classes - 1)
            logits, target = (
                distributed(x, mesh, at) for x, at in zip(given, (places, of_targets), strict=True)
            )
            mask = p.mask[:rows]
            got = masked_cross_entropy(logits, target, distributed(mask, mesh, of_targets))
            assert_same(got, masked_cross_entropy(*given, mask))
            mine = got.to_local()
            everyones = [torch.empty_like(mine) for _ in range(ranks)]
            dist.all_gather(everyones, mine)
            assert all(torch.equal(mine, other) for other in everyones)
        logits = distributed(p.logits, mesh, places).requires_grad_()
        target = distributed(p.target, mesh, of_targets)
        loss = masked_cross_entropy(logits, target, torch.zeros_like(target))
        loss.backward()
        assert (loss.item(), logits.grad.to_local().abs().sum().item()) == (0, 0)
        wrong = p.target.clone()
        wrong[0, 0] = V
        with pytest.raises(IndexError, match=r"target.* (is 13, expected|of another rank)"):
            masked_cross_entropy(logits, distributed(wrong, mesh, of_targets))


def mistakes(mesh: DeviceMesh) -> list[tuple[Callable[[], Any], str]]:
    p = Problem()

    def placed(x: Tensor, placement: Placement) -> DTensor:
        return distributed(x, mesh, [placement] * mesh.ndim)

    x, t, world = placed(p.logits, Shard(0)), placed(p.target, Shard(0)), dist.group.WORLD
    class_weight, split = placed(p.logits[0, 0], Replicate()), placed(p.logits, Shard(1))
    classes = [DTensor.from_local(y, mesh, [Shard(2)] * mesh.ndim) for y in (p.logits, p.teacher)]
    bounds, rows = torch.tensor([0, 35]), placed(p.logits[0], Shard(0))
    columns = (Replicate(),) * (mesh.ndim - 1) + (Shard(2),)
    split_otherwise = DTensor.from_local(
        p.logits[..., :5].contiguous(), mesh, columns, shape=p.logits.shape,
        stride=p.logits.stride(),
    )  # fmt: skip
    return [
        (lambda: masked_cross_entropy(p.logits, t), "target must be a local tensor, as logits"),
        (lambda: masked_cross_entropy(x, p.target), "target must be a DTensor placed by"),
        (lambda: masked_cross_entropy(x, t[:3]), "target must have the shape"),
        (lambda: masked_cross_entropy(x, t, cu_seqlens=bounds), "cu_seqlens count tokens of one"),
        (lambda: masked_cross_entropy(split, t, shift=True), "shift before sharding"),
        (lambda: masked_divergence(*classes), "logits must have every class on every rank"),
        (lambda: masked_cross_entropy(split_otherwise, p.target), "logits must have [67] classes"),
        (lambda: cross_entropy(x, x), "class probabilities are not taken"),
        (
            lambda: cross_entropy(p.logits[0], t),
            "cross_entropy: target must be a local tensor, as input is",
        ),
        (lambda: masked_loss.cu_seqlens(position_ids=t), "position_ids must be a local tensor"),
        (
            lambda: masked_cross_entropy(p.logits, p.target, temperature=t.double()),
            "masked_cross_entropy: temperature must be a local tensor",
        ),
        (lambda: cross_entropy(x, t, reduction="sequence_mean"), 'reduction must be "none", "sum"'),
        (lambda: global_normalizer(t, group=world), "group must be None"),
        (lambda: masked_moments(t.double(), group=world), "group must be None"),
        (lambda: masked_loss.linear_divergence(x, x, x, x), "DTensors are not taken"),
        (lambda: linear_cross_entropy(p.logits, rows, p.target), "hidden must be a DTensor, as"),
        (lambda: linear_cross_entropy(x, p.logits[0], t), "weight must be a DTensor, as hidden"),
        (lambda: torch.ops.masked_loss.cross_entropy(x, t), "logits, target must be a local"),
        (
            lambda: masked_cross_entropy(p.logits, p.target, class_weight=class_weight),
            "class_weight must be a local tensor",
        ),
    ]


def errors(rank: int, ranks: int) -> None:
    """On every rank, before any waits for another."""
    mesh = mesh_of(ranks)
    for call, text in mistakes(mesh):
        with pytest.raises(ValueError, match=text):
            call()


CASES: dict[str, Case] = {
    f.__name__: f
    for f in (
        losses, options, log_probs, divergences, reductions, counts, drop_in, linear, compiled,
        exchanges, partial, extremes, errors,
    )
}  # fmt: skip


@pytest.fixture(scope="module")
def all_errors() -> dict[int, dict[str, str]]:
    return errors_of(__name__, (2, 4))


@pytest.mark.parametrize("ranks", [2, 4], ids=["2 ranks", "4 ranks"])
@pytest.mark.parametrize("case", [*CASES, ENDS])
def test_ranks(case: str, ranks: int, all_errors: dict[int, dict[str, str]]) -> None:
    report(case, all_errors[ranks])
