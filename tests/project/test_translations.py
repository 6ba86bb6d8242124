# SPDX-License-Identifier: BSD-3-Clause
"""The Chinese pages show the code of the English ones, and it runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

# A Chinese page, and the English ones whose code it may show.
PAGES = {
    "docs/zh/bug.md": ["docs/reductions.md"],
}


def code_of(name: str) -> list[str]:
    """The code blocks of a page, without comments: those are translated."""
    blocks = re.findall(r"^```\w+\n(.*?)^```", (ROOT / name).read_text(), re.MULTILINE | re.DOTALL)
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


def test_the_story_of_the_bug_runs() -> None:
    torch.manual_seed(0)
    namespace: dict[str, Any] = {}
    for block in code_of("docs/zh/bug.md"):
        exec(compile(block, "docs/zh/bug.md", "exec"), namespace)
