# SPDX-License-Identifier: BSD-3-Clause
"""The command line: formats, selection, noqa, notebooks, exit codes, settings."""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from masked_loss_lint.__main__ import main

ROOT = Path(__file__).parents[2]
HOOKS, DOCUMENTATION = ROOT / ".pre-commit-hooks.yaml", ROOT / "docs" / "lint.md"

BUGGY = """\
import torch.nn.functional as F


def loss_of(logits, labels, mask):
    loss = F.cross_entropy(logits, labels, size_average=True)
    return (loss * mask).sum()
"""


@pytest.fixture
def buggy(tmp_path: Path) -> Path:
    path = tmp_path / "buggy.py"
    path.write_text(BUGGY)
    return path


def test_text_is_what_editors_understand(buggy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(buggy)]) == 1
    out, err = capsys.readouterr()
    first, second = out.splitlines()
    assert first.startswith(f"{buggy}:5:12: ML002 cross_entropy: size_average is deprecated")
    assert second.startswith(f"{buggy}:6:13: ML001 `mask` multiplies a loss that cross_entropy")
    assert err == "Found 2 in 1 files. 1 can be fixed with --fix.\n"


def test_json(buggy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(buggy), "--format", "json"]) == 1
    rows = json.loads(capsys.readouterr().out)
    assert [(row["line"], row["column"], row["code"]) for row in rows] == [
        (5, 12, "ML002"),
        (6, 13, "ML001"),
    ]
    assert [row["fixable"] for row in rows] == [True, False]
    assert {row["path"] for row in rows} == {str(buggy)}


def test_github(buggy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(buggy), "--format", "github", "--select", "ML001"]) == 1
    line = capsys.readouterr().out
    assert line.startswith(f"::error file={buggy},line=6,col=13,title=ML001::`mask` multiplies")


@pytest.mark.parametrize(
    ("options", "codes"),
    [
        ([], ["ML002", "ML001"]),
        (["--select", "ML001"], ["ML001"]),
        (["--ignore", "ML001"], ["ML002"]),
        (["--select", "ML", "--ignore", "ML002,ML003"], ["ML001"]),
        (["--select", "ML003"], []),
        (["--exclude", "buggy.py"], []),
    ],
)
def test_selection(
    options: list[str], codes: list[str], buggy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main([str(buggy), *options])
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == codes
    assert status == (1 if codes else 0)


@pytest.mark.parametrize(
    ("comment", "silent"),
    [
        ("# noqa: ML001", True),
        ("# noqa", True),
        ("# noqa: E501, ML001", True),
        ("# noqa: ML002", False),
        ("# no comment", False),
    ],
)
def test_noqa(comment: str, silent: bool, buggy: Path) -> None:
    buggy.write_text(BUGGY.replace(".sum()\n", f".sum()  {comment}\n"))
    assert main([str(buggy), "--select", "ML001"]) == (0 if silent else 1)


@pytest.mark.parametrize("silenced", ["weighted = loss * w", "return weighted.sum() / w.sum()"])
def test_noqa_where_it_is_reported_or_seen(silenced: str, tmp_path: Path) -> None:
    program = (
        "import torch.nn.functional as F\n\n\ndef loss_of(logits, labels, w):\n"
        "    loss = F.cross_entropy(logits, labels)\n    weighted = loss * w\n"
        "    return weighted.sum() / w.sum()\n"
    )
    path = tmp_path / "two_lines.py"
    path.write_text(program)
    assert main([str(path), "--select", "ML001"]) == 1
    path.write_text(program.replace(silenced, f"{silenced}  # noqa: ML001"))
    assert main([str(path), "--select", "ML001"]) == 0


def test_noqa_in_another_file_than_the_one_that_decides(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text(
        "import torch.nn.functional as F\n\n\ndef weigh(logits, labels, w):\n"
        "    return F.cross_entropy(logits, labels) * w  # noqa: ML001\n"
    )
    (tmp_path / "train.py").write_text(
        "from helper import weigh\n\n\ndef loss_of(logits, labels, w):\n\n"
        "    return weigh(logits, labels, w).sum() / w.sum()  # a mask by what follows\n"
    )
    assert main([str(tmp_path), "--select", "ML001"]) == 0


def test_noqa_in_a_file_that_says_nothing_of_losses(tmp_path: Path) -> None:
    helper = "def weigh(x, mask):\n    return x * mask"
    (tmp_path / "train.py").write_text(
        "import torch.nn.functional as F\nfrom helper import weigh\n\n\n"
        "def loss_of(logits, labels, m):\n    return weigh(F.cross_entropy(logits, labels), m)\n"
    )
    (tmp_path / "helper.py").write_text(helper + "\n")
    assert main([str(tmp_path)]) == 1
    (tmp_path / "helper.py").write_text(helper + "  # noqa: ML001\n")
    assert main([str(tmp_path)]) == 0


def test_wrong_use_is_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "missing")]) == 2
    assert "missing: no such file or folder" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path), "--select", "ML999"])
    assert caught.value.code == 2


def test_a_file_that_cannot_be_read_is_named_and_counted(
    buggy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (buggy.parent / "python2.py").write_text("print 'hello'\n")
    (buggy.parent / "latin.py").write_bytes(b"x = '\xe9'\n")
    for number, odd in enumerate(ODD_NOTEBOOKS):
        (buggy.parent / f"odd{number}.ipynb").write_text(odd)
    assert main([str(buggy.parent)]) == 1
    out, err = capsys.readouterr()
    assert "python2.py:1: cannot parse" in err
    assert "latin.py" in err
    assert all(f"odd{number}.ipynb: cannot read" in err for number in range(len(ODD_NOTEBOOKS)))
    assert f"{2 + len(ODD_NOTEBOOKS)} could not be read." in err
    assert "ML001" in out  # the rest was checked
    buggy.write_text("x = 1\n")
    assert main([str(buggy.parent)]) == 0
    assert main([str(buggy.parent), "--strict"]) == 2


ODD_NOTEBOOKS = [
    '{"cells": [1]}',
    '{"cells": [{"cell_type": "code", "source": null}]}',
    '{"cells": {"a": 1}}',
    '{"worksheets": [1]}',
    '{"worksheets": null}',
    "[]",
    "{",
]


@pytest.mark.parametrize(
    "deep",
    [
        "loss = " + " + ".join(["x"] * 900) + "\n",
        "lambda_loss = lambda x: " + " + ".join(["x"] * 900) + "\n",
        "def f(x, loss):\n    if x:\n        pass\n"
        + "".join(f"    elif x == {n}:\n        loss = x\n" for n in range(2000)),
        "loss = (x" + " .float()" * 900 + ").mean()\n",
        "loss = x\n" + "loss = loss * y + f(loss)\n" * 3000,
        "def f(x):\n"
        + "".join("    " * n + f"if x > {n}:\n" for n in range(1, 80))
        + "    " * 80
        + "loss = x\n",
        "".join(
            f"def f{n}(loss):\n    return {'g(' * 80}f{n + 1}(loss){')' * 80}\n" for n in range(12)
        ),
    ],
    ids=["sum", "lambda", "elif", "methods", "statements", "blocks", "calls"],
)
def test_nothing_is_nested_too_deeply(
    deep: str, buggy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (buggy.parent / "deep.py").write_text(deep)
    assert main([str(buggy.parent), "--strict", "--select", "ML001"]) == 1
    assert capsys.readouterr().out.count("ML001") == 1


def test_a_long_mask_fits_a_message(buggy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mask = "mask" + " .float()" * 40
    buggy.write_text(BUGGY.replace("* mask", f"* {mask}"))
    assert main([str(buggy), "--select", "ML001"]) == 1


@pytest.mark.parametrize(
    ("settings", "codes"),
    [
        ('select = ["ML001"]', ["ML001"]),
        ('ignore = ["ML001"]', ["ML002"]),
        ('exclude = ["buggy.py"]', []),
        ("", ["ML002", "ML001"]),
    ],
)
def test_settings_of_pyproject(
    settings: str, codes: list[str], buggy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inside = buggy.parent / "src"
    inside.mkdir()
    buggy = buggy.rename(inside / "buggy.py")
    (inside.parent / "pyproject.toml").write_text(f"[tool.masked-loss-lint]\n{settings}\n")
    assert main([str(inside)]) == (1 if codes else 0)
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == codes
    assert main([str(inside), "--select", "ML002", "--ignore", "ML001"]) == (1 if codes else 0)


@pytest.mark.parametrize("settings", ['select = ["ML999"]', "select = 1", "rules = []", "= 1"])
def test_a_setting_that_means_nothing_is_status_2(
    settings: str, buggy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (buggy.parent / "pyproject.toml").write_text(f"[tool.masked-loss-lint]\n{settings}\n")
    assert main([str(buggy)]) == 2
    assert "pyproject.toml" in capsys.readouterr().err


def test_statistics(buggy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(buggy), "--statistics"]) == 1
    err = capsys.readouterr().err
    assert "     1  ML001  a mask meets a loss that is already a scalar\n     1  ML002  " in err


def test_verbose_names_what_was_not_understood(
    buggy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    buggy.write_text("def f(batch, mask):\n    loss = batch()\n    return loss * mask\n")
    assert main([str(buggy), "--verbose"]) == 0
    note = f"note: {buggy}:3:12: cannot tell what `loss` is, which `mask` multiplies"
    assert note in capsys.readouterr().err
    assert main([str(buggy)]) == 0
    assert "note" not in capsys.readouterr().err


def test_it_starts_without_anything_that_is_not_python_itself(buggy: Path) -> None:
    code = (
        "import sys; before = set(sys.modules); import masked_loss_lint.__main__ as m\n"
        f"m.main([{str(buggy)!r}])\n"
        "roots = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(roots - sys.stdlib_module_names - {'masked_loss_lint'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT / "lint")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_garbage_collection_is_left_as_it_was(buggy: Path) -> None:
    assert gc.isenabled()
    main([str(buggy)])
    assert gc.isenabled()


def test_it_runs_as_a_module(buggy: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "lint")))}
    for module in ("masked_loss_lint", "masked_loss.lint"):
        done = subprocess.run(
            [sys.executable, "-m", module, str(buggy)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1, done.stderr
        assert "ML001" in done.stdout


def test_the_pre_commit_hook_reads_the_whole_tree(buggy: Path) -> None:
    hook = dict(re.findall(r"^[- ] (\w+): (.+)$", HOOKS.read_text(), re.MULTILINE))
    assert hook["id"] in DOCUMENTATION.read_text()
    assert hook["pass_filenames"] == "false"
    command = [*hook["entry"].split(), *json.loads(hook["args"])]
    assert hook["language"] == "script"
    assert os.access(ROOT / command[0], os.X_OK)
    done = subprocess.run(
        [sys.executable, "-S", "-I", ROOT / command[0], *command[1:]],  # nothing that is installed
        cwd=buggy.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("buggy.py:5:12: ML002")


def test_notebooks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = [
        {"cell_type": "markdown", "source": ["loss * mask"]},
        {"cell_type": "code", "source": ["%matplotlib inline\n", "!pip install torch\n"]},
        {"cell_type": "code", "source": "%%bash\necho loss * mask"},
        {"cell_type": "code", "source": ["loss = F.cross_entropy(logits, labels)"]},
        {"cell_type": "code", "source": ["x = (\n", "    loss * mask\n", ").sum()"]},
    ]
    path = tmp_path / "train.ipynb"
    path.write_text(json.dumps({"cells": cells, "nbformat": 4, "nbformat_minor": 5}))
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().out.startswith(f"{path}:cell 5:2:5: ML001")
    main([str(tmp_path), "--format", "github"])
    command = f"::error file={path},title=ML001::cell 5, line 2: "  # the path of a file
    assert capsys.readouterr().out.startswith(command)
    main([str(tmp_path), "--format", "json"])
    row = json.loads(capsys.readouterr().out)[0]
    assert (row["path"], row["cell"], row["line"]) == (str(path), 5, 2)


def test_notebooks_of_format_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = [{"cell_type": "code", "input": ["loss = F.cross_entropy(x, y)\n", "loss * mask"]}]
    path = tmp_path / "old.ipynb"
    path.write_text(json.dumps({"worksheets": [{"cells": cells}], "nbformat": 3}))
    assert main([str(path)]) == 1
    assert capsys.readouterr().out.startswith(f"{path}:cell 1:2:1: ML001")
