# SPDX-License-Identifier: BSD-3-Clause
"""Who reads a row, on the CUDA emulator: a team of threads, a block, a cluster, several blocks."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from accuracy import assert_as_accurate_as_eager
from cuda_emulator.checks import EVERYTHING, Configure, check
from samples import REDUCTIONS, Case

from masked_loss import masked_reduce, reference

pytestmark = pytest.mark.usefixtures("emulator")

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
        configure(shared_per_block=shared, l2_bytes=l2_bytes, clusters=clusters, multiprocessors=16)
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


def test_a_partition_too_small_for_a_cluster(module: ModuleType, configure: Configure) -> None:
    """Any device can launch clusters of 8 blocks, but for one with fewer multiprocessors."""
    for multiprocessors, parts in ((8, 4), (7, 1)):
        configure(multiprocessors=multiprocessors)
        assert module.parts_of_a_row(1000, 151_936, True) == parts


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
