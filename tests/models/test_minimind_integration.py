# SPDX-License-Identifier: BSD-3-Clause
"""examples/minimind on a checkout of MiniMind's shape, with the demo's model in it.

No code of MiniMind is here: the trainers below are as short as what apply.py looks for allows.
"""

from __future__ import annotations

import argparse
import importlib
import json
import runpy
import shutil
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("tokenizers")  # for the text of examples/docstrings.py

EXAMPLES = Path(__file__).parents[2] / "examples"

MODEL = """
    from types import SimpleNamespace

    import torch
    import torch.nn.functional as F
    from demo import Config, MiniMind


    class MiniMindConfig:
        def __init__(self, hidden_size=48, num_hidden_layers=2, vocab_size=300):
            self.config = Config(vocab_size, hidden_size, num_hidden_layers, 6, 2, 64)


    class MiniMindForCausalLM(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.model = MiniMind(config.config)
            sizes = config.config.dim, config.config.vocab_size
            self.lm_head = torch.nn.Linear(*sizes, bias=False)
            self.lm_head.weight = self.model.embed.weight

        def forward(self, input_ids, labels=None):
            logits, loss = self.lm_head(self.model.hidden(input_ids)), None
            if labels is not None:
                x, y = logits[..., :-1, :].contiguous(), labels[..., 1:].contiguous()
                loss = F.cross_entropy(x.view(-1, x.size(-1)), y.view(-1), ignore_index=-100)
            return SimpleNamespace(loss=loss, logits=logits, aux_loss=torch.zeros(()))


    def init_model():
        torch.manual_seed(0)
        return MiniMindForCausalLM(MiniMindConfig()), None


    def batches():
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            ids = torch.randint(300, (4, 20), generator=generator)
            length = torch.randint(2, 20, (4, 1), generator=generator)
            yield ids, ids.masked_fill(torch.arange(20) >= length, -100)
"""
HEAD = """
    import torch
    import torch.nn.functional as F
    from model.model_minimind import batches, init_model

    def distillation_loss(student, teacher, temperature):
        target = F.softmax(teacher / temperature, dim=-1)
        logs = F.log_softmax(student / temperature, dim=-1)
        return temperature ** 2 * F.kl_div(logs, target, reduction='batchmean')


    losses = []
    model, tokenizer = init_model()
    REFERENCE
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for input_ids, labels in batches():
"""
TRAIN = """
        loss = model(input_ids, labels=labels).loss
"""
DISTIL = """
        student_logits = model(input_ids).logits[..., :-1, :].contiguous()
        shift_labels = labels[..., 1:].contiguous()
        loss_mask_flat = (shift_labels != -100).float().view(-1)
        ce_loss = F.cross_entropy(
            student_logits.view(-1, student_logits.size(-1)),
            shift_labels.view(-1),
            ignore_index=-100,
            reduction='none'
        )
        raw = torch.sum(ce_loss * loss_mask_flat) / (loss_mask_flat.sum() + 1e-8)
        teacher_logits = reference(input_ids).logits[..., :-1, :].detach().contiguous()
        distill_loss = distillation_loss(
            student_logits.view(-1, student_logits.size(-1))[loss_mask_flat == 1],
            teacher_logits.view(-1, teacher_logits.size(-1))[loss_mask_flat == 1],
            temperature=1.5
        )
        loss = 0.5 * raw + 0.5 * distill_loss
"""
POLICY = """
        policy, fixed = model(input_ids).logits, reference(input_ids).logits.detach()
        logps = [
            F.log_softmax(x[:, :-1, :], dim=-1).gather(2, input_ids[:, 1:, None])[..., 0]
            for x in (policy, fixed)
        ]
        mask = labels[:, 1:] != -100
        loss = -F.logsigmoid(0.1 * ((logps[0] - logps[1]) * mask).sum(1)).mean()
"""
FOOT = """
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
"""
TRAINERS = {
    "train_pretrain.py": TRAIN,
    "train_full_sft.py": TRAIN,
    "train_lora.py": TRAIN,
    "train_dpo.py": POLICY,
    "train_ppo.py": POLICY,
    "train_grpo.py": POLICY,
    "train_agent.py": POLICY,
    "train_distillation.py": DISTIL,
}
FUSED = {TRAIN: 1, POLICY: 2, DISTIL: 0}  # models that a trainer makes and apply.py fuses


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "model").mkdir()
    (tmp_path / "trainer").mkdir()
    (tmp_path / "model" / "model_minimind.py").write_text(textwrap.dedent(MODEL))
    shutil.copy(EXAMPLES / "minimind.py", tmp_path / "demo.py")
    for name, body in TRAINERS.items():
        source = "".join(textwrap.dedent(x) if x is HEAD else textwrap.indent(
            textwrap.dedent(x), "    ") for x in (HEAD, body, FOOT))  # fmt: skip
        made = "" if body is TRAIN else "reference, _ = init_model()"
        source = source.replace("REFERENCE", made)
        (tmp_path / "trainer" / name).write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("model", "demo"):
            del sys.modules[name]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        f"minimind_{name}", EXAMPLES / "minimind" / f"{name}.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    result: int = module.main()
    return result


def losses(checkout: Path, name: str) -> list[float]:
    result: list[float] = runpy.run_path(str(checkout / "trainer" / name))["losses"]
    return result


def test_apply_changes_the_trainers_and_not_their_losses(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    apply = script("apply")
    sources = {name: (checkout / "trainer" / name).read_text() for name in TRAINERS}
    expected = {name: losses(checkout, name) for name in TRAINERS}

    assert call(apply, monkeypatch, checkout) == 0  # shows, and writes nothing
    assert capsys.readouterr().out.count("+import masked_loss") == 8
    assert {name: (checkout / "trainer" / name).read_text() for name in TRAINERS} == sources

    assert call(apply, monkeypatch, checkout, "--write") == 0
    for name in TRAINERS:
        changed = (checkout / "trainer" / name).read_text()
        assert changed.count("masked_loss.fuse_linear_loss(") == FUSED[TRAINERS[name]]
        for loss in ("masked_cross_entropy", "masked_divergence"):
            assert changed.count(f"masked_loss.{loss}(") == ("distil" in name)
        assert losses(checkout, name) == pytest.approx(expected[name], abs=2e-5)
    distillation = (checkout / "trainer" / "train_distillation.py").read_text()
    assert "F.cross_entropy" not in distillation
    assert "= distillation_loss" not in distillation

    assert call(apply, monkeypatch, checkout, "--write") == 0
    assert capsys.readouterr().out.count("changed already") == 8
    assert call(apply, monkeypatch, checkout, "--revert") == 0
    assert {name: (checkout / "trainer" / name).read_text() for name in TRAINERS} == sources
    assert not list((checkout / "trainer").glob("*.orig"))


def test_revert_leaves_what_was_edited_since(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    apply, edited = script("apply"), checkout / "trainer" / "train_lora.py"
    assert call(apply, monkeypatch, checkout, "--write") == 0
    source = edited.read_text() + "print('done')\n"
    edited.write_text(source)
    assert call(apply, monkeypatch, checkout, "--revert") == 1
    output = capsys.readouterr()
    assert output.out.count("as it was") == 7
    assert "train_lora.py: edited since" in output.err
    assert edited.read_text() == source
    assert edited.with_name("train_lora.py.orig").exists()


def test_apply_reports_what_it_does_not_know(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkout / "trainer" / "train_lora.py").write_text("import torch\nmodel = make()\n")
    (checkout / "trainer" / "train_distillation.py").write_text("import torch\nloss = f(x)\n")
    (checkout / "trainer" / "train_full_sft.py").unlink()
    assert call(script("apply"), monkeypatch, checkout, "--write") == 1
    output = capsys.readouterr()
    assert "train_pretrain.py: changed" in output.out
    assert "train_lora.py: not changed, no `model, ... = init_model(...)`" in output.err
    assert "train_distillation.py: not changed, no `distillation_loss(" in output.err
    assert "train_full_sft.py: not there" in output.err
    with pytest.raises(SystemExit):
        call(script("apply"), monkeypatch, checkout / "model")


def test_check_compares_stock_and_fused(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check = script("check")

    def batches(args: argparse.Namespace) -> list[Any]:
        model = importlib.import_module("model.model_minimind")
        return list(model.batches())[: args.steps]

    monkeypatch.setattr(check, "batches", batches)

    def here(args: argparse.Namespace, run: str) -> Any:
        args = argparse.Namespace(**{**vars(args), "run": run})
        return json.loads(json.dumps(check.train(args)))

    monkeypatch.setattr(check, "apart", here)
    sizes = ("--hidden", 48, "--vocab", 300, "--batch", 4, "--max-len", 20, "--steps", 3)
    assert call(check, monkeypatch, checkout, *sizes) == 0
    assert "losses differ by" in capsys.readouterr().out

    def doubled(model: torch.nn.Module) -> torch.nn.Module:  # whose losses are not the stock ones
        for parameter in model.parameters():
            parameter.data.mul_(2)
        return model

    monkeypatch.setattr("masked_loss.fuse_linear_loss", doubled)
    assert call(check, monkeypatch, checkout, *sizes) == 1
