# SPDX-License-Identifier: BSD-3-Clause
"""What all tests share: the devices, the dtypes, the seed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from devices import has_cuda

DEVICES = ["cpu", "cuda"] if has_cuda() else ["cpu"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def pytest_report_header() -> str:
    return (
        f"masked_loss: {torch.ops.masked_loss.cpu_capability()} kernels, torch {torch.__version__}"
    )


# A worker of pytest-xdist takes whole files (their fixtures may be a build), as they come with
# --no-loadscope-reorder: the longest go first.
LONGEST = [
    "test_emulator_watch", "test_build", "test_instructions", "test_linear_chunks", "test_cpu_isa",
    "test_compile", "test_dtensor", "test_demo", "test_cuda_teams", "test_cuda_rows",
]  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONGEST)
    for item in items:
        if item.get_closest_marker("cuda") and not has_cuda():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device and CUDA kernels"))


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def on_the_device(device: str) -> Iterator[None]:
    """What a test makes without naming a device lies on this one."""
    with nullcontext() if device == "cpu" else torch.device(device):
        yield


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
