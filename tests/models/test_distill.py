# SPDX-License-Identifier: BSD-3-Clause
"""examples/distill.py: its losses, its students, its picture."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("tokenizers")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import distill


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents in which a word tells the next one."""
    rng, path = random.Random(0), tmp_path_factory.mktemp("data") / "own.txt"
    words = ["a", "loss", "mask", "keeps", "what", "counts", "and", "leaves", "the", "padding"]
    starts = [(rng.randrange(len(words)), rng.randint(1, 30)) for _ in range(120)]
    documents = [" ".join(words[(i + k) % len(words)] for k in range(n)) for i, n in starts]
    path.write_text("\n\n".join(documents), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", distill.LOSSES)
def test_only_real_tokens_teach(name: str) -> None:
    tokens, mask = torch.randint(11, (2, 5)), torch.tensor([[True] * 5, [True, True] + 3 * [False]])
    student = torch.randn(2, 5, 11, requires_grad=True)
    teacher = torch.randn(2, 5, 11).masked_fill(~mask.roll(-1, 1)[..., None], torch.nan)
    loss = distill.LOSSES[name](student, teacher, tokens, mask)
    loss.backward()
    assert loss.isfinite()
    assert (student.grad[1, 1:] == 0).all()
    assert (student.grad[1, 0] != 0).any()


def test_divergences_are_of_the_teacher_from_the_student() -> None:
    tokens, mask = torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.bool)
    student, teacher = torch.randn(2, 2, 5, 11)
    q, p = (x[:, :-1].log_softmax(-1).flatten(0, 1) for x in (student, teacher))
    m = torch.logaddexp(q, p) - torch.log(torch.tensor(2.0))
    kl = F.kl_div(q, p, reduction="batchmean", log_target=True)
    jsd = sum(F.kl_div(m, x, reduction="batchmean", log_target=True) for x in (q, p)) / 2
    torch.testing.assert_close(distill.by_kl(student, teacher, tokens, mask), kl)
    torch.testing.assert_close(distill.by_jsd(student, teacher, tokens, mask), jsd)


def test_from_a_text_to_the_picture(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every student comes closer to the teacher."""
    out = tmp_path / "new folder" / "distill.png"
    sizes = ["--steps", "16", "--batch", "4", "--max-len", "24"]
    distill.main(["--data", str(text), *sizes, "--out", str(out)])
    assert out.read_bytes().startswith(b"\x89PNG")
    runs = json.loads(out.with_suffix(".json").read_text())
    assert list(runs) == list(distill.LOSSES)
    for run in runs.values():
        first, *_, last = run["divergence"].values()
        assert last < first
    printed = capsys.readouterr().out
    assert all(name in printed for name in runs)
