# SPDX-License-Identifier: BSD-3-Clause
"""The emulated CUDA device, for the files that say ``pytest.mark.usefixtures("emulator")``.

These run the CUDA kernels' own sources on the CPU. See docs/cuda.md for what that can and cannot
tell.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
from cuda_emulator.checks import Configure


@pytest.fixture(scope="session")
def module() -> ModuleType:
    # What builds it needs packages that tests of a GPU do without.
    from cuda_emulator.build import build
    from cuda_emulator.operators import load

    return load(build())


@pytest.fixture
def configure(module: ModuleType) -> Iterator[Configure]:
    """Sets the emulated device: ``configure(seed=1, multiprocessors=2, ...)``."""

    def set_to(**settings: int) -> None:
        new = module.Settings()
        for name, value in settings.items():
            setattr(new, name, value)
        module.configure(new)

    set_to()
    yield set_to
    set_to()


@pytest.fixture
def emulator(configure: Configure) -> Iterator[None]:
    """The public functions run as they are; the operators below them are the emulator's."""
    from cuda_emulator.operators import emulated

    with emulated():
        yield
