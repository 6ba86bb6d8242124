# SPDX-License-Identifier: BSD-3-Clause
"""Every ``>>>`` example in the docstrings and in the documents gives what it says."""

from __future__ import annotations

import doctest
import importlib
import inspect
from pathlib import Path

import pytest

import masked_loss

ROOT = Path(__file__).resolve().parents[2]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def module_names() -> list[str]:
    paths = (path.relative_to(ROOT) for path in (ROOT / "masked_loss").rglob("*.py"))
    names = (".".join(path.with_suffix("").parts) for path in paths)
    return sorted(name.removesuffix(".__init__") for name in names if "__main__" not in name)


def docstring_examples() -> list[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = []
    for name in module_names():
        found += finder.find(importlib.import_module(name))
    return [test for test in found if test.examples]


def document_examples() -> list[doctest.DocTest]:
    parser = doctest.DocTestParser()
    found = []
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]):
        name = str(path.relative_to(ROOT))
        found.append(parser.get_doctest(path.read_text(), {}, name, str(path), 0))
    return [test for test in found if test.examples]


@pytest.mark.parametrize(
    "test", [*docstring_examples(), *document_examples()], ids=lambda test: test.name
)
def test_examples(test):
    report: list[str] = []
    results = doctest.DocTestRunner(optionflags=FLAGS).run(test, out=report.append)
    assert results.failed == 0, "".join(report)


@pytest.mark.parametrize("name", masked_loss.__all__)
def test_public_names_have_an_example(name):
    documentation = inspect.getdoc(getattr(masked_loss, name))
    assert documentation is not None
    assert ">>> " in documentation
