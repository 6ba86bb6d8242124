# SPDX-License-Identifier: BSD-3-Clause
"""The Chinese pages show the code of the English ones, and it runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import masked_loss

ROOT = Path(__file__).resolve().parents[2]

# A Chinese page, and the English ones whose code it may show.
PAGES = {
    "README.zh-CN.md": ["README.md"],
    "docs/zh/bug.md": ["docs/reductions.md"],
    "docs/zh/reduction.md": ["docs/reductions.md"],
    "docs/zh/variable_length.md": ["docs/variable_length.md"],
    "docs/zh/minimind.md": ["examples/minimind/README.md", "docs/recipes.md"],
}


def code_of(name: str, language: str = r"\w+") -> list[str]:
    """The code blocks of a page, without comments: those are translated."""
    pattern = rf"^```{language}\n(.*?)^```"
    blocks = re.findall(pattern, (ROOT / name).read_text(), re.MULTILINE | re.DOTALL)
    return [re.sub(r" *# .*", "", block).strip() for block in blocks]


def test_every_chinese_page_is_listed() -> None:
    pages = [*ROOT.glob("*.zh-CN.md"), *ROOT.glob("docs/zh/*.md")]
    assert {path.relative_to(ROOT).as_posix() for path in pages} == set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_the_code_is_that_of_the_english_pages(page: str) -> None:
    known = {block for name in PAGES[page] for block in code_of(name)}
    shown = code_of(page)
    assert shown
    assert [block for block in shown if block not in known] == []


class CausalLM(nn.Module):
    """As models of transformers are called."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lm_head = nn.Embedding(11, 8), nn.Linear(8, 11)

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        logits, loss = self.lm_head(self.embed(ids)), None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(logits=logits, loss=loss)


def names() -> dict[str, Any]:
    """What the pages take for given."""
    ids, mask = torch.randint(11, (8, 7)), torch.arange(7) < torch.arange(8)[:, None]
    model = CausalLM()
    return {
        **{"torch": torch, "F": F, "masked_loss": masked_loss},
        **{"V": 11, "logits": torch.randn(8, 7, 11), "target": ids, "mask": mask},
        **{"ids": ids, "input_ids": ids, "labels": ids.masked_fill(~mask, -100)},
        **{
            "model": model,
            "teacher_model": CausalLM().requires_grad_(False),
            "rewards": torch.randn(8),
        },
        **{"old": -torch.rand(8, 7) * mask, "reference": -torch.rand(8, 7) * mask},
        **{"loader": iter([{"input_ids": ids, "labels": ids}] * 2), "steps": 2},
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
    }


def programs_of(page: str) -> list[str]:
    """Blocks of Python. Those with >>> are run by test_documentation.py."""
    return [block for block in code_of(page, "python") if not block.startswith(">>>")]


def mean_of_tokens(logits: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    losses = F.cross_entropy(logits.mT, target, reduction="none")
    return (losses * mask).sum() / mask.sum()


def preference(new: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """Of DPO: the first half of the batch was chosen, the second rejected."""
    chosen, rejected = ((new - reference) * mask).sum(-1).chunk(2)
    return F.softplus(0.1 * (rejected - chosen)).mean()


# What the loss is at the bottom of a page, from which of its names.
LOSS: dict[str, tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    "README.zh-CN.md": (mean_of_tokens, ("logits", "target", "mask")),
    "docs/zh/bug.md": (mean_of_tokens, ("logits", "target", "mask")),
    "docs/zh/reduction.md": (mean_of_tokens, ("logits", "target", "mask")),
    "docs/zh/minimind.md": (preference, ("new", "reference", "mask")),
}


@pytest.mark.parametrize("page", [page for page in PAGES if programs_of(page)])
def test_the_code_computes_what_it_says(page: str) -> None:
    """A page from its top to its bottom."""
    namespace = names()
    for block in programs_of(page):
        exec(compile(block, page, "exec"), namespace)
    loss, given = LOSS[page]
    torch.testing.assert_close(namespace["loss"], loss(*(namespace[name] for name in given)))
