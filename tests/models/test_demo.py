# SPDX-License-Identifier: BSD-3-Clause
"""The demo in examples/: its data, its model, and what its three losses do to each other."""

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

import docstrings
import train_minimind
from minimind import Config, MiniMind

OPTIONS = train_minimind.Options(steps=4, batch=4, max_len=24, valid_documents=6)


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty documents of 1 to 40 words."""
    rng = random.Random(0)
    words = ["loss", "mask", "token", "mean", "sum", "pad", "the", "of", "a", "which", "reduces"]
    texts = [" ".join(rng.choices(words, k=rng.randint(1, 40))) for _ in range(60)]
    path = tmp_path_factory.mktemp("data") / "own.jsonl"
    path.write_text("\n\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def data(jsonl: Path) -> docstrings.Data:
    return docstrings.load(jsonl, vocab_size=300, valid_share=0.1)


@pytest.fixture(scope="module")
def runs(data: docstrings.Data) -> dict[str, train_minimind.Run]:
    return {name: train_minimind.train(name, data, OPTIONS) for name in train_minimind.LOSSES}


def first_batch(data: docstrings.Data) -> tuple[torch.Tensor, torch.Tensor, MiniMind]:
    tokens, mask = next(train_minimind.batches(data.train, OPTIONS))
    assert mask.any()
    assert not mask.all()
    torch.manual_seed(OPTIONS.seed)
    return tokens, mask, MiniMind(Config(vocab_size=data.vocab_size, max_len=OPTIONS.max_len))


# The losses


@pytest.mark.parametrize("name", [n for n in train_minimind.LOSSES if n != "the bug"])
def test_the_right_losses_agree_step_for_step(
    runs: dict[str, train_minimind.Run], name: str
) -> None:
    assert len(runs[name].train) == OPTIONS.steps
    torch.testing.assert_close(runs[name].train, runs["stock idiom"].train, rtol=1e-5, atol=0)
    assert runs[name].train[-1] < runs[name].train[0]
    assert runs[name].valid == pytest.approx(runs["stock idiom"].valid, rel=1e-5)


def test_the_bug_is_the_mean_over_all_tokens(data: docstrings.Data) -> None:
    tokens, mask, model = first_batch(data)
    every = F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    bug = train_minimind.the_bug
    torch.testing.assert_close(bug(model, tokens, mask), every)
    other = torch.zeros_like(mask)
    other[:, 5] = True
    torch.testing.assert_close(bug(model, tokens, other), bug(model, tokens, mask))


def test_the_bug_trains_on_padding_and_the_others_do_not(data: docstrings.Data) -> None:
    tokens, mask, model = first_batch(data)

    def gradient_of_padding(name: str) -> float:
        """How hard the loss pulls at the logits that predict padding."""
        logits = model(tokens).detach().requires_grad_()
        train_minimind.LOSSES[name](lambda _: logits, tokens, mask).backward()  # type: ignore[arg-type]
        assert logits.grad is not None
        return float(logits.grad[:, :-1][~mask[:, 1:]].abs().sum())

    assert gradient_of_padding("the bug") > 0.1
    assert gradient_of_padding("stock idiom") == 0
    assert gradient_of_padding("masked_loss") == 0


def test_the_runs_start_from_the_same_model(runs: dict[str, train_minimind.Run]) -> None:
    assert len({run.valid[0] for run in runs.values()}) == 1
    assert runs["the bug"].train != runs["stock idiom"].train


def test_the_bug_is_detected_at_its_first_step(data: docstrings.Data) -> None:
    message = train_minimind.detected(data, OPTIONS)
    assert "already a scalar" in message
    assert "loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())" in message
    assert "return (loss * mask).sum() / mask.sum()" in message


# The model


def test_real_tokens_do_not_see_the_padding(data: docstrings.Data) -> None:
    tokens, mask, model = first_batch(data)
    other = torch.where(mask, tokens, 7)
    assert not torch.equal(tokens, other)
    torch.testing.assert_close(model(tokens)[mask], model(other)[mask])


def test_tokens_see_their_past_and_their_position(data: docstrings.Data) -> None:
    model = first_batch(data)[2]
    a = model(torch.tensor([[5, 6, 7, 8]]))
    b = model(torch.tensor([[6, 5, 7, 8]]))
    assert a.shape == (1, 4, data.vocab_size)
    assert (a[0, 3] - b[0, 3]).abs().max() > 1e-5


# The data


def test_pad_marks_exactly_the_real_tokens() -> None:
    tokens, mask = docstrings.pad([[1, 9, 2], [1, 9, 9, 9, 9, 2]], max_len=5)
    assert tokens.tolist() == [[1, 9, 2, 0, 0], [1, 9, 9, 9, 9]]
    assert mask.tolist() == [[True, True, True, False, False], [True] * 5]


def test_load_splits_and_frames_the_documents(data: docstrings.Data) -> None:
    assert (len(data.train), len(data.valid)) == (54, 6)
    for document in data.train + data.valid:
        assert document[0] == docstrings.BOS
        assert document[-1] == docstrings.EOS
        assert docstrings.PAD not in document
        assert max(document) < data.vocab_size <= 300


def test_load_depends_on_nothing_but_its_arguments(jsonl: Path, data: docstrings.Data) -> None:
    assert docstrings.load(jsonl, vocab_size=300, valid_share=0.1) == data
    assert docstrings.load(jsonl, vocab_size=300, valid_share=0.1, seed=1).valid != data.valid


def test_the_tokenizer_encodes_what_it_has_never_seen() -> None:
    tokenizer = docstrings.train_tokenizer(["a mask of tokens"], vocab_size=300)
    text = "Größe ≥ 3\n\tλ"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert [tokenizer.token_to_id(t) for t in docstrings.SPECIAL_TOKENS] == [0, 1, 2]


def test_docstrings_are_found_wherever_they_are_and_nothing_is_run() -> None:
    source = b'''
"""module"""
raise SystemExit
try:
    class A:
        """class"""
        def f(self):
            """method
            of two lines"""
            "not a docstring"
except ImportError:
    async def g(): """fallback"""
'''
    found = sorted(docstrings.docstrings_in(source))
    assert found == ["class", "fallback", "method\nof two lines", "module"]


@pytest.mark.slow
def test_the_standard_library_has_documents_of_every_length() -> None:
    documents = docstrings.stdlib_docstrings()
    lengths = sorted(map(len, documents))
    assert len(documents) == len(set(documents)) > 3000
    assert lengths[len(lengths) // 4] < 80
    assert lengths[-len(lengths) // 20] > 500
    assert any("exception" in document.lower() for document in documents)


def test_text_files_are_read_by_paragraph(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text("one\nstill one\n\n\ntwo\n", encoding="utf-8")
    assert docstrings.read_documents(path) == ["one\nstill one", "two"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("own.csv", "a,b", "data: expected a .txt or .jsonl file, got own.csv"),
        ("own.txt", "one paragraph", "data: expected at least 2 documents, got 1"),
        ("own.jsonl", '{"text": "a"}\n{"body": "b"}', "data: own.jsonl line 2: expected"),
        ("own.jsonl", '{"text": 3}', "data: own.jsonl line 1: expected"),
    ],
)
def test_bad_data_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        docstrings.load(tmp_path / name, vocab_size=300)


# The whole


def test_step_reaching_interpolates() -> None:
    assert train_minimind.step_reaching({0: 8.0, 10: 6.0, 20: 5.0}, 5.5) == 15
    assert train_minimind.step_reaching({0: 8.0, 10: 6.0}, 5.5) == 10


@pytest.mark.slow
def test_demo_from_a_jsonl_to_the_picture(
    jsonl: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new folder" / "curves.png"
    train_minimind.main(
        ["--data", str(jsonl), "--steps", "3", "--batch", "4", "--max-len", "24", "--out", str(out)]
    )
    assert out.read_bytes().startswith(b"\x89PNG")
    runs = json.loads(out.with_suffix(".json").read_text())
    assert list(runs) == list(train_minimind.LOSSES)
    assert all(len(run["train"]) == len(run["seconds"]) == 3 for run in runs.values())
    assert all(run["peak_mib"] > 0 for run in runs.values())
    printed = capfd.readouterr().out
    assert all(name in printed for name in runs)
    assert "Largest difference" in printed
    assert "is already a scalar" in printed
