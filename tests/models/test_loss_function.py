# SPDX-License-Identifier: BSD-3-Clause
"""causal_lm_loss: a keyword that would change the loss is used or refused, none is ignored."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from masked_loss import VocabShard, masked_cross_entropy
from masked_loss.integrations.transformers import FROM_MODELS, causal_lm_loss

V = 23
RANDOM = torch.Generator().manual_seed(0)
LOGITS = torch.randn(2, 6, V, generator=RANDOM)
LABELS = torch.randint(V, (2, 6), generator=RANDOM)
WEIGHT = torch.linspace(0.5, 2, V)
# A value that is no default, for each keyword of masked_cross_entropy that a loss function takes.
CHANGES: dict[str, Any] = {
    "reduction": "sum",
    "normalizer": 7,
    "class_weight": WEIGHT,
    "label_smoothing": 0.2,
    "z_loss": 0.1,
    "softcap": 1.5,
    "shift": False,
    "mask": torch.tensor([[1, 1, 1, 1, 0, 0], [1, 0, 1, 0, 0, 0]]),
    "temperature": 2.0,
    "inplace_backward": True,
    "cu_seqlens": torch.tensor([0, 3, 10]),
}
KEYWORDS = [
    name
    for name, p in inspect.signature(masked_cross_entropy).parameters.items()
    if p.kind is p.KEYWORD_ONLY and name not in ("return_stats", "ignore_index", "vocab")
]


@pytest.mark.parametrize("name", [*KEYWORDS, "mask"])
def test_every_keyword_of_the_loss_is_used(name: str) -> None:
    options = {name: CHANGES[name]}
    got = partial(causal_lm_loss, **options)(LOGITS, LABELS, V, output_attentions=True)
    expected = masked_cross_entropy(LOGITS, LABELS, **{"shift": True, **options})
    assert torch.equal(got, expected)
    if name != "inplace_backward":
        assert not torch.allclose(got, causal_lm_loss(LOGITS, LABELS, V))


def test_a_shard_of_the_vocabulary() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = dist.distributed_c10d._get_default_group()
        whole = causal_lm_loss(LOGITS, LABELS, V, vocab=VocabShard(group, (0, V)))
        torch.testing.assert_close(whole, causal_lm_loss(LOGITS, LABELS, V))
        with pytest.raises(ValueError, match="logits must have"):
            causal_lm_loss(LOGITS, LABELS, V, vocab=VocabShard(group, (0, V + 1)))
    finally:
        dist.destroy_process_group()


def test_names_of_pytorch_and_results_per_token() -> None:
    got = causal_lm_loss(LOGITS, LABELS, V, weight=WEIGHT)
    assert torch.equal(got, causal_lm_loss(LOGITS, LABELS, V, class_weight=WEIGHT))
    assert causal_lm_loss(LOGITS, LABELS, V, reduction="none").shape == LABELS.shape
    aligned = causal_lm_loss(LOGITS, None, V, shift_labels=LABELS)
    assert torch.equal(aligned, causal_lm_loss(LOGITS, LABELS, V, shift=False))


@pytest.mark.parametrize(
    "name", ["loss_mask", "loss_scale", "return_stats", "label_smoothng", "size_average", "reduce"]
)
def test_every_other_keyword_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match=f"causal_lm_loss: got {name}=, .*label_smoothing, mask"):
        causal_lm_loss(LOGITS, LABELS, V, **{name: torch.ones(2, 6)})


def test_keywords_that_contradict_each_other() -> None:
    items = {"num_items_in_batch": 5}
    calls: list[tuple[str, dict[str, Any]]] = [
        ("must not both be given", {**items, "normalizer": 5}),
        ("shifted already, got shift=True", {"shift_labels": LABELS, "shift": True}),
        ("weight and class_weight are the same", {"weight": WEIGHT, "class_weight": WEIGHT}),
        ("counts tokens, got 'sequence_mean'", {**items, "reduction": "sequence_mean"}),
        ("counts tokens, got 'none'", {**items, "reduction": "none"}),
    ]  # fmt: skip
    for message, options in calls:
        with pytest.raises(ValueError, match=f"causal_lm_loss: .*{message}"):
            causal_lm_loss(LOGITS, LABELS, V, **options)


def test_errors_name_what_was_passed() -> None:
    for arguments, text in (
        ({"weight": WEIGHT[:-1]}, "weight must have shape"),
        ({"class_weight": WEIGHT[:-1]}, "class_weight must have shape"),
        ({"labels": LABELS[0]}, "labels must have shape"),
        ({"shift_labels": LABELS[:, 1:]}, "shift_labels must have shape"),
        ({"labels": LABELS + V}, r"labels\[0, 1\] is"),
    ):
        with pytest.raises((IndexError, ValueError), match=f"^causal_lm_loss: {text}"):
            causal_lm_loss(LOGITS, vocab_size=V, **{"labels": LABELS} | arguments)
    with pytest.raises(TypeError, match=r"^causal_lm_loss: num_items_in_batch must"):
        causal_lm_loss(LOGITS, LABELS, V, num_items_in_batch=[6])


@pytest.mark.parametrize("name", sorted(FROM_MODELS - {"cu_seq_lens_q"}))
def test_what_models_hand_over_changes_nothing(name: str) -> None:
    value: Tensor = torch.arange(6).expand(2, 6)
    got = causal_lm_loss(LOGITS, LABELS, V, **{name: value})
    assert torch.equal(got, causal_lm_loss(LOGITS, LABELS, V))


def test_the_list_holds_all_that_transformers_hands_over() -> None:
    """What each model's forward passes to self.loss_function, by name or in its own kwargs."""
    transformers = pytest.importorskip("transformers")
    generic = pytest.importorskip("transformers.utils.generic")
    known = {*FROM_MODELS, *inspect.signature(causal_lm_loss).parameters}
    assert set(generic.TransformersKwargs.__annotations__) <= known
    models = Path(transformers.__file__).parent / "models"
    unknown = {
        (model, name)
        for path in models.glob("*/modeling_*.py")
        for model, call in loss_calls(path.read_text(encoding="utf-8"))
        for name in {keyword.arg for keyword in call.keywords} - known - {None}
    }
    assert not unknown


def loss_calls(source: str) -> Iterator[tuple[str, ast.Call]]:
    """The calls of self.loss_function in causal language models, without parsing the whole file."""
    for model in re.split(r"^class ", source, flags=re.MULTILINE)[1:]:
        name = model.split("(")[0]
        for match in re.finditer(r"self\.loss_function\(", model):
            end = match.end()
            while name.endswith("ForCausalLM"):
                end = model.index(")", end) + 1
                try:
                    yield name, ast.parse(model[match.start() : end], mode="eval").body  # type: ignore[misc]
                    break
                except SyntaxError:  # a parenthesis of an argument
                    continue
