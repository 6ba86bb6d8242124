# SPDX-License-Identifier: BSD-3-Clause
"""The linter on a corpus of small trainers: what it must find, and where it must be silent.

A case is a file, or a folder read as one program. A wrong line ends in `# expect: ML001`.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from masked_loss_lint import check, source
from masked_loss_lint.source import find

CORPUS = Path(__file__).parent / "corpus"
EXPECT = re.compile(r"# expect: ([A-Z0-9 ]+)$")


def cases(kind: str) -> list[Path]:
    return sorted(path for path in (CORPUS / kind).iterdir() if path.name != "__pycache__")


def expected(case: Path) -> set[tuple[str, int, str]]:
    found = set()
    for path in find([case]):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            match = EXPECT.search(line)
            found |= {(str(path), number, code) for code in (match[1].split() if match else [])}
    return found


def found(case: Path) -> set[tuple[str, int, str]]:
    return {(f.place.path, f.place.line, f.code) for f in check(find([case])).findings}


def test_the_corpus_is_as_large_as_promised() -> None:
    assert len(cases("wrong")) >= 25
    assert len(cases("right")) >= 40


@pytest.mark.parametrize("case", cases("wrong"), ids=lambda case: case.stem)
def test_wrong_programs_are_found(case: Path) -> None:
    assert expected(case)
    assert found(case) == expected(case)


@pytest.mark.parametrize("case", cases("right"), ids=lambda case: case.stem)
def test_right_programs_are_left_in_peace(case: Path) -> None:
    assert not expected(case)
    assert found(case) == set()


def test_the_whole_corpus_of_right_programs_at_once() -> None:
    """As one tree, with all its names side by side, it is silent too."""
    assert found(CORPUS / "right") == set()


def test_the_order_of_the_files_does_not_matter() -> None:
    paths = list(find([CORPUS]))
    assert check(reversed(paths)) == check(paths)


@pytest.mark.parametrize("case", cases("wrong"), ids=lambda case: case.stem)
def test_a_folder_by_itself_gives_what_it_gives_inside_a_tree(case: Path, whole: set) -> None:
    names = {str(path) for path in find([case])}
    if case.is_dir():  # files beside each other in `wrong` are one folder
        assert {f for f in whole if f[0] in names} == found(case)


@pytest.fixture(scope="module")
def whole() -> set[tuple[str, int, str]]:
    return found(CORPUS)


def test_each_file_is_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as its tree is kept; of a larger program the trees of a few files are."""
    parsed: list[Path] = []
    real = source.read
    monkeypatch.setattr("masked_loss_lint.read", lambda path: parsed.append(path) or real(path))
    monkeypatch.setattr("masked_loss_lint._TREES", 1000)
    check(find([CORPUS]))
    assert sorted(parsed) == sorted(find([CORPUS]))


def test_a_long_function_that_says_nothing_of_losses_is_not_looked_at(tmp_path: Path) -> None:
    """What it returns is not known; a short one may hand a loss on."""
    program = """
import torch.nn.functional as F

def criterion_of(x, y):
    return F.cross_entropy(x, y)

def by(criterion, x, y):{filling}
    return criterion(x, y)

def step(x, y, mask):
    return by(criterion_of, x, y) * mask
"""
    path = tmp_path / "train.py"
    for name, filling, count in (
        ("criterion", "\n    x = x + 1" * 9, 1),
        ("by", "", 1),
        ("by", "\n    x = x + 1" * 9, 0),
    ):
        path.write_text(
            program.format(filling=filling)
            .replace("(criterion, ", f"({name}, ")
            .replace("criterion(x", f"{name}(x")
        )
        assert len(check([path]).findings) == count, (name, filling)
