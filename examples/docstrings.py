# SPDX-License-Identifier: BSD-3-Clause
"""Text of every length, at hand on every machine: the docstrings of Python's standard library.

The sources are parsed, never imported. A byte-level BPE is trained on the training documents; every
document becomes `<bos> tokens <eos>`, is cut at `max_len` and padded up to it. Most docstrings are
one line and some are pages, so most of a padded batch is padding.
"""

from __future__ import annotations

import ast
import json
import random
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

PAD, BOS, EOS = 0, 1, 2
SPECIAL_TOKENS = ["<pad>", "<bos>", "<eos>"]  # in the order of their ids
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


class Data(NamedTuple):
    """Documents as token ids, not padded yet."""

    train: list[list[int]]
    valid: list[list[int]]
    vocab_size: int


def docstrings_in(source: bytes) -> Iterator[str]:
    """Every docstring of a module, wherever its class or function is defined."""
    nodes: list[ast.AST] = [ast.parse(source)]
    while nodes:
        node = nodes.pop()
        has_docstring = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, has_docstring) and (docstring := ast.get_docstring(node)):
            yield docstring
        children = ast.iter_child_nodes(node)
        nodes.extend(c for c in children if isinstance(c, (ast.stmt, ast.excepthandler)))


def stdlib_docstrings() -> list[str]:
    """The distinct docstrings of the standard library, sorted."""
    root = Path(sysconfig.get_path("stdlib"))
    documents: set[str] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's sources
        for path in root.rglob("*.py"):
            if NOT_LIBRARY.isdisjoint(path.relative_to(root).parts):
                try:
                    documents.update(docstrings_in(path.read_bytes()))
                except (SyntaxError, ValueError):  # templates and samples that are not Python
                    continue
    return sorted(documents)


def read_documents(path: Path) -> list[str]:
    """Documents of a file: one `{"text": ...}` per line (.jsonl), or paragraphs (.txt)."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".txt":
        return [p.strip() for p in text.split("\n\n") if p.strip()]
    if path.suffix != ".jsonl":
        raise ValueError(f"data: expected a .txt or .jsonl file, got {path.name}")
    documents = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                raise ValueError(f'data: {path.name} line {number}: expected {{"text": "..."}}')
            documents.append(record["text"])
    return documents


def train_tokenizer(documents: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE, so that every text has an encoding; ids 0, 1, 2 are the special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def load(path: Path | None, vocab_size: int, valid_share: float = 0.05, seed: int = 0) -> Data:
    """Splits the documents, trains the tokenizer on the training part, and encodes both parts."""
    documents = stdlib_docstrings() if path is None else read_documents(path)
    if len(documents) < 2:
        raise ValueError(f"data: expected at least 2 documents, got {len(documents)}")
    random.Random(seed).shuffle(documents)
    held_out = max(1, round(valid_share * len(documents)))
    tokenizer = train_tokenizer(documents[held_out:], vocab_size)
    encoded = [[BOS, *e.ids, EOS] for e in tokenizer.encode_batch(documents)]
    return Data(encoded[held_out:], encoded[:held_out], tokenizer.get_vocab_size())


def pad(documents: Sequence[Sequence[int]], max_len: int) -> tuple[Tensor, Tensor]:
    """tokens [B, max_len] filled up with `<pad>`, and the loss mask: True where a token is real."""
    tokens = torch.full((len(documents), max_len), PAD)
    mask = torch.zeros(len(documents), max_len, dtype=torch.bool)
    for row, document in enumerate(documents):
        cut = torch.tensor(document[:max_len])
        tokens[row, : len(cut)] = cut
        mask[row, : len(cut)] = True
    return tokens, mask
