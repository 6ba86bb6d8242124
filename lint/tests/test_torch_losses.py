# SPDX-License-Identifier: BSD-3-Clause
"""The table of losses is that of the installed PyTorch, and of masked_loss itself."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import masked_loss
from masked_loss_lint.torch_losses import SPECS, legacy_reduction

OURS = sorted(p for p, spec in SPECS.items() if spec.is_ours and "torch.ops" not in p)


@pytest.mark.parametrize("path", sorted(p for p, spec in SPECS.items() if not spec.is_ours))
def test_the_parameters_are_those_of_the_installed_torch(path: str) -> None:
    name = path.rsplit(".", 1)[1]
    owner = getattr(nn, name) if SPECS[path].is_module else getattr(F, name)
    assert SPECS[path].parameters == tuple(inspect.signature(owner).parameters)


def test_every_loss_of_the_installed_torch_is_there() -> None:
    functions = {name: f for name, f in vars(F).items() if inspect.isfunction(f)}
    losses = {n for n, f in functions.items() if "reduction" in inspect.signature(f).parameters}
    known = {spec.name for spec in SPECS.values() if spec.path.startswith("torch.nn.functional.")}
    assert losses - {"linear_cross_entropy"} <= known


@pytest.mark.parametrize("path", OURS)
def test_the_parameters_are_those_of_masked_loss(path: str) -> None:
    """Positional ones in their order; a keyword that the linter knows is one there too."""
    signature = inspect.signature(getattr(masked_loss, path.rsplit(".", 1)[1]))
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    positional = [n for n, p in signature.parameters.items() if p.kind in kinds]
    known = SPECS[path].parameters
    assert known[: len(positional)] == tuple(positional[: len(known)])
    assert set(known) <= signature.parameters.keys()


def test_every_loss_of_masked_loss_is_there() -> None:
    public = {n: getattr(masked_loss, n) for n in dir(masked_loss) if not n.startswith("_")}
    losses = {
        name
        for name, owner in public.items()
        if inspect.isfunction(owner) or (inspect.isclass(owner) and issubclass(owner, nn.Module))
        if "reduction" in inspect.signature(owner).parameters
    }
    assert losses <= {path.rsplit(".", 1)[1] for path in OURS}


def test_every_operator_of_a_loss_is_there() -> None:
    for path in OURS:
        packet = getattr(torch.ops.masked_loss, SPECS[path].name, None)
        if packet is None or path == "masked_loss.cross_entropy":  # another one's name there
            continue
        positional = [a.name for a in packet.default._schema.arguments if not a.kwarg_only]
        assert SPECS[f"torch.ops.{path}"].parameters[: len(positional)] == tuple(positional)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("average", [None, True, False])
@pytest.mark.parametrize("reduce", [None, True, False])
def test_legacy_reduction_is_that_of_the_installed_torch(
    average: bool | None, reduce: bool | None
) -> None:
    module = nn.CrossEntropyLoss(size_average=average, reduce=reduce)
    assert module.reduction == legacy_reduction(average, reduce)
