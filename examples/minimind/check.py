# SPDX-License-Identifier: BSD-3-Clause
"""Trains MiniMind's own model with its stock loss and with masked_loss, and compares.

Each run is a process of its own, so that peak memory is its own: the same seed, the same batches of
Python docstrings, MiniMind's recipe (AdamW, cosine, clipping). Exits with 1 if a loss differs by
more than the tolerance.

    python examples/minimind/check.py ../minimind [--hidden 256 --layers 2 --batch 8 --steps 10]

With --trainer, MiniMind's own scripts run instead, tiny, as they are and as apply.py changes them
(trainers.py):

    python examples/minimind/check.py ../minimind --trainer dpo --trainer grpo
    python examples/minimind/check.py ../minimind --trainer all --steps 4
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent


def batches(args: argparse.Namespace) -> list[tuple[Tensor, Tensor]]:
    """Padded batches as MiniMind's PretrainDataset makes them: labels of padding are -100."""
    sys.path.insert(0, str(HERE.parent))
    import docstrings

    documents = docstrings.load(None, args.vocab).train
    result = []
    for step in range(args.steps):
        chosen = documents[step * args.batch : (step + 1) * args.batch]
        tokens, mask = docstrings.pad(chosen, args.max_len)
        result.append((tokens, tokens.masked_fill(~mask, -100)))
    return result


def peak_mib() -> float:
    """Peak allocated memory of the GPU, or peak resident memory of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 2**10


def train(args: argparse.Namespace) -> dict[str, object]:
    """One run, in this process."""
    data = batches(args)
    sys.path.insert(0, str(args.checkout))
    from model.model_minimind import MiniMindConfig, MiniMindForCausalLM

    if args.threads:
        torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(42)
    config = MiniMindConfig(
        hidden_size=args.hidden, num_hidden_layers=args.layers, vocab_size=args.vocab
    )
    model = MiniMindForCausalLM(config).to(device).train()
    if args.run == "masked_loss":
        import masked_loss

        model = masked_loss.fuse_linear_loss(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    losses, seconds = [], []
    for step, (ids, labels) in enumerate(data):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * step / args.steps)))
        ids, labels = ids.to(device), labels.to(device)
        start = time.perf_counter()
        output = model(ids, labels=labels)
        (output.loss + output.aux_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(output.loss.item())
        seconds.append(time.perf_counter() - start)
        del output
    active = sum(int((labels[:, 1:] != -100).sum()) for _, labels in data)
    total = sum(labels[:, 1:].numel() for _, labels in data)
    return {
        "losses": losses,
        "seconds": seconds,
        "peak": peak_mib(),
        "active": active / total,
    }


def apart(args: argparse.Namespace, run: str) -> dict[str, list[float]]:
    """The run in a fresh process."""
    command = [sys.executable, __file__, *sys.argv[1:], "--run", run]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, list[float]] = json.loads(output.splitlines()[-1])
    return result


def report(stock: dict[str, Any], fused: dict[str, Any]) -> float:
    """Prints the runs side by side; the largest difference of a loss."""
    pairs = list(zip(stock["losses"], fused["losses"], strict=True))
    print(f"{'step':<6}{'stock':>12}{'masked_loss':>14}")
    for step, (a, b) in enumerate(pairs, start=1):
        print(f"{step:<6}{a:>12.5f}{b:>14.5f}")
    times = [1e3 * statistics.median(r["seconds"]) for r in (stock, fused)]
    print(f"{'ms':<6}{times[0]:>12.0f}{times[1]:>14.0f}   {times[0] / times[1]:.2f} times as fast")
    less = stock["peak"] - fused["peak"]
    print(f"{'MiB':<6}{stock['peak']:>12.0f}{fused['peak']:>14.0f}   {less:.0f} less")
    return max(abs(a - b) for a, b in pairs)


def check_trainers(args: argparse.Namespace) -> int:
    sys.path.insert(0, str(HERE))
    import trainers

    status = 0
    for name in trainers.TRAINERS if "all" in args.trainer else args.trainer:
        print(f"train_{name}.py")
        results = trainers.compare(args.checkout, name, args.steps, min(args.batch, 2))
        difference = report(*results)
        print(f"losses differ by {difference:.1e}\n")
        status |= difference > args.tolerance
    return status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkout", type=Path, help="a checkout of MiniMind")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max-len", type=int, default=340)
    parser.add_argument("--vocab", type=int, default=6400)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--threads", type=int, default=0, help="0: PyTorch's choice")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--run", choices=("stock", "masked_loss"), help="only this one, as JSON")
    parser.add_argument(
        "--trainer",
        action="append",
        choices=("all", "dpo", "grpo", "ppo", "agent", "distillation"),
        help="run train_NAME.py",
    )
    args = parser.parse_args()
    if not (args.checkout / "model" / "model_minimind.py").exists():
        parser.error(f"{args.checkout} has no model/model_minimind.py: not a checkout of MiniMind")
    if args.run:
        print(json.dumps(train(args)))
        return 0

    if args.trainer:
        return check_trainers(args)
    stock, fused = apart(args, "stock"), apart(args, "masked_loss")
    difference = report(stock, fused)
    logits = 2 * 4 * args.batch * args.max_len * args.vocab / 2**20
    print(f"logits and their gradient are {logits:.0f} MiB")
    print(f"{100 * stock['active']:.0f} % of the tokens count; losses differ by {difference:.1e}")
    return int(difference > args.tolerance)


if __name__ == "__main__":
    raise SystemExit(main())
