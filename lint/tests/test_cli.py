# SPDX-License-Identifier: BSD-3-Clause
"""The command line: formats, selection, noqa, notebooks, --fix, exit codes, speed."""

from __future__ import annotations

import gc
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.nn.functional as F
from torch import nn

from masked_loss_lint import fix
from masked_loss_lint.__main__ import main
from masked_loss_lint.torch_losses import SPECS, legacy_reduction

CORPUS = Path(__file__).parent / "corpus"
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


def test_wrong_use_is_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "missing")]) == 2
    assert "missing: no such file or folder" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path), "--select", "ML999"])
    assert caught.value.code == 2


def test_a_file_that_does_not_parse_is_named(
    buggy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (buggy.parent / "python2.py").write_text("print 'hello'\n")
    (buggy.parent / "latin.py").write_bytes(b"x = '\xe9'\n")
    assert main([str(buggy.parent)]) == 2
    out, err = capsys.readouterr()
    assert "python2.py:1: cannot parse" in err
    assert "latin.py" in err
    assert "ML001" in out  # the rest was checked


def test_what_is_nested_too_deeply_is_named_and_the_rest_is_checked(
    buggy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deep = buggy.parent / "deep.py"
    sum_of_500 = " + ".join(["x"] * 500)
    chain_of_2000 = "".join(f"    elif x == {n}:\n        pass\n" for n in range(2000))
    a_lambda = f"lambda_loss = lambda x: {sum_of_500}"
    many = f"def loss_by_name(x):\n    if x:\n        pass\n{chain_of_2000}"
    deep.write_text(f"{BUGGY}\n\nloss = {sum_of_500}\n{a_lambda}\n\n\n{many}")
    assert main([str(buggy.parent)]) == 2
    out, err = capsys.readouterr()
    assert out.count("ML001") == 2
    assert f"error: {deep}:9: cannot check: nested too deeply" in err
    assert err.count("nested too deeply") == 3


def test_a_loss_nested_too_deeply_for_a_message(
    buggy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = "mask" + " .float()" * 480
    buggy.write_text(BUGGY.replace("* mask", f"* {mask}"))
    assert main([str(buggy)]) == 2
    assert "nested too deeply" in capsys.readouterr().err


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


FIXES = {
    "F.cross_entropy(x, y, size_average=True)": 'F.cross_entropy(x, y, reduction="mean")',
    "F.cross_entropy(x, y, size_average=False)": 'F.cross_entropy(x, y, reduction="sum")',
    "F.cross_entropy(x, y, reduce=False)": 'F.cross_entropy(x, y, reduction="none")',
    "F.nll_loss(x, y, w, False, -1)": 'F.nll_loss(x, y, w, reduction="sum", ignore_index=-1)',
    "F.nll_loss(x, y, w, False, -1, False)": (
        'F.nll_loss(x, y, w, reduction="none", ignore_index=-1)'
    ),
    "F.mse_loss(x, y, size_average=False, reduce=True)": 'F.mse_loss(x, y, reduction="sum")',
    'F.mse_loss(x, y, reduction="mean", reduce=False)': 'F.mse_loss(x, y, reduction="none")',
    "F.mse_loss(x, y, size_average=None)": "F.mse_loss(x, y)",
    "nn.MSELoss(False)": 'nn.MSELoss(reduction="sum")',
    "nn.MSELoss(None, False)": 'nn.MSELoss(reduction="none")',
    "nn.CrossEntropyLoss(w, size_average=False)": 'nn.CrossEntropyLoss(w, reduction="sum")',
    "nn.BCELoss(size_average=None, weight=w)": "nn.BCELoss(weight=w)",
    "f('é'), F.l1_loss(x, y, reduce=False)": "f('é'), F.l1_loss(x, y, reduction=\"none\")",
    # Parentheses and commas are not in the syntax tree.
    "nn.MSELoss(size_average=None, reduce=None)": "nn.MSELoss()",
    "nn.MSELoss(size_average=None, reduce=None,)": "nn.MSELoss()",
    "F.mse_loss(x, (y), size_average=None)": "F.mse_loss(x, (y))",
    "F.mse_loss(x, (y), size_average=None,)": "F.mse_loss(x, (y),)",
    "F.mse_loss((x), y, reduce=(False))": 'F.mse_loss((x), y, reduction="none")',
    "F.cross_entropy(x, y, None, (False))": 'F.cross_entropy(x, y, None, reduction="sum")',
    "F.nll_loss(x, y, w, False, (-1))": ('F.nll_loss(x, y, w, reduction="sum", ignore_index=(-1))'),
    "F.nll_loss(x, y, w, None, f(1, 2))": "F.nll_loss(x, y, w, ignore_index=f(1, 2))",
    "(F.mse_loss)(x, [y, ')'], reduce=False)": "(F.mse_loss)(x, [y, ')'], reduction=\"none\")",
    "(F.mse_loss(F.mse_loss(x, y, reduce=False), y, size_average=False))": (
        '(F.mse_loss(F.mse_loss(x, y, reduction="none"), y, reduction="sum"))'
    ),
    "F.mse_loss(x, y, reduce=None,  # why\n    size_average=None)": (
        "F.mse_loss(x, y, reduce=None,  # why\n    size_average=None)"
    ),
    # The value would end at the first comma if it became a keyword.
    "F.nll_loss(x, y, w, False, n := 3)": "F.nll_loss(x, y, w, False, n := 3)",
    "F.l1_loss(x, y, reduce=flag)": "F.l1_loss(x, y, reduce=flag)",
    "F.l1_loss(*pair, reduce=False)": "F.l1_loss(*pair, reduce=False)",
    "F.l1_loss(x, y, reduce=False, **more)": "F.l1_loss(x, y, reduce=False, **more)",
}
HEAD = "import torch.nn.functional as F\nfrom torch import nn\n\n# a comment stays\nvalue = "


@pytest.mark.parametrize("call", FIXES)
def test_fix_rewrites_the_call_and_nothing_else(call: str, tmp_path: Path) -> None:
    path = tmp_path / "old.py"
    path.write_bytes(f"{HEAD}{call}\r\nend = 1\r\n".encode())
    status = main([str(path), "--fix", "--select", "ML002"])
    assert path.read_bytes().decode() == f"{HEAD}{FIXES[call]}\r\nend = 1\r\n"
    assert status == (1 if call == FIXES[call] else 0)
    again = path.read_bytes()
    main([str(path), "--fix", "--select", "ML002"])
    assert path.read_bytes() == again


def test_fix_over_several_lines(tmp_path: Path) -> None:
    path = tmp_path / "old.py"
    path.write_text(
        "import torch.nn.functional as F\n"
        "loss = F.cross_entropy(\n    x,\n    y,\n    size_average=False,  # old\n"
        "    reduce=True,\n)\n"
    )
    assert main([str(path), "--fix"]) == 0
    compile(path.read_text(), "old.py", "exec")
    assert path.read_text().endswith('(\n    x,\n    y,\n    reduction="sum",  # old\n)\n')


def test_fix_of_a_file_that_cannot_be_written(
    buggy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    assert main([str(buggy), "--fix"]) == 2
    out, err = capsys.readouterr()
    assert "ML002" in out
    assert f"error: {buggy}: cannot write: read-only" in err


def test_fix_leaves_alone_what_is_written_elsewhere(tmp_path: Path) -> None:
    """The arguments of a partial are not where it is called, nor even in that file."""
    head = "import torch.nn.functional as F\nfrom functools import partial\n\n"
    programs = {
        "a.py": f"{head}ce_loss = partial(F.cross_entropy, size_average=False)\n",
        "b.py": "from a import ce_loss\n\n\nresult = [ce_loss(logits[0], y), (1, 2), 345678]\n",
        "c.py": f"{head}mean = partial(F.l1_loss, reduce=False)\nvalue = mean(x, y) + mean(y, x)\n",
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
    assert main([str(tmp_path), "--fix"]) == 1
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == programs


def test_fix_writes_nothing_that_means_something_else(
    buggy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start = BUGGY.index("size_average")
    for edits in [
        [fix.Edit(start, start + 17, "reduction=")],  # does not parse
        [fix.Edit(start, start + 17, 'reduction="sum"')],  # "mean" was meant
        [fix.Edit(start, start + 17, 'reduction="mean"'), fix.Edit(start + 9, start + 19, "")],
    ]:
        monkeypatch.setattr(fix, "_edits", lambda *arguments, edits=edits: edits)
        assert main([str(buggy), "--fix", "--select", "ML002"]) == 1
        assert buggy.read_text() == BUGGY
        assert "Found 1 in 1 files.\n" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(p for p, spec in SPECS.items() if not spec.is_ours))
def test_the_parameters_are_those_of_the_installed_torch(path: str) -> None:
    name = path.rsplit(".", 1)[1]
    owner = getattr(nn, name) if SPECS[path].is_module else getattr(F, name)
    assert SPECS[path].parameters == tuple(inspect.signature(owner).parameters)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("average", [None, True, False])
@pytest.mark.parametrize("reduce", [None, True, False])
def test_legacy_reduction_is_that_of_the_installed_torch(
    average: bool | None, reduce: bool | None
) -> None:
    module = nn.CrossEntropyLoss(size_average=average, reduce=reduce)
    assert module.reduction == legacy_reduction(average, reduce)


def test_500_files_take_a_few_seconds(tmp_path: Path) -> None:
    """Best CPU time of two, so that other work on the machine does not count."""
    programs = sorted(CORPUS.rglob("*.py"))
    for number in range(500 // len(programs) + 1):
        shutil.copytree(CORPUS, tmp_path / f"project{number}")
    times = []
    for _ in range(2):
        start = time.process_time()
        assert main([str(tmp_path), "--format", "json"]) == 1
        times.append(time.process_time() - start)
    assert min(times) < 10
