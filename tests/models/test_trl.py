# SPDX-License-Identifier: BSD-3-Clause
"""TRL's trainers with masked_loss's functions in place of theirs: the same steps, tiny models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from masked_loss._op import linear_chunks
from masked_loss.integrations import trl as ours

trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")
theirs = pytest.importorskip("trl.trainer.utils")

V = 120
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHAPE = (3, 7)


def make(seed: int = 3) -> Any:
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, V)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<pad>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="</s>", bos_token="<s>"
    )
    made.chat_template = (
        "{% for m in messages %}{{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}w3{% endif %}"
    )
    return made


def text(seed: int, words: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{i}" for i in torch.randint(3, V, (words,), generator=generator).tolist())


def arguments(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "save_strategy": "no",
    }


def trained(trainer: Any) -> list[dict[str, float]]:
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 3
    return logged


def assert_same_runs(
    expected: list[dict[str, float]], got: list[dict[str, float]], *names: str
) -> None:
    for a, b in zip(expected, got, strict=True):
        for name in names:
            assert b[name] == pytest.approx(a[name], abs=1e-4), name
    assert expected[0][names[-1]] != expected[-1][names[-1]]


def counted(function: Callable[..., Any], calls: list[str]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(function.__name__)
        return function(*args, **kwargs)

    return call


class Counted:
    calls: list[str]

    @classmethod
    def apply(cls, *args: Any) -> Any:
        cls.calls.append("ChunkedLogProbs")
        return ours.ChunkedLogProbs.apply(*args)


@pytest.fixture
def heads(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Puts ChunkedLogProbs in the place of TRL's function; what was called."""
    if not hasattr(theirs, "_ChunkedLogProbFunction"):
        pytest.skip("this TRL has no fused head")

    def replace() -> list[str]:
        Counted.calls = []
        monkeypatch.setattr(theirs, "_ChunkedLogProbFunction", Counted)
        return Counted.calls

    return replace


def test_dpo(tmp_path: Path, tokenizer: Any, heads: Callable[[], list[str]]) -> None:
    rows = [
        {"prompt": text(i, 4), "chosen": text(i + 50, 6), "rejected": text(i + 90, 3)}
        for i in range(8)
    ]

    def run() -> list[dict[str, float]]:
        return trained(
            trl.DPOTrainer(
                model=make(),
                ref_model=make(),
                args=trl.DPOConfig(**arguments(tmp_path)),
                train_dataset=datasets.Dataset.from_list(rows),
                processing_class=tokenizer,
            )
        )

    expected = run()
    calls = heads()
    names = ("logps/chosen", "logps/rejected", "rewards/margins", "loss")
    assert_same_runs(expected, run(), *names)
    assert len(calls) == 6  # policy and reference, three steps


def test_grpo(tmp_path: Path, tokenizer: Any, heads: Callable[[], list[str]]) -> None:
    rows = [{"prompt": text(i, 4)} for i in range(8)]

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(c.split()))) + len(c) % 3 for c in completions]

    saved = tmp_path / "model"  # GRPOTrainer loads the reference from where the model was
    make().save_pretrained(saved)

    def run() -> list[dict[str, float]]:
        options = {"num_generations": 2, "max_completion_length": 8, "beta": 0.1, "seed": 1}
        return trained(
            trl.GRPOTrainer(
                model=transformers.LlamaForCausalLM.from_pretrained(saved),
                reward_funcs=reward,
                args=trl.GRPOConfig(**arguments(tmp_path), **options),
                train_dataset=datasets.Dataset.from_list(rows),
                processing_class=tokenizer,
            )
        )

    expected = run()
    calls = heads()
    assert_same_runs(expected, run(), "entropy", "kl", "grad_norm", "loss")
    assert calls


def test_gkd(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gkd = pytest.importorskip("trl.experimental.gkd")
    rows = [
        {
            "messages": [
                {"role": "user", "content": text(i, 4)},
                {"role": "assistant", "content": text(i + 50, 6)},
            ]
        }
        for i in range(8)
    ]

    def run(beta: float) -> list[dict[str, float]]:
        return trained(
            gkd.GKDTrainer(
                model=make(),
                teacher_model=make(seed=7),
                args=gkd.GKDConfig(**arguments(tmp_path), beta=beta, lmbda=0.0, max_length=32),
                train_dataset=datasets.Dataset.from_list(rows),
                processing_class=tokenizer,
            )
        )

    betas = (0.3, 0.0)
    expected = [run(beta) for beta in betas]
    calls: list[str] = []
    function = counted(ours.generalized_jsd_loss, calls)
    monkeypatch.setattr(gkd.GKDTrainer, "generalized_jsd_loss", staticmethod(function))
    for beta, stock in zip(betas, expected, strict=True):
        assert_same_runs(stock, run(beta), "grad_norm", "loss")
    assert len(calls) == 6


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("masked", [False, True], ids=["", "mask"])
@pytest.mark.parametrize("several", [False, True], ids=["", "K ids"])
def test_selective_log_softmax(several: bool, masked: bool, temperature: float) -> None:
    logits = torch.randn(*SHAPE, V, requires_grad=True)
    index = torch.randint(V, (*SHAPE, 4) if several else SHAPE)
    options: dict[str, Any] = {"temperature": temperature}
    if masked:
        options["row_mask"] = torch.rand(index.shape) < 0.5
    results = [module.selective_log_softmax(logits, index, **options) for module in (theirs, ours)]
    torch.testing.assert_close(results[1], results[0])
    upstream = torch.randn(index.shape)
    gradients = [torch.autograd.grad(x, logits, upstream)[0] for x in results]
    torch.testing.assert_close(gradients[1], gradients[0])


def test_masked_rows_of_several_indices_are_not_read() -> None:
    logits, index = torch.randn(3, V), torch.randint(V, (3, 2))
    row_mask = torch.tensor([[1, 1], [0, 0], [0, 1]])
    logits[1], index[1:, 0] = torch.nan, V + 3
    logits.requires_grad_()
    picked = ours.selective_log_softmax(logits, index, row_mask=row_mask)
    picked.sum().backward()
    expected = logits.log_softmax(-1).gather(-1, index.clamp(max=V - 1)).where(row_mask != 0, 0)
    torch.testing.assert_close(picked, expected)
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert (logits.grad[1] == 0).all()


def test_no_index_is_ignored() -> None:
    hidden, logits, index = torch.randn(2, 4), torch.randn(2, V), torch.tensor([3, -100])
    head = (torch.randn(V, 4), None)
    for call in (
        lambda: ours.selective_log_softmax(logits, index),
        lambda: ours.selective_log_softmax(logits, index[:, None]),
        lambda: ours.selective_log_softmax_and_entropy(logits, index),
        lambda: ours.ChunkedLogProbs.apply(hidden, *head, index, 1.0, 64),
    ):
        with pytest.raises(IndexError, match=r"(index|target)\[1.*\] is -100"):
            call()


def test_entropy() -> None:
    logits, index = torch.randn(*SHAPE, V, requires_grad=True), torch.randint(V, SHAPE)
    results = [module.entropy_from_logits(logits) for module in (theirs, ours)]
    torch.testing.assert_close(results[1], results[0])
    gradients = [torch.autograd.grad(x.sum(), logits)[0] for x in results]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)
    both = [
        module.selective_log_softmax_and_entropy(logits, index, False, 0.7, index > 9)
        for module in (theirs, ours)
    ]
    torch.testing.assert_close(both[1], both[0])
    assert not both[1][1].requires_grad
    banned = logits.detach().clone()
    banned[..., 5:] = -torch.inf
    assert ours.entropy_from_logits(banned).isfinite().all()


@pytest.mark.parametrize("beta", [0, 0.25, 0.5, 1])
@pytest.mark.parametrize("labels", [False, True], ids=["", "labels"])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "items", "tensor of items"])
def test_generalized_jsd(reduction: str, labels: bool, beta: float) -> None:
    gkd = pytest.importorskip("trl.experimental.gkd")
    student = torch.randn(*SHAPE, V, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(*SHAPE, V, dtype=torch.float64)
    options: dict[str, Any] = {"beta": beta, "temperature": 1.5, "reduction": reduction}
    if "items" in reduction:
        items = torch.tensor([11]) if "tensor" in reduction else 11
        options.update(reduction="batchmean", num_items_in_batch=items)
    if labels:
        options["labels"] = torch.randint(V, SHAPE).masked_fill(torch.rand(SHAPE) < 0.4, -100)
    expected = gkd.GKDTrainer.generalized_jsd_loss(student, teacher, **options).squeeze()
    got = ours.generalized_jsd_loss(student, teacher, **options)
    torch.testing.assert_close(got, expected)
    want, grad = (torch.autograd.grad(x, student)[0] for x in (expected, got))
    torch.testing.assert_close(grad, want)
    with pytest.raises(ValueError, match=r"generalized_jsd_loss: reduction must be .* got 'none'"):
        ours.generalized_jsd_loss(student, teacher, reduction="none")


SELECTIVE_MASK = "selective_log_softmax: row_mask"


def test_errors_name_what_was_passed() -> None:
    logits, index = torch.randn(*SHAPE, V), torch.randint(V, SHAPE)
    several, row = torch.randint(V, (*SHAPE, 2)), torch.ones(1, SHAPE[1], 1)
    for call, text in (
        (lambda: ours.selective_log_softmax(logits, index[:1]), "selective_log_softmax: index"),
        (
            lambda: ours.selective_log_softmax_and_entropy(logits, index, row_mask=index[:1]),
            "selective_log_softmax_and_entropy: row_mask",
        ),
        (lambda: ours.generalized_jsd_loss(logits, logits, index[:1]), "generalized_jsd_loss: lab"),
        (lambda: ours.selective_log_softmax(logits, several, row_mask=logits), SELECTIVE_MASK),
        # It broadcasts: to as many ids as the row has tokens.
        (lambda: ours.selective_log_softmax(logits[:1], index[:1], row_mask=row), SELECTIVE_MASK),
        (lambda: ours.entropy_from_logits(torch.tensor(1.0)), "entropy_from_logits: logits"),
    ):
        with pytest.raises(ValueError, match=f"^{text}.* must have shape"):
            call()
    with pytest.raises(ValueError, match=r"^generalized_jsd_loss: num_items_in_batch must have"):
        ours.generalized_jsd_loss(logits, logits, num_items_in_batch=torch.ones(2))
    for call, text in (
        (lambda: ours.selective_log_softmax(logits, index, row_mask=[1]), SELECTIVE_MASK),
        (lambda: ours.selective_log_softmax(logits, several / 2, row_mask=several), "sel.*: index"),
        (lambda: ours.entropy_from_logits([1.0]), "entropy_from_logits: logits"),
        (lambda: ours.generalized_jsd_loss(logits, logits, [1]), "generalized_jsd_loss: labels"),
    ):
        with pytest.raises(TypeError, match=f"^{text} must be"):
            call()


OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.mark.parametrize(
    "outputs",
    [(), OUTPUTS[:1], OUTPUTS[1:2], OUTPUTS[:2], (OUTPUTS[0], *OUTPUTS[3:]), OUTPUTS],
    ids=str,
)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_chunked_log_probs(
    softcap: float | None, outputs: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours takes 16 tokens at a time."""
    kernels = pytest.importorskip("trl.kernels")
    monkeypatch.setitem(linear_chunks._CHUNK_BYTES, "cpu", 16 * V * 4)
    logits, chunks = linear_chunks.Source.logits, list[slice]()
    monkeypatch.setattr(
        linear_chunks.Source, "logits", lambda *args: chunks.append(args[1]) or logits(*args)
    )
    hidden, weight, bias = torch.randn(40, 16), torch.randn(V, 16), torch.randn(V)
    target = torch.randint(V, (40,))
    results: list[list[Tensor | None]] = []
    for function in (kernels.ChunkedLogProbFunction, ours.ChunkedLogProbs):
        inputs = [copy.deepcopy(x).requires_grad_() for x in (hidden, weight, bias)]
        found = function.apply(*inputs, target, 0.8, 64, softcap, 0.5, outputs)
        loss = found[0].sum() + (found[1].square().sum() if found[1] is not None else 0)
        loss.backward()
        results.append([*found, *(x.grad for x in inputs)])
    assert chunks == 2 * [slice(0, 16), slice(16, 32), slice(32, 40)]  # forward and backward
    for got, expected in zip(results[1], results[0], strict=True):
        if expected is None:
            assert got is None
        else:
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
