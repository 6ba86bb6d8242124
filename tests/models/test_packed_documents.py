# SPDX-License-Identifier: BSD-3-Clause
"""Documents that transformers has flattened into one row train as the same documents padded."""

from __future__ import annotations

import copy
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from masked_loss import cu_seqlens, fuse_linear_loss, is_fused
from masked_loss.integrations.transformers import causal_lm_loss

transformers = pytest.importorskip("transformers")

V = 19
DOCUMENTS = [[3, 5, 7, 9, 2], [4], [8, 8, 1], [6, 2, 6, 3, 5, 1, 7]]
LENGTHS = [5, 1, 3, 7]
PROMPTS = [2, 0, 1, 3]
"""Tokens at the beginning of each document that are no targets."""
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 0.05},
    "class_weight": {"class_weight": torch.linspace(0.5, 2, V, dtype=torch.float64)},
    "softcap": {"softcap": 2.0},
    "normalizer": {"normalizer": 3.5},
}


@cache
def llama() -> Any:
    """Two layers in float64: only the loss is under test."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32,
        initializer_range=0.5, use_cache=False,  # with a cache it attends across documents
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).double()


def labels_of(document: list[int], prompt: int) -> list[int]:
    return [-100] * prompt + document[prompt:]


def padded() -> dict[str, Tensor]:
    longest = max(LENGTHS)
    rows = {"input_ids": [], "labels": [], "attention_mask": []}
    for document, prompt in zip(DOCUMENTS, PROMPTS, strict=True):
        more = longest - len(document)
        rows["input_ids"].append(document + [0] * more)
        rows["labels"].append(labels_of(document, prompt) + [-100] * more)
        rows["attention_mask"].append([1] * len(document) + [0] * more)
    return {name: torch.tensor(x) for name, x in rows.items()}


def flattened() -> dict[str, Tensor]:
    features = [
        {"input_ids": d, "labels": labels_of(d, p)} for d, p in zip(DOCUMENTS, PROMPTS, strict=True)
    ]
    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    return dict(collator(features, return_tensors="pt"))


def step(batch: dict[str, Any], fused: bool, options: dict[str, Any]) -> tuple[Tensor, ...]:
    """The loss, or those of all tokens one after the other; and the gradients of the model."""
    model = copy.deepcopy(llama())
    model.loss_function = partial(causal_lm_loss, **options)
    if fused:
        fuse_linear_loss(model)
    loss = model(**batch).loss
    loss.sum().backward()
    assert bool(is_fused(model)) == fused
    if loss.dim() and len(loss) > 1:
        loss = torch.cat([row[:n] for row, n in zip(loss, LENGTHS, strict=True)])
    return loss.detach().flatten(), *(p.grad for p in model.parameters())


@pytest.mark.parametrize("fused", [False, True], ids=["logits", "fused"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "sequence_mean"])
def test_flattened_is_padded(reduction: str, name: str, fused: bool) -> None:
    options = {"reduction": reduction, **OPTIONS[name]}
    if reduction == "none":
        options.pop("normalizer", None)
    batch = flattened()
    for ours, theirs in zip(
        step(batch, fused, options), step(padded(), fused, options), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_labels_that_do_not_know_of_documents() -> None:
    """The collator's labels are -100 where a document begins; the loss does not need them to be."""
    batch, options = flattened(), {"reduction": "sequence_mean"}
    expected = step(batch, True, options)
    starts = batch["cu_seq_lens_q"][1:-1].long()
    known = batch["labels"].clone()
    known[0, starts] = batch["input_ids"][0, starts]
    known[0, starts[1:]] = -100  # of these two the prompt begins there
    for fused in (False, True):
        found = step({**batch, "labels": known}, fused, options)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def logits_and_labels() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    bounds = cu_seqlens(lengths=[*LENGTHS, 0, 2])  # with an empty document
    tokens = int(bounds[-1])
    return torch.randn(1, tokens, V), torch.randint(V, (1, tokens)), bounds


@pytest.mark.parametrize("reduction", ["none", "mean", "sequence_mean"])
def test_position_ids_stand_for_the_bounds(reduction: str) -> None:
    logits, labels, bounds = logits_and_labels()
    call = partial(causal_lm_loss, logits, labels, V, reduction=reduction)
    expected = call(cu_seqlens=bounds)
    positions = torch.cat([torch.arange(n) for n in [*LENGTHS, 2]])[None]
    assert torch.equal(call(cu_seq_lens_q=bounds), expected)
    assert torch.equal(call(position_ids=positions), expected)
    assert torch.equal(call(position_ids=positions[0]), expected)
    # What says more goes first, and other positions than those of text in a row say nothing.
    assert torch.equal(call(cu_seq_lens_q=bounds, position_ids=positions * 0), expected)
    rows = torch.zeros(3, 1, labels.shape[1], dtype=torch.long)
    assert torch.equal(call(position_ids=rows), call())
    assert not torch.equal(call(), expected)


@pytest.mark.parametrize("reduction", ["none", "mean", "sequence_mean"])
def test_positions_that_say_nothing_of_documents(reduction: str) -> None:
    logits, labels = torch.randn(2, 6, V), torch.randint(V, (2, 6))
    call = partial(causal_lm_loss, logits, labels, V, reduction=reduction)
    for positions in (
        [[0, 0, 0, 0, 0, 0]],
        [[0, 1, 2, 3, 4, 5]],
        [[1, 1, 1, 0, 1, 2], [1, 0, 1, 2, 3, 4]],  # padded on the left
        [[3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6]],  # of a text that began earlier
    ):
        assert torch.equal(call(position_ids=torch.tensor(positions)), call())
    # One row may be padded, and the other packed.
    positions = torch.tensor([[1, 0, 1, 2, 3, 4], [0, 0, 1, 0, 1, 2]])
    bounds = torch.tensor([0, 6, 7, 9, 12])
    assert torch.equal(call(position_ids=positions), call(cu_seqlens=bounds))


def test_flattened_logits_or_labels_keep_their_rows() -> None:
    logits, labels, mask = torch.randn(2, 6, V), torch.randint(V, (2, 6)), torch.rand(2, 6) > 0.3
    for reduction in ("none", "mean", "sequence_mean"):
        call = partial(causal_lm_loss, labels=None, vocab_size=V, reduction=reduction)
        expected = call(logits, shift_labels=labels, mask=mask)
        flat = call(logits.flatten(0, 1), shift_labels=labels, mask=mask)
        assert torch.equal(flat, expected)
        flat = call(logits, shift_labels=labels.flatten(), mask=mask.flatten())
        assert torch.equal(flat, expected)
    with pytest.raises(ValueError, match=r"same rows .* got \[2, 6, 19\] and \[3, 4\]"):
        call(logits, shift_labels=labels.view(3, 4))
    with pytest.raises(ValueError, match=r"shift_labels must have shape \[2, 6\], got \[2, 5\]"):
        call(logits, shift_labels=labels[:, 1:])


def test_labels_that_are_shifted_already() -> None:
    logits, labels, bounds = logits_and_labels()
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    shifted[0, (bounds[1:] - 1).long().clamp(min=0)] = -100
    for reduction in ("sum", "mean", "sequence_mean"):
        options = {"reduction": reduction, "cu_seq_lens_q": bounds}
        ours = causal_lm_loss(logits, None, V, shift_labels=shifted, **options)
        torch.testing.assert_close(ours, causal_lm_loss(logits, labels, V, **options))
    # Of a part of the row, as context parallelism has it, only the sequence mean needs bounds.
    part = causal_lm_loss(logits[:, :9], None, V, shift_labels=shifted[:, :9], cu_seq_lens_q=bounds)
    torch.testing.assert_close(
        part, torch.nn.functional.cross_entropy(logits[0, :9], shifted[0, :9])
    )


def test_a_compiled_loss_takes_positions() -> None:
    logits, labels, bounds = logits_and_labels()
    positions = torch.cat([torch.arange(n) for n in [*LENGTHS, 2]])[None]
    compiled = torch.compile(causal_lm_loss, backend="aot_eager", fullgraph=True)
    ours = compiled(logits, labels, V, reduction="sequence_mean", position_ids=positions)
    theirs = causal_lm_loss(logits, labels, V, reduction="sequence_mean", cu_seqlens=bounds)
    assert torch.equal(ours, theirs)
