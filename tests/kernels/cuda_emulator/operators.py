# SPDX-License-Identifier: BSD-3-Clause
"""The public functions on the emulated device: ``load(build())``, then ``with emulated(): ...``"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch

import masked_loss._op

from .build import NAMESPACE


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class EmulatedOperators:
    """The emulator's operators; those whose kernels are Python, and call others, as they are."""

    def __getattr__(self, name: str) -> Any:
        has_kernel = torch._C._dispatch_has_computed_kernel_for_dispatch_key
        emulated = has_kernel(f"{NAMESPACE}::{name}", "CPU")
        return getattr(getattr(torch.ops, NAMESPACE) if emulated else torch.ops.masked_loss, name)


@contextmanager
def emulated() -> Iterator[None]:
    """Below the public functions: the operators of the emulator, whose module must be loaded."""
    with ExitStack() as stack:
        for module in vars(masked_loss._op).values():
            if not hasattr(module, "ops"):
                continue
            stack.enter_context(mock.patch.object(module, "ops", EmulatedOperators()))
        yield
