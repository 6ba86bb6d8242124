# SPDX-License-Identifier: BSD-3-Clause
"""The CUDA kernels' own sources, run on the CPU by the emulator, against the specification.

The public functions run as they are; only the operators below them are those of the emulator. See
docs/cuda.md for what an emulator can and cannot tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from accuracy import Results, assert_as_accurate_as_eager, run
from cuda_emulator.build import NAMESPACE, build
from cuda_emulator.operators import emulated, load
from rounding import HALF_TYPES, assert_rounds_to_nearest_even, hard_numbers, of_float_products
from samples import CASES, FEW_CASES, REDUCE_CASES, REDUCTIONS, Case, Sample, predictions
from torch import Tensor

from masked_loss import (
    cross_entropy,
    masked_cross_entropy,
    masked_divergence,
    masked_reduce,
    reference,
)

EVERYTHING: dict[str, Any] = {
    "label_smoothing": 0.1,
    "z_loss": 0.01,
    "softcap": 5.0,
    "class_weight": True,
}


@pytest.fixture(scope="session")
def module() -> ModuleType:
    return load(build())


Configure = Callable[..., None]


@pytest.fixture(scope="session")
def set_to(module: ModuleType) -> Configure:
    """Sets the emulated device: ``set_to(seed=1, multiprocessors=2, ...)``."""

    def configure(**settings: int) -> None:
        new = module.Settings()
        for name, value in settings.items():
            setattr(new, name, value)
        module.configure(new)

    return configure


@pytest.fixture
def configure(set_to: Configure) -> Iterator[Configure]:
    set_to()
    yield set_to
    set_to()


@pytest.fixture(autouse=True)
def emulator(configure: Configure) -> Iterator[None]:
    with emulated():
        yield


def same_bits(a: Results, b: Results, what: str) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), f"{what}: {name}"


def check(case: Case, dtype: torch.dtype, **more: Any) -> None:
    if (
        "softcap" in case.options and dtype != torch.float64
    ):  # of which ex2.approx, here always off, makes tanh
        more.setdefault("roundings", 2)
    assert_as_accurate_as_eager(
        masked_cross_entropy, reference.masked_cross_entropy, case, dtype, **more
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_option(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_statistics(case: Case) -> None:
    check(case, torch.float32, return_stats=True)


@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_a_device_whose_functions_are_less_exact(case: Case, configure: Configure) -> None:
    """expf and logf off as CUDA's may be, where eager PyTorch here has the C library's."""
    configure(math_errors=True)
    check(case, torch.float32, roundings=2)


@pytest.mark.parametrize("case", REDUCE_CASES, ids=str)
def test_every_reduction(case: Case, dtype: torch.dtype) -> None:
    assert_as_accurate_as_eager(masked_reduce, reference.masked_reduce, case, dtype)


SCALED = [(x, x) for x in (torch.float64, torch.float32, *HALF_TYPES)]


@pytest.mark.parametrize("device", ["emulated", "cpu"])
@pytest.mark.parametrize("types", [*SCALED, *((torch.float32, x) for x in HALF_TYPES)], ids=str)
def test_a_gradient_times_a_number(
    types: tuple[torch.dtype, torch.dtype], device: str, configure: Configure
) -> None:
    """Rounded once, of any length and alignment, in place and apart; with 1 nothing is written."""
    configure(multiprocessors=1)
    ops = torch.ops.masked_loss if device == "cpu" else getattr(torch.ops, NAMESPACE)
    of_gradient, of_scaled = types
    wide = torch.promote_types(of_gradient, torch.float32)
    for count, skipped in ((0, 0), (7, 0), (20_011, 0), (20_011, 1), (20_011, 3)):
        gradient = torch.randn(count + skipped).to(of_gradient)[skipped:]
        for number in (0.3, 1.0, -(2.0**-10)):
            factor = torch.tensor(number, dtype=wide)
            expected = (gradient.to(wide) * factor).to(of_scaled)
            scaled = torch.full((count + skipped,), 9.0, dtype=of_scaled)[skipped:]
            ops.scale(scaled, gradient, factor)
            assert torch.equal(scaled, expected)
            if of_gradient == of_scaled:
                ops.scale(in_place := gradient.clone(), in_place, factor)
                assert torch.equal(in_place, expected)


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_half_types_are_rounded_to_nearest_even(dtype: torch.dtype) -> None:
    assert_rounds_to_nearest_even(of_float_products(hard_numbers(dtype), step=331))


def test_weights_that_cancel_leave_no_z_loss_of_zero_behind() -> None:
    """Their sum is 0, but not that of their class weights: scale_z is infinite, and not used."""
    logits = torch.randn(2, 5, requires_grad=True)
    mask, c = torch.tensor([1.0, -1.0], requires_grad=True), torch.tensor([1.0, 2, 1, 1, 1])
    ours, expected = (
        torch.autograd.grad(
            loss(logits, torch.tensor([0, 1]), mask, class_weight=c), (logits, mask)
        )
        for loss in (masked_cross_entropy, reference.masked_cross_entropy)
    )
    torch.testing.assert_close(ours, expected)


# More sequences than a block has warps, than a warp has lanes; longer than a piece of 2048 tokens.
PACKED = {
    "few": [0, 2, 2, 9, 13],
    "many": list(range(0, 3001, 3)),
    "long": [0, 1, 5000, 5000, 5001],
}


@pytest.mark.parametrize("max_blocks", [1 << 30, 3])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", PACKED)
def test_packed_sequences(name: str, reduction: str, max_blocks: int, configure: Configure) -> None:
    configure(max_blocks=max_blocks)
    bounds = torch.tensor(PACKED[name])
    options = {"reduction": reduction, "cu_seqlens": bounds}
    shape = (int(bounds[-1]) + 2,)
    case = Case(f"packed-{name}-{reduction}", shape, classes=None, options=options)
    assert_as_accurate_as_eager(masked_reduce, reference.masked_reduce, case, torch.float32)
    values, mask = torch.randn(shape, requires_grad=True), torch.rand(shape, requires_grad=True)
    each = masked_reduce(values, mask, dim=-1, cu_seqlens=bounds)
    if name == "few":
        check(
            Case(f"packed-rows-{reduction}", shape, 5, options=options | {"shift": True}),
            torch.float32,
        )
    total = (each * 2).sum()
    with_dim = torch.autograd.grad(total, (values, mask))
    total = (
        2
        * torch.stack(
            [
                (values[a:b] * mask[a:b]).sum() / mask[a:b].sum()
                for a, b in pairwise(PACKED[name])
                if b > a
            ]
        ).sum()
    )
    by_hand = torch.autograd.grad(total, (values, mask))
    for ours, theirs in zip(with_dim, by_hand, strict=True):
        torch.testing.assert_close(ours, theirs)


# Around the words of 16 bytes, the warp's and the block's share of a row, and the teams' limits:
# 128 and 2048 words. A row of `odd` begins at no multiple of 16 bytes, and its gradient elsewhere.
WIDTHS = [1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 127, 255, 257, 511, 513, 1023, 1025]
WIDTHS += [1031, 2049, 4099, 8193]


@pytest.mark.parametrize("layout", ["contiguous", "padded", "odd"])
@pytest.mark.parametrize("classes", WIDTHS)
def test_every_width(classes: int, layout: str, dtype: torch.dtype) -> None:
    """Both the fused pass (a scalar loss) and the separate ones (a loss for each token)."""
    for reduction in ("mean", "none"):
        for options in ({}, {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0}):
            more = {"reduction": reduction, **options}
            check(Case(f"{reduction}-{classes}", (5,), classes, layout, options=more), dtype)


@pytest.mark.parametrize("layout", ["contiguous", "odd"])
@pytest.mark.parametrize("classes", [16385, 20001])
def test_a_block_of_512_threads(classes: int, layout: str, dtype: torch.dtype) -> None:
    for options in ({}, EVERYTHING):
        check(Case(f"long-{classes}", (3,), classes, layout, options=options), dtype)


@pytest.mark.parametrize("clusters", [False, True], ids=["alone", "clusters"])
@pytest.mark.parametrize("shared", [3 << 10, 8 << 10, 20 << 10])
@pytest.mark.parametrize("layout", ["contiguous", "odd"])
def test_rows_that_shared_memory_cannot_hold(
    layout: str, shared: int, clusters: bool, dtype: torch.dtype, configure: Configure
) -> None:
    """All of a row's second look comes from memory, or all but the beginning; or several blocks
    share it."""
    for l2_bytes in (1 << 10, 50 << 20):
        configure(shared_per_block=shared, l2_bytes=l2_bytes, clusters=clusters)
        for classes in (700, 3001):
            check(Case(f"shared-{classes}", (9,), classes, layout), dtype)


@pytest.mark.parametrize("shared", [99 << 10, 227 << 10])
def test_shared_memory_beyond_48_kilobytes(
    shared: int, module: ModuleType, configure: Configure
) -> None:
    """What must be asked for begins below: a kernel's own variables count, too."""
    configure(shared_per_block=shared)
    for classes in (12_160, 12_288, 20_000):
        check(Case(f"shared-{classes}", (3,), classes), torch.float32)
        check(Case(f"shared-{classes}", (3,), 2 * classes), torch.bfloat16)
    # As much as there is, whatever a launch takes: another thread may be about to launch.
    assert module.least_shared_allowed() > shared - (1 << 10)


@pytest.mark.parametrize(
    ("rows", "classes", "parts"),
    [(1, 151_936, 37), (4, 151_936, 37), (32, 151_936, 8), (264, 151_936, 1), (1, 32_000, 1)],
)
def test_parts_of_a_row_fill_the_chip(
    rows: int, classes: int, parts: int, module: ModuleType, configure: Configure
) -> None:
    """bfloat16 rows on an H100, which holds 264 blocks of 512 threads."""
    configure(multiprocessors=132)
    assert module.parts_of_a_row(rows, classes, False) == parts


@pytest.mark.parametrize(
    ("rows", "classes", "parts"),
    [
        (1000, 151_936, 4),
        (1000, 300_000, 8),
        (1000, 97_000, 1),
        (200, 151_936, 4),
        (4, 151_936, 37),
    ],
)
def test_clusters_share_what_a_block_cannot_keep(
    rows: int, classes: int, parts: int, module: ModuleType, configure: Configure
) -> None:
    """bfloat16 rows with their gradient on an H100; where there are no clusters, or the code was
    compiled for older devices, a block for each, or parts where rows are few."""
    configure(multiprocessors=132)
    assert module.parts_of_a_row(rows, classes, True) == parts
    for older in ({"clusters": False}, {"ptx_version": 80}):
        configure(multiprocessors=132, **older)
        assert module.parts_of_a_row(rows, classes, True) == (1 if rows > 132 else parts)


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("layout", ["contiguous", "odd"])
def test_rows_shared_by_several_blocks(
    layout: str, reduction: str, inplace: bool, dtype: torch.dtype, configure: Configure
) -> None:
    """Few rows and a large vocabulary: a row is cut into parts."""
    configure(multiprocessors=16)
    classes = 70_001 if dtype in (torch.bfloat16, torch.float16) else 35_001
    for options in ({}, EVERYTHING, {"softcap": 8.0}):
        more = {"reduction": reduction, "inplace_backward": inplace, **options}
        case = Case(f"parts-{classes}", (2,), classes, layout, options=more)
        check(case, dtype, return_stats=bool(options))


@pytest.mark.parametrize("classes", [1, 3, 40])
def test_slope_of_a_softcap_far_out(classes: int, dtype: torch.dtype) -> None:
    """1 - tanh^2 near 1: a rounding of tanh more is many of the slope."""
    options = {"reduction": "none", "z_loss": 1e-4, "softcap": 30.0}
    check(Case(f"slope-{classes}", (30,), classes, mask="none", options=options, scale=50.0), dtype)


def test_a_grid_smaller_than_the_work(dtype: torch.dtype, configure: Configure) -> None:
    """More rows, tokens and groups than blocks: each block goes on to the next."""
    configure(max_blocks=2)
    for reduction in REDUCTIONS:
        for classes in (7, 1500):
            for options in ({}, EVERYTHING):
                more = {"reduction": reduction, **options}
                check(Case(f"grid-{reduction}", (7, 3), classes, options=more), dtype)
    for reduction in REDUCTIONS:
        case = Case(f"grid-{reduction}", (700, 3), None, options={"reduction": reduction})
        assert_as_accurate_as_eager(masked_reduce, reference.masked_reduce, case, dtype)


@pytest.mark.parametrize(
    "shape", [(1, 2048), (2, 2049), (2, 4099), (140_001,), (300, 2), (5, 1700)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sums_over_many_tokens(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """By one block alone; a group in several pieces, in more than a warp has lanes; many groups.

    Half types, too, are added up in float32: test_every_reduction is of all types.
    """
    for reduction in REDUCTIONS:
        case = Case(f"tokens-{reduction}", shape, None, options={"reduction": reduction})
        assert_as_accurate_as_eager(masked_reduce, reference.masked_reduce, case, dtype)


@pytest.mark.parametrize(
    "options", [{}, {"class_weight": True}, {"shift": True, "z_loss": 0.01}], ids=str
)
@pytest.mark.parametrize("shape", [(2, 333), (33, 20)], ids=str)
def test_every_place_of_a_batch(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    """A lane takes several tokens at a time, and then the rest: by one block, and by many."""
    for reduction in REDUCTIONS:
        case = Case(f"batch-{reduction}", shape, 3, options={"reduction": reduction, **options})
        check(case, torch.float32, return_stats=True)


@pytest.mark.parametrize(
    ("shape", "reduction", "launches"),
    [
        ((8192,), "mean", 3),
        ((8193,), "mean", 5),
        ((32, 256), "sequence_mean", 3),
        ((33, 200), "sequence_mean", 7),
        ((32, 300), "sequence_mean", 5),
    ],
    ids=str,
)
def test_launches(
    shape: tuple[int, ...], reduction: str, launches: int, module: ModuleType
) -> None:
    """Weights, rows, reduction: one each, up to 8192 tokens in 32 sequences."""
    logits, target = torch.randn(*shape, 3), torch.zeros(shape, dtype=torch.int64)
    before = module.launches()
    masked_cross_entropy(logits, target, reduction=reduction)
    assert module.launches() - before == launches


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)], ids=str)
def test_no_tokens(shape: tuple[int, ...]) -> None:
    for reduction in REDUCTIONS:
        logits = torch.zeros(*shape, 5, requires_grad=True)
        target = torch.zeros(shape, dtype=torch.int64)
        loss = masked_cross_entropy(logits, target, reduction=reduction)
        assert loss.sum() == 0
        loss.sum().backward()
        assert logits.grad is not None


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("shape", [(9, 60), (5, 3000), (3, 20_000), (1, 80_000)], ids=str)
def test_the_order_of_threads_does_not_matter(
    shape: tuple[int, int], options: dict[str, Any], configure: Configure
) -> None:
    """The same bits whatever runs first: every barrier is where it must be."""
    for dtype in (torch.float32, torch.bfloat16):
        first = None
        for seed in range(2):
            configure(seed=seed, multiprocessors=16, max_blocks=3)
            case = Case("order", shape[:1], shape[1], "odd", options=options)
            results = run(masked_cross_entropy, case.sample(dtype), return_stats=bool(options))
            first = first or results
            same_bits(first, results, f"seed {seed}")


@pytest.mark.parametrize("case", [*FEW_CASES, *REDUCE_CASES[::5]], ids=str)
def test_the_order_of_threads_does_not_matter_to_reductions(
    case: Case, configure: Configure
) -> None:
    function = masked_reduce if case.classes is None else masked_cross_entropy
    first = None
    for seed in range(3):
        configure(seed=seed, max_blocks=2)
        results = run(function, case.sample(torch.float32))
        first = first or results
        same_bits(first, results, f"seed {seed}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_probabilities(dtype: torch.dtype) -> None:
    for classes in (5, 130, 3001):
        for options in ({}, {"label_smoothing": 0.1}, {"weight": torch.rand(classes) + 0.5}):
            logits = (3 * torch.randn(6, classes)).to(dtype).requires_grad_()
            target = torch.rand(6, classes).softmax(-1).to(dtype)
            loss = cross_entropy(logits, target, **options)
            (gradient,) = torch.autograd.grad(loss, logits)
            wide = logits.detach().double().requires_grad_()
            more = {name: x.double() if isinstance(x, Tensor) else x for name, x in options.items()}
            truth = torch.nn.functional.cross_entropy(wide, target.double(), **more)
            (expected,) = torch.autograd.grad(truth, wide)
            torch.testing.assert_close(loss.double(), truth, rtol=2e-6, atol=2e-6)
            rounding = torch.finfo(dtype).eps
            atol = rounding * expected.abs().max().item()
            torch.testing.assert_close(gradient.double(), expected, rtol=rounding, atol=atol)


def test_masked_rows_are_not_read(dtype: torch.dtype) -> None:
    for reduction in REDUCTIONS:
        for classes in (9, 1500, 9000):
            case = Case("masked", (2, 4), classes, options={"reduction": reduction})
            clean, dirty = case.sample(dtype), case.sample(dtype)
            assert dirty.mask is not None
            assert dirty.target is not None
            masked = (dirty.mask == 0) | (dirty.target == -100)
            assert masked.any()
            with torch.no_grad():
                dirty.values[masked] = torch.nan
                dirty.target[masked & (dirty.mask == 0)] = 1 << 40
            same_bits(run(masked_cross_entropy, clean), run(masked_cross_entropy, dirty), "NaN")


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("classes", [3, 1500])
def test_rows_beyond_what_base_two_can_hold(classes: int, reduction: str) -> None:
    """Logits whose product with log2(e) is no float: a mask's finfo.min, a row of nothing else."""
    low = torch.finfo(torch.bfloat16).min
    logits = torch.full((4, classes), low, dtype=torch.bfloat16)
    logits[1, 1] = 2.0
    logits[2, 1] = -low
    logits[3] = torch.randn(classes)
    logits[3, ::2] = low
    sample = Sample(logits.requires_grad_(), torch.ones(4, dtype=torch.int64), None, {})
    ours = run(masked_cross_entropy, sample, reduction=reduction)
    truth = run(reference.masked_cross_entropy, sample.double(), reduction=reduction)
    torch.testing.assert_close(ours["loss"].double(), truth["loss"], rtol=1e-6, atol=1e-6)
    gradients = ours["gradient of values"].double(), truth["gradient of values"]
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-6)
    forward = masked_cross_entropy(logits.detach(), sample.target, reduction=reduction)
    torch.testing.assert_close(forward.double(), truth["loss"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("classes", [7, 1500, 9000])
def test_rows_that_are_not_finite(classes: int) -> None:
    """As the specification has it: NaN and +inf come out as NaN, -inf is a probability of 0."""
    logits = torch.randn(5, classes)
    logits[0, 3] = torch.nan
    logits[1, 2] = torch.inf
    logits[2] = -torch.inf
    logits[3] = -torch.inf
    logits[3, 1] = 2.0
    target = torch.ones(5, dtype=torch.int64)
    for return_stats in (False, True):
        sample = Sample(logits.clone().requires_grad_(), target, None, {"reduction": "none"})
        ours = run(masked_cross_entropy, sample)
        if return_stats:
            again = run(masked_cross_entropy, sample, return_stats=True)
            for name in ours:
                torch.testing.assert_close(again[name], ours[name], equal_nan=True)
        truth = run(reference.masked_cross_entropy, sample.double())
        torch.testing.assert_close(
            ours["loss"], truth["loss"].float(), equal_nan=True, rtol=1e-6, atol=1e-6
        )
        active = ours["gradient of values"][3:]
        torch.testing.assert_close(active, truth["gradient of values"][3:].float())


def test_predictions_of_rows_that_are_not_finite() -> None:
    for row, target, expected in predictions():
        _, stats = masked_cross_entropy(row[None], torch.tensor([target]), return_stats=True)
        assert stats.correct == expected, (row, target)


def test_upstream_gradient_other_than_one() -> None:
    """The operator itself asks whether dloss is 1: on the device, in a grid that fits there."""
    ops = getattr(torch.ops, NAMESPACE)
    logits = torch.randn(40, 1000)
    target = torch.randint(1000, (40,))
    gradient = torch.empty_like(logits)
    _, _, tokens, groups = ops.cross_entropy_fused(
        gradient, logits, target, None, None, None, None, None, stats=False
    )
    once = gradient.clone()
    for scale in (1.0, 3.0):
        formula = (torch.tensor(scale), logits, target, tokens, groups, None, None)
        ops.cross_entropy_backward_out(gradient, *formula, recompute_unless_one=True)
        torch.testing.assert_close(gradient, scale * once)
    untouched = torch.full_like(logits, 7.0)
    formula = (torch.tensor(1.0), *formula[1:])
    ops.cross_entropy_backward_out(untouched, *formula, recompute_unless_one=True)
    assert (untouched == 7).all()


def test_target_out_of_range(capfd: pytest.CaptureFixture[str]) -> None:
    for bad in (10, -1):
        with pytest.raises(RuntimeError, match="device-side assert"):
            masked_cross_entropy(torch.randn(3, 10), torch.tensor([1, bad, 2]))
        expected = f"target of token 1 is {bad}, expected 0 <= target < 10"
        assert expected in capfd.readouterr().out


@pytest.mark.parametrize("bias", [False, True])
def test_linear_cross_entropy(bias: bool) -> None:
    """Chunks of logits: the gradient overwrites them in the same launch."""
    from masked_loss import linear_cross_entropy

    hidden = torch.randn(6, 16, requires_grad=True)
    weight = torch.randn(3000, 16, requires_grad=True)
    more = {"bias": torch.randn(3000, requires_grad=True)} if bias else {}
    target = torch.randint(3000, (6,))
    mask = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.5, 1.0])
    loss = linear_cross_entropy(hidden, weight, target, mask, **more)
    leaves = [hidden, weight, *more.values()]
    gradients = torch.autograd.grad(loss, leaves)
    logits = torch.nn.functional.linear(hidden, weight, more.get("bias"))
    truth = reference.masked_cross_entropy(logits, target, mask)
    torch.testing.assert_close(loss, truth)
    for ours, expected in zip(gradients, torch.autograd.grad(truth, leaves), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


# Where a kernel lacks a barrier, its results depend on which thread runs first; that each barrier
# is needed is shown by test_emulator_watch.py.

OPTIONS = {"cu_seqlens": None, "temperatures": None, "stats": False, "reduction": "sum"}


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def everything_that_waits(seed: int, configure: Configure) -> list[Tensor]:
    """Results of every kernel with a barrier: reductions, rows of each team size, divergences."""
    ops = getattr(torch.ops, NAMESPACE)
    settings = {"seed": seed, "max_blocks": 2}

    def fused(rows: int, classes: int) -> list[Tensor]:
        # Neither the logits nor their gradient begin with a piece: pieces go from thread to thread.
        logits, gradient = numbers(rows, classes + 3)[:, 1:-2], torch.empty(rows, classes)
        args = gradient, logits, torch.arange(rows), None, None, None
        return [ops.cross_entropy_fused(*args, **OPTIONS)[0], gradient]

    def losses(rows: int, classes: int) -> list[Tensor]:
        args = numbers(rows, classes), torch.arange(rows), None, None, None
        return [ops.cross_entropy_forward(*args, **OPTIONS)[0]]

    def divergences(rows: int, classes: int) -> list[Tensor]:
        logits, teacher = numbers(2, rows, classes).unbind()
        tokens, groups = ops.divergence_weigh(logits, None, None, None, "sum", False, True)
        gradient = torch.empty(rows, classes)
        pair = tokens, logits, teacher, None, None, groups, None, gradient
        ops.divergence_rows(*pair, forward=True, unless_one=False, kind="jsd")
        return [tokens, gradient]

    configure(**settings)
    values, mask = numbers(9000), numbers(9000) > 0
    reduced = ops.masked_reduce_forward(values, mask, None, None, False, "mean")
    ops.cross_entropy_fused(  # what it leaves in shared memory is not zero
        numbers(3, 12288), numbers(3, 12288), torch.arange(3), None, None, None, **OPTIONS
    )
    configure(**settings, shared_per_block=64 << 10)
    rows = *fused(20, 300), *fused(9, 3001), *losses(9, 3001), *divergences(5, 1100)
    return [*reduced, *rows]


def test_no_barrier_is_missing(configure: Configure) -> None:
    """What races without one, test_emulator_watch.py finds in any order."""
    first = everything_that_waits(0, configure)
    for seed in range(1, 3):
        for ours, expected in zip(everything_that_waits(seed, configure), first, strict=True):
            assert torch.equal(ours, expected)


FORBIDDEN = {
    "shared memory": "a block wrote beyond its shared memory",
    "launch": "a launch with more shared memory than the kernel was allowed to take",
    "calls": "lanes of a warp wait at different calls",
    "barrier": "deadlock: some threads wait at a barrier or shuffle that others never reach",
    "cluster": "deadlock: some blocks wait for others of their cluster",
    "no cluster": "a block waits for a cluster, and is in none",
}


@pytest.mark.parametrize("fault", FORBIDDEN)
def test_what_a_device_forbids_is_noticed(fault: str, module: ModuleType) -> None:
    with pytest.raises(RuntimeError, match=FORBIDDEN[fault]):
        module.make_fault(fault, 0, 0)


@pytest.mark.parametrize("kind", reference.DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_divergences(kind: str, dtype: torch.dtype) -> None:
    """Values, statistics and gradients, with excluded classes, masked rows and a row per token."""
    student, teacher = (3 * torch.randn(2, 3, 700).to(dtype) for _ in range(2))
    excluded = torch.rand(700) < 0.1
    student, teacher = (x.masked_fill(excluded, -float("inf")) for x in (student, teacher))
    mask = torch.tensor([[1.0, 0.0, 2.0], [0.5, 1.0, 1.0]])
    student[0, 0] = float("nan")  # the row of the token that is masked
    options = {"kind": kind, "beta": 0.3, "softcap": 6.0, "shift": True, "return_stats": True}
    options |= {"teacher_softcap": 9.0, "temperature": 0.5 + torch.rand(2, 3)}
    options |= {"reduction": "sequence_mean", "cu_seqlens": torch.tensor([0, 2, 2, 3, 5])}
    found = []
    for function, wide in (
        (masked_divergence, dtype),
        (reference.masked_divergence, torch.float64),
    ):
        y = student.to(wide).requires_grad_()
        loss, stats = function(y, teacher.to(wide), mask, **options)
        (gradient,) = torch.autograd.grad(loss, y)
        found.append([x.double() for x in (loss.detach(), *stats, gradient)])
    coarse = {torch.bfloat16: 1e-2, torch.float32: 1e-5, torch.float64: 1e-11}[dtype]
    for ours, truth in zip(*found, strict=True):
        torch.testing.assert_close(ours, truth, rtol=coarse, atol=1e-6 if coarse > 1e-9 else 1e-12)


# The columns before each row, of the student and of the teacher.
@pytest.mark.parametrize("before", [(0, 0), (0, 1), (3, 0), (5, 2)])
@pytest.mark.parametrize("kept", [227, 64], ids=["", "half in shared memory"])
@pytest.mark.parametrize(
    ("dtype", "teacher_dtype"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float16),
    ],
    ids=str,
)
def test_a_token_has_the_same_divergence_anywhere(
    dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    kept: int,
    before: tuple[int, int],
    configure: Configure,
) -> None:
    """However the rows are aligned, and whatever else is in the batch: value, gradient, both bits.

    A part of a row of so many classes moves in pieces of 16 bytes, by all lanes of a warp.
    """
    configure(shared_per_block=kept << 10)
    cols = 1101

    def rows(first: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(4, cols + 6).to(dtype)[:, first : first + cols]

    def results(y: Tensor, z: Tensor, kind: str) -> list[Tensor]:
        y = y.detach().requires_grad_()
        loss = masked_divergence(y, z, kind=kind, reduction="none")
        return [loss.detach(), *torch.autograd.grad(loss.sum(), y)]

    student, teacher = rows(before[0], dtype), rows(before[1], teacher_dtype)
    for kind in ("forward_kl", "jsd"):
        together = results(student, teacher, kind)
        for i in range(len(student)):
            alone = results(student[i].clone(), teacher[i].clone(), kind)
            for one, of_all in zip(alone, together, strict=True):
                assert torch.equal(one, of_all[i])
        truth = results(student.double(), teacher.double(), kind)
        for ours, true in zip(together, truth, strict=True):
            eps = torch.finfo(ours.dtype).eps
            torch.testing.assert_close(ours.double(), true, rtol=16 * eps, atol=16 * eps)
        written, overwritten = student * 1, student * 1
        loss = masked_divergence(
            overwritten.requires_grad_(), teacher, kind=kind, reduction="none",
            inplace_backward=True,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(loss.sum(), overwritten)
        assert gradient.data_ptr() == overwritten.data_ptr()
        assert torch.equal(gradient, results(written, teacher, kind)[1])
