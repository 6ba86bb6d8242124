# SPDX-License-Identifier: BSD-3-Clause
"""`--fix` rewrites size_average and reduce, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from masked_loss_lint.__main__ import main

BUGGY = """\
import torch.nn.functional as F


def loss_of(logits, labels):
    return F.cross_entropy(logits, labels, size_average=True)
"""


@pytest.fixture
def buggy(tmp_path: Path) -> Path:
    path = tmp_path / "buggy.py"
    path.write_text(BUGGY)
    return path


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
    "F.l1_loss(x, lambda a: a, reduce=False)": 'F.l1_loss(x, lambda a: a, reduction="none")',
    # Parentheses and commas are not in the syntax tree.
    "nn.MSELoss(size_average=None, reduce=None)": "nn.MSELoss()",
    "nn.MSELoss(size_average=None, reduce=None,)": "nn.MSELoss()",
    "F.mse_loss(x, (y), size_average=None)": "F.mse_loss(x, (y))",
    "F.mse_loss(x, (y), size_average=None,)": "F.mse_loss(x, (y),)",
    "F.mse_loss((x), y, reduce=(False))": 'F.mse_loss((x), y, reduction="none")',
    "F.cross_entropy(x, y, None, (False))": 'F.cross_entropy(x, y, None, reduction="sum")',
    "F.nll_loss(x, y, w, False, (-1))": ('F.nll_loss(x, y, w, reduction="sum", ignore_index=(-1))'),
    "F.nll_loss(x, y, w, False, f(1, 2))": (
        'F.nll_loss(x, y, w, reduction="sum", ignore_index=f(1, 2))'
    ),
    "(F.mse_loss)(x, [y, ')'], reduce=False)": "(F.mse_loss)(x, [y, ')'], reduction=\"none\")",
    "(F.mse_loss(F.mse_loss(x, y, reduce=False), y, size_average=False))": (
        '(F.mse_loss(F.mse_loss(x, y, reduction="none"), y, reduction="sum"))'
    ),
    "F.mse_loss(x, y, reduce=None,  # why\n    size_average=None)": (
        "F.mse_loss(x, y, reduce=None,  # why\n    size_average=None)"
    ),
    # Flags that are written in other ways than False.
    "F.l1_loss(x, y, size_average=\\\n    False)": 'F.l1_loss(x, y, reduction="sum")',
    "F.l1_loss(x, y, size_average =\tFalse)": 'F.l1_loss(x, y, reduction="sum")',
    "F.l1_loss(x, y, size_average=(\n    False\n))": 'F.l1_loss(x, y, reduction="sum")',
    "F.l1_loss(x, y, None, (\n    0x0))": 'F.l1_loss(x, y, reduction="none")',
    "F.l1_loss(x, y, size_average=\n    None)": "F.l1_loss(x, y)",
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


def test_fix_of_a_file_without_a_newline_at_its_end(buggy: Path) -> None:
    buggy.write_text(BUGGY.rstrip("\n"))
    assert main([str(buggy), "--fix"]) == 0
    assert buggy.read_text().endswith('reduction="mean")')


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


def test_what_fix_leaves_is_all_that_is_reported(
    buggy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And nobody is told to call it once more."""
    buggy.write_text(f"{BUGGY}\n\nloss = F.l1_loss\nvalue = loss(x, y, size_average=False)\n")
    assert main([str(buggy), "--fix"]) == 1
    out, err = capsys.readouterr()
    assert out.startswith(f"{buggy}:9:9: ML002 l1_loss")
    assert out.count("\n") == 1
    assert err == "Found 1 in 1 files. 1 fixed.\n"


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


def test_a_string_in_place_of_a_flag_is_not_rewritten(
    buggy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """reduce="sum" gives the mean: what was meant is for people to say."""
    text = BUGGY.replace("size_average=True", 'reduce="sum"')
    buggy.write_text(text)
    assert main([str(buggy), "--fix"]) == 1
    assert buggy.read_text() == text
    assert "counts as True; was reduction='sum' meant?" in capsys.readouterr().out
