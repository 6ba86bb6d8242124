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
    """More often only a file that says nothing of losses, when another asks for its names."""
    parsed: list[Path] = []
    real = source.read
    monkeypatch.setattr("masked_loss_lint.read", lambda path: parsed.append(path) or real(path))
    check(find([CORPUS]))
    assert set(parsed) >= set(find([CORPUS]))
    twice = {path for path in parsed if parsed.count(path) > 1}
    assert not any(source.is_relevant(path.read_text()) for path in twice)
