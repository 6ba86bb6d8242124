# SPDX-License-Identifier: BSD-3-Clause
"""docs/reductions.md and docs/lint.md say what is so: their table and their code are run."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import masked_loss
from masked_loss_lint import RULES, check

DOCS = Path(__file__).parents[2] / "docs"
NAMES = ("size_average", "reduce", "reduction")
REDUCTIONS = ["-", "none", "sum", "mean", "elementwise_mean"]
VALUES = {"-": None, "True": True, "False": False}


def table() -> dict[tuple[str, str, str], str]:
    """Every combination the document's table covers, and its meaning today."""
    meaning: dict[tuple[str, str, str], str] = {}
    for line in (DOCS / "reductions.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 7 or cells[0] not in VALUES:
            continue
        for reduction in REDUCTIONS if cells[2] == "any" else [cells[2]]:
            assert (cells[0], cells[1], reduction) not in meaning
            meaning[cells[0], cells[1], reduction] = cells[6]
    return meaning


TABLE = table()


def test_the_table_has_every_combination() -> None:
    assert set(TABLE) == set(itertools.product(VALUES, VALUES, REDUCTIONS))


def arguments(combination: tuple[str, str, str]) -> dict[str, Any]:
    """The arguments that are given; None where a flag is not."""
    average, reduce, reduction = combination
    given: dict[str, Any] = {"size_average": VALUES[average], "reduce": VALUES[reduce]}
    return given if reduction == "-" else {**given, "reduction": reduction}


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 5, generator=generator), torch.tensor([0, 3, -100, 4, 1, 2])


@pytest.mark.filterwarnings("ignore:size_average and reduce", "ignore:reduction='elementwise_mean'")
@pytest.mark.parametrize("combination", TABLE, ids=" ".join)
def test_the_installed_pytorch_agrees(combination: tuple[str, str, str]) -> None:
    logits, target = batch()
    losses = -logits.log_softmax(-1)[torch.arange(6), target.clamp(min=0)] * (target != -100)
    expected = {"none": losses, "sum": losses.sum(), "mean": losses.sum() / 5}[TABLE[combination]]
    given = arguments(combination)
    torch.testing.assert_close(F.cross_entropy(logits, target, **given), expected)
    torch.testing.assert_close(nn.CrossEntropyLoss(**given)(logits, target), expected)
    torch.testing.assert_close(F.nll_loss(logits.log_softmax(-1), target, **given), expected)


@pytest.mark.filterwarnings("ignore:size_average and reduce")
@pytest.mark.parametrize("combination", TABLE, ids=" ".join)
def test_the_drop_in_agrees(combination: tuple[str, str, str]) -> None:
    if combination[2] == "elementwise_mean":
        return  # a name of PyTorch 0.4.1 that masked_loss does not take
    logits, target = batch()
    given = arguments(combination)
    got = masked_loss.cross_entropy(logits, target, **given)
    torch.testing.assert_close(got, F.cross_entropy(logits, target, **given))


def code_blocks(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (DOCS / name).read_text(), re.MULTILINE | re.DOTALL)


def test_the_recipe_runs() -> None:
    """Its own assertions say that the bug is a bug and that the repairs agree."""
    torch.manual_seed(0)
    blocks = code_blocks("reductions.md")
    assert len(blocks) == 6
    namespace: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/reductions.md", "exec"), namespace)


def lint_blocks() -> list[tuple[str, str, str]]:
    """(rule, wrong or right, code) of every example in docs/lint.md, in order."""
    text = (DOCS / "lint.md").read_text()
    found = []
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        for kind, code in re.findall(r"```python\n# (wrong|right)\n(.*?)```", section, re.DOTALL):
            found.append((section[:5], kind, code))
    return found


def test_every_rule_has_a_page() -> None:
    assert [(rule, kind) for rule, kind, _ in lint_blocks()] == [
        (rule, kind) for rule in RULES for kind in ("wrong", "right")
    ]


@pytest.mark.parametrize(("rule", "kind", "code"), lint_blocks(), ids=lambda value: value[:5])
def test_the_linter_agrees_with_its_page(rule: str, kind: str, code: str, tmp_path: Path) -> None:
    path = tmp_path / "example.py"
    path.write_text(code)
    assert {f.code for f in check([path]).findings} == ({rule} if kind == "wrong" else set())


@pytest.mark.filterwarnings("ignore:size_average and reduce")
def test_the_repaired_examples_compute_the_same() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 7, 11), torch.randint(11, (2, 7))
    mask = torch.arange(7) < torch.tensor([[7], [3]])
    right: dict[str, dict[str, Any]] = {}
    wrong: dict[str, dict[str, Any]] = {}
    for rule, kind, code in lint_blocks():
        exec(code, (wrong if kind == "wrong" else right).setdefault(rule, {}))

    first, fixed = wrong["ML001"]["masked_loss_of"], right["ML001"]
    expected = fixed["masked_loss_of"](logits, labels, mask)
    torch.testing.assert_close(fixed["or_in_one_call"](logits, labels, mask), expected)
    assert not torch.allclose(first(logits, labels, mask), expected)

    flat = logits.flatten(0, 1), labels.flatten()
    torch.testing.assert_close(
        wrong["ML002"]["total_loss"](*flat), right["ML002"]["total_loss"](*flat)
    )

    nothing = torch.zeros_like(mask)
    assert wrong["ML003"]["masked_mean"](logits, labels, nothing).isnan()
    assert right["ML003"]["masked_mean"](logits, labels, nothing) == 0
    assert right["ML003"]["with_the_count"](logits, labels, nothing) == (0, 0)

    torch.testing.assert_close(
        wrong["ML005"]["causal_loss"](logits, labels), right["ML005"]["causal_loss"](logits, labels)
    )
