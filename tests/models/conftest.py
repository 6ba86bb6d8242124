# SPDX-License-Identifier: BSD-3-Clause
"""What the tests of fused models share."""

from __future__ import annotations

import pytest
import torch
from fused_models import B, T, V
from torch import Tensor

from masked_loss.fuse import LazyLogits


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(V, (B, T))
    labels = ids.clone()
    labels[0, 4:] = labels[2, :3] = -100
    return ids, labels


@pytest.fixture
def no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test in which logits are computed."""

    def computed(self: LazyLogits, reason: str) -> Tensor:
        raise AssertionError(f"the logits were computed for {reason}")

    monkeypatch.setattr(LazyLogits, "_value", computed)
