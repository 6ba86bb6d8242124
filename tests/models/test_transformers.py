# SPDX-License-Identifier: BSD-3-Clause
"""transformers, PEFT and TRL: tiny random models train as they do with the stock loss."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import masked_loss
from masked_loss._op.factory import Operator
from masked_loss.fuse import DenseLogits, FusedLinear, LazyLogits
from masked_loss.integrations.transformers import causal_lm_loss

transformers = pytest.importorskip("transformers")
loss_utils = pytest.importorskip("transformers.loss.loss_utils")

V = 120
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "Llama": {},
    "Qwen3": {"tie_word_embeddings": True},
    "Gemma2": {"final_logit_softcapping": 0.5, "attn_logit_softcapping": 50.0},
    "Granite": {"logits_scaling": 4.0},
    "Cohere": {"logit_scale": 0.25},
}


def make(family: str, **options: Any) -> Any:
    config = getattr(transformers, f"{family}Config")(**SIZES, **FAMILIES[family], **options)
    torch.manual_seed(3)
    return getattr(transformers, f"{family}ForCausalLM")(config)


def make_batch(step: int = 0, rows: int = 4, length: int = 12) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(3, V, (rows, length), generator=generator)
    lengths = torch.randint(3, length + 1, (rows, 1), generator=generator)
    real = torch.arange(length) < lengths
    return {
        "input_ids": ids.masked_fill(~real, 0),
        "attention_mask": real.long(),
        "labels": ids.masked_fill(~real, -100),
    }


def train(model: Any, steps: int = 4, **extra: Any) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        loss = model(**make_batch(step), **extra).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def fused(model: Any) -> Any:
    return masked_loss.fuse_linear_loss(model)


def with_loss_function(model: Any) -> Any:
    model.loss_function = causal_lm_loss
    return model


def with_both(model: Any) -> Any:
    return fused(with_loss_function(model))


WAYS = [fused, with_loss_function, with_both]


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of masked_loss's losses, as they are computed: stock ones give the same numbers."""
    computed: list[str] = []

    call = Operator.__call__

    def count(operator: Operator, *args: Any, **options: Any) -> Any:
        computed.append(operator.name.removesuffix("_stats"))
        return call(operator, *args, **options)

    monkeypatch.setattr(Operator, "__call__", count)
    return computed


def loss_of(way: Callable[[Any], Any]) -> str:
    return "cross_entropy" if way is with_loss_function else "linear_cross_entropy"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_models_train_as_with_the_stock_loss(
    family: str, way: Callable[[Any], Any], losses: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, ours = make(family), way(make(family))
    expected = train(stock)
    if way is not with_loss_function:  # the logits are never computed

        def computed(self: LazyLogits, reason: str) -> Tensor:
            raise AssertionError(f"the logits were computed for {reason}")

        monkeypatch.setattr(LazyLogits, "_value", computed)
    assert not losses
    assert train(ours) == pytest.approx(expected, abs=2e-5)
    assert losses == [loss_of(way)] * 4
    assert expected[0] != expected[-1]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("items", [None, 17, torch.tensor(17), torch.tensor([17])])
def test_num_items_in_batch(way: Callable[[Any], Any], items: Any) -> None:
    stock, ours = make("Llama"), way(make("Llama"))
    batch = make_batch()
    expected = stock(**batch, num_items_in_batch=items).loss.reshape(())
    got = ours(**batch, num_items_in_batch=items).loss
    if way is fused:  # transformers' own loss divides
        got = got.reshape(())
    assert got.shape == ()
    torch.testing.assert_close(got, expected)
    expected.backward()
    got.backward()
    for p, q in zip(stock.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("ignore_index", [-100, 7])
def test_the_loss_function_alone(dtype: torch.dtype, ignore_index: int) -> None:
    stock = loss_utils.ForCausalLMLoss
    logits = torch.randn(3, 9, V, dtype=dtype, requires_grad=True)
    labels = torch.randint(V, (3, 9))
    labels[:, 5:] = ignore_index
    labels[0, 2] = ignore_index
    shifted = torch.randint(V, (3, 9)).masked_fill(labels == ignore_index, ignore_index)
    calls: list[tuple[Any, dict[str, Any]]] = [
        ((labels, V), {}),
        ((labels, V, 11), {}),
        ((labels, V), {"num_items_in_batch": torch.tensor(5)}),
        ((None, V), {"shift_labels": shifted}),
        ((labels, V, None), {"shift_labels": shifted.flatten()}),
        ((labels, V), {"cu_seq_lens_q": torch.tensor([0, 9, 18, 27]), "output_attentions": True}),
    ]
    for args, kwargs in calls:
        kwargs["ignore_index"] = ignore_index
        expected = stock(logits, *args, **kwargs)
        got = causal_lm_loss(logits, *args, **kwargs)
        close = {"rtol": 1e-5, "atol": 1e-5, "check_dtype": False}
        torch.testing.assert_close(got, expected, **close)
        (want,) = torch.autograd.grad(expected, logits)
        (grad,) = torch.autograd.grad(got, logits)
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(grad, want, rtol=tolerance, atol=1e-6)
    assert causal_lm_loss(logits, torch.full_like(labels, ignore_index), V,
                          ignore_index=ignore_index) == 0  # fmt: skip


def test_options_of_the_loss_function() -> None:
    logits, labels = torch.randn(2, 6, V), torch.randint(V, (2, 6))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]])
    got = causal_lm_loss(logits, labels, V, mask=mask, label_smoothing=0.1, z_loss=0.01)
    expected = masked_loss.masked_cross_entropy(
        logits, labels, mask, label_smoothing=0.1, z_loss=0.01, shift=True
    )
    assert torch.equal(got, expected)
    with pytest.raises(ValueError, match=r"causal_lm_loss: logits must have shape \[..., 99\]"):
        causal_lm_loss(logits, labels, 99)
    with pytest.raises(ValueError, match="labels or shift_labels must be given"):
        causal_lm_loss(logits, None, V)
    with pytest.raises(ValueError, match=r"num_items_in_batch must have one element, got \[2\]"):
        causal_lm_loss(logits, labels, V, torch.tensor([1, 2]))


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma2"])
def test_generation_and_evaluation(family: str) -> None:
    stock, ours = make(family).eval(), with_both(make(family)).eval()
    ids = make_batch(length=5)["input_ids"].clamp(min=3)
    options = {"max_new_tokens": 6, "attention_mask": torch.ones_like(ids)}
    for how in ({"do_sample": False}, {"num_beams": 2, "do_sample": False}):
        expected = stock.generate(ids, **options, **how)
        assert torch.equal(ours.generate(ids, **options, **how), expected)
    out = ours.generate(
        ids, **options, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    assert torch.stack(out.logits).isfinite().all()
    with torch.no_grad():
        want, got = stock(**make_batch()), ours(**make_batch())
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(got.logits + 0, want.logits)
    for keep in (1, 3, torch.tensor([0, 2])):
        want, got = stock(ids, logits_to_keep=keep), ours(ids, logits_to_keep=keep)
        assert got.logits.shape == want.logits.shape
        torch.testing.assert_close(got.logits + 0, want.logits)


def test_checkpoints_copies_and_checkpointing(tmp_path: Path) -> None:
    stock, ours = make("Qwen3"), fused(make("Qwen3"))
    ours.save_pretrained(tmp_path)
    loaded = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path)
    assert type(loaded.lm_head) is torch.nn.Linear
    expected = train(stock, 2)
    for model in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), fused(loaded)):
        assert type(model.lm_head) is FusedLinear
        assert model.lm_head.weight is model.model.embed_tokens.weight
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        assert train(model, 2) == pytest.approx(expected, abs=2e-5)
    ours.resize_token_embeddings(V + 8)
    assert ours(**make_batch()).logits.shape[-1] == V + 8
    assert type(masked_loss.unfuse(ours).lm_head) is torch.nn.Linear


def test_bfloat16_and_autocast() -> None:
    expected = make("Gemma2").double()(**make_batch()).loss.item()
    model = fused(make("Gemma2"))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**make_batch())
    assert (output.loss.dtype, output.logits.dtype) == (torch.float32, torch.bfloat16)
    assert output.loss.item() == pytest.approx(expected, abs=0.02)
    output.loss.backward()
    assert train(fused(make("Gemma2").bfloat16()), 1)[0] == pytest.approx(expected, abs=0.02)


def test_logits_are_freed() -> None:
    """A fused output keeps the hidden states, as any output with a graph, and no logits."""
    model = fused(make("Llama"))
    output = model(**make_batch())
    output.loss.backward()
    assert type(output.logits) is LazyLogits
    assert output.logits._dense is None
    del output
    gc.collect()
    assert not [x for x in gc.get_objects() if type(x) is LazyLogits]


def arguments(folder: Path, **options: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "seed": 5,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **options,
    }


def rows(count: int = 16) -> list[dict[str, list[int]]]:
    batch = make_batch(rows=count, length=14)
    return [{k: v[i].tolist() for k, v in batch.items()} for i in range(count)]


def run_trainer(model: Any, folder: Path, **options: Any) -> tuple[list[float], dict[str, float]]:
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**arguments(folder, **options)),
        train_dataset=rows(),
        eval_dataset=rows(4),
        data_collator=transformers.default_data_collator,
    )
    trainer.train()
    return [e["loss"] for e in trainer.state.log_history if "loss" in e], trainer.evaluate()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("way", WAYS)
def test_trainer(
    way: Callable[[Any], Any], smoothing: float, losses: list[str], tmp_path: Path
) -> None:
    pytest.importorskip("accelerate")
    options = {"label_smoothing_factor": smoothing}
    expected, evaluated = run_trainer(make("Llama"), tmp_path, **options)
    got, metrics = run_trainer(way(make("Llama")), tmp_path, **options)
    assert len(got) == 3
    assert got == pytest.approx(expected, abs=2e-4)  # the log rounds to four digits
    assert metrics["eval_loss"] == pytest.approx(evaluated["eval_loss"], abs=2e-5)
    # Six micro-batches and one of evaluation; Trainer's own label smoother asks nobody.
    assert losses == ([] if smoothing else [loss_of(way)] * 7)


def test_smoothing_without_logits_in_trainer(
    tmp_path: Path, losses: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Trainer's own LabelSmoother does with logits, the loss function does without."""
    pytest.importorskip("accelerate")
    expected, _ = run_trainer(make("Llama"), tmp_path, label_smoothing_factor=0.1)
    model = fused(make("Llama"))
    model.loss_function = partial(causal_lm_loss, label_smoothing=0.1)
    monkeypatch.setattr(LazyLogits, "_value", None)
    got, _ = run_trainer(model, tmp_path)
    assert got == pytest.approx(expected, abs=2e-4)
    assert losses == ["linear_cross_entropy"] * 7


@pytest.mark.parametrize("way", [fused, with_both])
def test_peft(way: Callable[[Any], Any]) -> None:
    peft = pytest.importorskip("peft")

    def adapted(model: Any, **options: Any) -> Any:
        torch.manual_seed(4)
        return peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, **options))

    body = {"target_modules": ["q_proj", "v_proj"]}
    expected = train(adapted(make("Llama"), **body))
    assert train(adapted(way(make("Llama")), **body)) == pytest.approx(expected, abs=2e-5)
    model = way(adapted(make("Llama"), **body))
    assert type(model.get_base_model().lm_head) is FusedLinear
    assert train(model) == pytest.approx(expected, abs=2e-5)

    body["modules_to_save"] = ["lm_head"]  # a trained copy of the head in its place
    expected = train(adapted(make("Llama"), **body))
    for model in (way(adapted(make("Llama"), **body)), adapted(way(make("Llama")), **body)):
        assert train(model) == pytest.approx(expected, abs=2e-5)
        assert type(model(**make_batch()).logits) is LazyLogits

    body = {"target_modules": ["q_proj", "lm_head"]}  # more than a product: dense, and said
    expected = train(adapted(make("Llama"), **body))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = way(adapted(make("Llama"), **body))
    assert sum("logits are computed" in str(w.message) for w in said) <= 1
    assert train(model) == pytest.approx(expected, abs=2e-5)
    assert type(model(**make_batch()).logits) is DenseLogits
    model = adapted(way(make("Llama")), **body)
    assert train(model) == pytest.approx(expected, abs=2e-5)


def test_trl_sft_trainer(tmp_path: Path, losses: list[str]) -> None:
    """SFTTrainer brings a loss of its own; transformers' compute_loss asks the model for its."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, V)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<pad>")),
        pad_token="<pad>",
        eos_token="</s>",
    )
    data = datasets.Dataset.from_list([{"input_ids": row["input_ids"]} for row in rows()])

    class FusedSFTTrainer(trl.SFTTrainer):
        compute_loss = transformers.Trainer.compute_loss

    def run(trainer_class: Any, model: Any) -> list[float]:
        trainer = trainer_class(
            model=model,
            args=trl.SFTConfig(**arguments(tmp_path, bf16=False, gradient_checkpointing=False)),
            train_dataset=data,
            processing_class=tokenizer,
        )
        trainer.train()
        return [e["loss"] for e in trainer.state.log_history if "loss" in e]

    expected = run(trl.SFTTrainer, make("Llama"))
    assert len(expected) == 3
    assert run(trl.SFTTrainer, with_both(make("Llama"))) == pytest.approx(expected, abs=2e-4)
    assert not losses  # it works with either line, and uses none
    for way in WAYS:
        assert run(FusedSFTTrainer, way(make("Llama"))) == pytest.approx(expected, abs=2e-4)
        assert losses == [loss_of(way)] * 6
        losses.clear()


def test_compiled_model() -> None:
    model = make("Llama")
    expected = model(**make_batch()).loss
    ours = torch.compile(with_both(copy.deepcopy(model)), fullgraph=True, backend="eager")
    output = ours(**make_batch())
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    expected.backward()
    for p, q in zip(model.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6)
