# SPDX-License-Identifier: BSD-3-Clause
"""Runs MiniMind's own trainers as they are and as apply.py changes them, and compares.

    python examples/minimind/check.py ../minimind --trainer dpo --trainer grpo    # or: all

The checkout is copied, and apply.py changes one of two copies. Each run is a process of its own,
with the same tiny weights and the same text: Python's docstrings as conversations. What is not at
hand is stood in for: the reward model by a score of the text. A loss is what backward is called on.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
HIDDEN, LAYERS = 64, 2
TINY = ["--epochs", "1", "--device", "cpu", "--num_workers", "0", "--log_interval", "1"]
SIZES = ["--hidden_size", str(HIDDEN), "--num_hidden_layers", str(LAYERS)]
ROLLOUT = [*SIZES, "--max_seq_len", "64", "--max_gen_len", "24", "--thinking_ratio", "0"]


def chat(document: str) -> list[dict[str, str]]:
    """A question and an answer: the first line of a docstring, and the rest."""
    first, _, rest = document.partition("\n")
    fields = {"reasoning_content": "", "tools": "", "tool_calls": ""}
    return [
        {"role": "user", "content": first, **fields},
        {"role": "assistant", "content": rest.strip() or first, **fields},
    ]


def preferred(document: str) -> dict[str, Any]:
    """The answer, and one whose words are in another order."""
    question, answer = chat(document)
    words = answer["content"].split()
    random.Random(len(words)).shuffle(words)
    return {
        "chosen": [question, answer],
        "rejected": [question, {**answer, "content": " ".join(words)}],
    }


def agent(document: str) -> dict[str, Any]:
    plain = [{key: m[key] for key in ("role", "content")} for m in chat(document)]
    return {"conversations": plain, "gt": []}


def conversations(document: str) -> dict[str, Any]:
    return {"conversations": chat(document)}


# For each trainer: its arguments, and a line of its data.
TRAINERS: dict[str, tuple[list[str], Callable[[str], dict[str, Any]]]] = {
    "dpo": ([*SIZES, "--max_seq_len", "128", "--learning_rate", "1e-3"], preferred),
    "grpo": ([*ROLLOUT, "--num_generations", "3", "--learning_rate", "1e-3"], conversations),
    "ppo": ([*ROLLOUT, "--learning_rate", "1e-3"], conversations),
    "agent": ([*ROLLOUT, "--num_generations", "2", "--learning_rate", "1e-3"], agent),
    "distillation": (
        [
            *("--student_hidden_size", str(HIDDEN), "--student_num_layers", "1"),
            *("--teacher_hidden_size", str(HIDDEN), "--teacher_num_layers", str(LAYERS)),
            *("--teacher_use_moe", "0", "--max_seq_len", "128", "--learning_rate", "1e-3"),
        ],
        conversations,
    ),
}


class Reward:
    """Stands in for the reward model: a score of the text, the same in every run."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def get_score(self, messages: Any, response: str) -> float:
        return hashlib.sha256(response.encode()).digest()[0] / 64 - 2


def arguments(name: str, batch: int) -> list[str]:
    weights = ["--from_weight", "base"]
    if name == "distillation":
        weights = ["--from_student_weight", "base", "--from_teacher_weight", "base"]
    own = TRAINERS[name][0]
    return [*TINY, *own, *weights, "--batch_size", str(batch), "--data_path", f"{name}.jsonl"]


def prepare(checkout: Path, name: str, steps: int, batch: int) -> None:
    """Writes the trainer's data and the weights that it starts from."""
    sys.path[:0] = [str(checkout), str(HERE.parent)]
    import docstrings
    from model.model_minimind import MiniMindConfig, MiniMindForCausalLM

    documents = [d for d in docstrings.stdlib_docstrings() if 200 < len(d) < 800 and d.isascii()]
    random.Random(0).shuffle(documents)
    lines = [json.dumps(TRAINERS[name][1](d)) for d in documents[: steps * batch]]
    (checkout / "trainer" / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (checkout / "out").mkdir(exist_ok=True)
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=HIDDEN, num_hidden_layers=LAYERS))
    torch.save(model.state_dict(), checkout / "out" / f"base_{HIDDEN}.pth")


def run(checkout: Path, name: str, batch: int) -> dict[str, Any]:
    """One trainer from its first line to its last, in this process."""
    from check import peak_mib

    os.chdir(checkout / "trainer")
    sys.path.insert(0, str(checkout))
    import trainer.trainer_utils

    trainer.trainer_utils.LMForRewardModel = Reward
    losses: list[float] = []
    times: list[float] = []
    backward = torch.Tensor.backward

    def recorded(loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        losses.append(loss.item())
        backward(loss, *args, **kwargs)
        times.append(time.perf_counter())

    torch.Tensor.backward = recorded  # type: ignore[method-assign]
    script = f"train_{name}.py"
    sys.argv = [script, *arguments(name, batch)]
    start = time.perf_counter()
    output, sys.stdout = sys.stdout, sys.stderr
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        sys.stdout = output
        torch.Tensor.backward = backward  # type: ignore[method-assign]
    seconds = [b - a for a, b in zip([start, *times], times, strict=False)][1:]
    return {"losses": losses, "seconds": seconds or [0.0], "peak": peak_mib()}


def apart(checkout: Path, *args: str) -> str:
    command = [sys.executable, __file__, str(checkout), *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout


def compare(checkout: Path, name: str, steps: int, batch: int) -> tuple[Any, Any]:
    """The results of the trainer as it is, and as it is with masked_loss."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for way in ("stock", "masked_loss"):
            copy = Path(folder) / way
            for part in ("model", "trainer", "dataset"):
                shutil.copytree(checkout / part, copy / part)
            if way == "masked_loss":
                apply = [sys.executable, str(HERE / "apply.py"), str(copy), "--write"]
                subprocess.run(apply, check=False, capture_output=True)
                changed = copy / "trainer" / f"train_{name}.py.orig"
                if not changed.exists():
                    raise RuntimeError(f"apply.py has not changed train_{name}.py")
            apart(copy, "--prepare", name, str(steps), str(batch))
            results.append(json.loads(apart(copy, "--run", name, str(batch)).splitlines()[-1]))
    return results[0], results[1]


def main() -> None:
    checkout, what, name, *numbers = sys.argv[1:]
    if what == "--prepare":
        prepare(Path(checkout), name, *map(int, numbers))
    else:
        print(json.dumps(run(Path(checkout), name, *map(int, numbers))))


if __name__ == "__main__":
    main()
