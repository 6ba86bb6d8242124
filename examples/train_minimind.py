# SPDX-License-Identifier: BSD-3-Clause
"""The story of a mask that did nothing, with a real model.

MiniMind pads its training sequences and gained a loss mask, because padding must not count. Its
loss came from `F.cross_entropy(logits, target)`, which reduces by default: one scalar, the mean
over every token, padding included. The trainer went on with `(loss * mask).sum() / mask.sum()`. But
a scalar times a mask, summed, divided by the mask's sum, is the same scalar: the mask did nothing,
nothing failed, and the model learned to predict padding (jingyaogong/minimind issue 51).

Here one model is trained from one seed on the same batches with each of `LOSSES`: the bug, the
stock idiom done right (`reduction="none"`, then the mask, then the mean), and masked_loss, from the
logits and without ever building them. The bug reports the lowest training loss and has the highest
validation loss per real token; the others agree to rounding, step for step, and differ in time and
memory.

    python examples/train_minimind.py [--data my.jsonl] [--steps N] [--compile] [--out picture.png]
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

import docstrings
import torch
import torch.nn.functional as F
from minimind import Config, MiniMind
from torch import Tensor
from tqdm import tqdm

import masked_loss
from masked_loss.detect import detect_reduced_loss


def the_bug(model: MiniMind, tokens: Tensor, mask: Tensor) -> Tensor:
    """The mean over all tokens, then a mask that can no longer change it."""
    logits, target, mask = model(tokens)[:, :-1], tokens[:, 1:], mask[:, 1:]
    loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
    return (loss * mask).sum() / mask.sum()


def stock_idiom(model: MiniMind, tokens: Tensor, mask: Tensor) -> Tensor:
    """The repair in plain PyTorch: keep every token's loss, then mask, then reduce."""
    logits, target, mask = model(tokens)[:, :-1], tokens[:, 1:], mask[:, 1:]
    loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
    return (loss * mask.flatten()).sum() / mask.sum()


def with_masked_loss(model: MiniMind, tokens: Tensor, mask: Tensor) -> Tensor:
    """The same number in one operator; the logits of padding are not even read."""
    return masked_loss.masked_cross_entropy(model(tokens), tokens, mask, shift=True)


def without_logits(model: MiniMind, tokens: Tensor, mask: Tensor) -> Tensor:
    """The same number from the hidden states: padding does not pass through the head at all."""
    hidden, head = model.hidden(tokens), model.embed.weight
    return masked_loss.linear_cross_entropy(hidden, head, tokens, mask, shift=True)


LOSSES: dict[str, Callable[[MiniMind, Tensor, Tensor], Tensor]] = {
    "the bug": the_bug,
    "stock idiom": stock_idiom,
    "masked_loss": with_masked_loss,
    "linear": without_logits,
}


@dataclass(frozen=True)
class Options:
    """What the runs have in common."""

    steps: int = 150
    batch: int = 16
    max_len: int = 128
    lr: float = 1e-3
    clip: float = 1.0
    seed: int = 0
    valid_documents: int = 256
    valid_batch: int = 4  # small, so that validation does not set the peak memory
    compile: bool = False


@dataclass
class Run:
    """What one run leaves behind."""

    train: list[float] = field(default_factory=list)  # the loss the trainer saw, step by step
    valid: dict[int, float] = field(default_factory=dict)  # step -> loss per real token
    seconds: list[float] = field(default_factory=list)  # per step
    peak_mib: float = 0.0


def batches(documents: list[list[int]], options: Options) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless padded batches in an order that depends on the seed alone."""
    generator = torch.Generator().manual_seed(options.seed)
    queue: list[int] = []
    while True:
        while len(queue) < options.batch:
            queue += torch.randperm(len(documents), generator=generator).tolist()
        chosen, queue = queue[: options.batch], queue[options.batch :]
        yield docstrings.pad([documents[i] for i in chosen], options.max_len)


@torch.no_grad()
def validation_loss(model: MiniMind, documents: list[list[int]], options: Options) -> float:
    """Mean loss over the real tokens, written so plainly that it cannot hide a mask bug."""
    device = model.embed.weight.device
    total, count = 0.0, 0
    documents = sorted(documents[: options.valid_documents], key=len)  # alike lengths together
    for start in range(0, len(documents), options.valid_batch):
        chunk = documents[start : start + options.valid_batch]
        longest = min(options.max_len, max(map(len, chunk)))
        tokens, mask = (x.to(device) for x in docstrings.pad(chunk, longest))
        real = mask[:, 1:]
        logits, target = model(tokens)[:, :-1][real], tokens[:, 1:][real]
        total += F.cross_entropy(logits, target, reduction="sum").item()
        count += target.numel()
    return total / count


def peak_memory_mib(device: torch.device) -> float:
    """Peak allocated memory of the GPU, or peak resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")  # getrusage would count the parent's peak at the fork too
    if status.exists() and (peak := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(peak[1]) / 2**10
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def learning_rate(step: int, options: Options) -> float:
    """Half a cosine from `lr` down to a tenth of it."""
    return options.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * step / options.steps)))


def train(name: str, data: docstrings.Data, options: Options) -> Run:
    """One run. Only the loss function differs between two runs of the same options."""
    torch.manual_seed(options.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = MiniMind(Config(vocab_size=data.vocab_size, max_len=options.max_len)).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    loss_of = torch.compile(LOSSES[name], fullgraph=True) if options.compile else LOSSES[name]
    run = Run(valid={0: validation_loss(model, data.valid, options)})
    every = max(1, options.steps // 10)

    stream = batches(data.train, options)
    bar = tqdm(range(1, options.steps + 1), desc=f"{name:>12}", unit="step", leave=True)
    for step in bar:
        tokens, mask = (x.to(device) for x in next(stream))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        start = time.perf_counter()
        loss = loss_of(model, tokens, mask)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        optimizer.step()
        run.train.append(loss.item())  # also waits for the device
        run.seconds.append(time.perf_counter() - start)
        if step % every == 0 or step == options.steps:
            run.valid[step] = validation_loss(model, data.valid, options)
        bar.set_postfix(train=f"{run.train[-1]:.2f}", valid=f"{list(run.valid.values())[-1]:.2f}")
    run.peak_mib = peak_memory_mib(device)
    return run


def train_apart(name: str, data: docstrings.Data, options: Options) -> Run:
    """`train` in a fresh process, so that the peak memory is this run's own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(train, name, data, options).result()


def detected(data: docstrings.Data, options: Options) -> str:
    """What `masked_loss.detect_reduced_loss()` says at the first step of the buggy trainer."""
    model = MiniMind(Config(vocab_size=data.vocab_size, max_len=options.max_len))
    tokens, mask = next(batches(data.train, options))
    try:
        with detect_reduced_loss():
            the_bug(model, tokens, mask)
    except masked_loss.ReducedLossError as error:
        return str(error)
    return "nothing"


def largest_difference(a: Run, b: Run) -> float:
    """max over steps of the difference between two training losses."""
    return max(abs(x - y) for x, y in zip(a.train, b.train, strict=True))


def table(runs: dict[str, Run]) -> str:
    """The runs as text."""
    rows = [
        ("loss", "training loss", "validation loss", "step time", "peak memory"),
        ("", "as reported", "per real token", "median", ""),
    ]
    for name, run in runs.items():
        valid = run.valid[max(run.valid)]
        step_time = f"{1e3 * statistics.median(run.seconds):.0f} ms"
        memory = f"{run.peak_mib:.0f} MiB"
        rows.append((name, f"{run.train[-1]:.4f}", f"{valid:.4f}", step_time, memory))
    return "\n".join(f"{a:<12}" + "".join(f"{b:>17}" for b in rest) for a, *rest in rows)


def step_reaching(curve: dict[int, float], value: float) -> float:
    """The step, between two validations, at which a curve first came down to a value."""
    for (start, above), (end, below) in pairwise(sorted(curve.items())):
        if below <= value < above:
            return start + (end - start) * (above - value) / (above - below)
    return max(curve)


def draw(runs: dict[str, Run], out: Path) -> None:
    """Left, what the trainer reports; right, what the model has learned."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {
        "the bug": {"color": "#c62828", "linewidth": 2.0},
        "stock idiom": {"color": "#90caf9", "linewidth": 6.0},
        "masked_loss": {"color": "#0d3b66", "linewidth": 1.8},
        "linear": {"color": "#ffb300", "linewidth": 1.8, "linestyle": (0, (1, 4))},
    }
    figure, (reported, learned) = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for name, run in runs.items():
        window = max(1, len(run.train) // 20)  # a moving average: single batches are noisy
        smooth = torch.tensor(run.train).unfold(0, window, 1).mean(1).tolist()
        steps, valid = zip(*list(run.valid.items())[1:], strict=True)  # without the random model
        reported.plot(range(window, len(run.train) + 1), smooth, label=name, **style.get(name, {}))
        learned.plot(steps, valid, label=name, **style.get(name, {}))

    bug, right = runs["the bug"].valid, runs["masked_loss"].valid
    last = max(bug)
    early = step_reaching(right, bug[last])
    if early < last:
        arrow = {"arrowstyle": "<->", "shrinkA": 0, "shrinkB": 0}
        learned.annotate("", (early, bug[last]), (last, bug[last]), arrowprops=arrow)
        lost = f"the bug lost {last - early:.0f} of {last} steps:"
        text = f"{lost}\n+{bug[last] - right[last]:.2f} nats per real token"
        above = (last, max(loss for step, loss in bug.items() if step >= last / 2))
        learned.annotate(text, above, (0, 10), textcoords="offset points", ha="right")
    reported.set_title("What the trainer reports", loc="left")
    reported.set_ylabel("training loss (nats per token counted)")
    learned.set_title("What the model learns", loc="left")
    learned.set_ylabel("validation loss (nats per real token)")
    for name, text in (("the bug", "padding counted"), ("masked_loss", "real tokens only")):
        level = statistics.mean(runs[name].train[-last // 2 :])
        reported.annotate(text, (last, level), (0, 14), textcoords="offset points", ha="right")
    for axes in (reported, learned):
        axes.set_xlabel("training step")
        axes.set_xlim(0, last)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    learned.legend(frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="a .txt or .jsonl of your own")
    parser.add_argument("--steps", type=int, default=Options.steps)
    parser.add_argument("--batch", type=int, default=Options.batch, help="sequences per step")
    parser.add_argument("--max-len", type=int, default=Options.max_len, help="tokens per sequence")
    parser.add_argument("--compile", action="store_true", help="torch.compile model and loss")
    parser.add_argument("--out", type=Path, default=Path("demo/minimind.png"))
    given = parser.parse_args(arguments)
    options = Options(given.steps, given.batch, given.max_len, compile=given.compile)

    source = given.data or "the docstrings of the standard library"
    print(f"Reading {source} and training a BPE on them ...")
    data = docstrings.load(given.data, Config.vocab_size)
    real = sum(min(len(d), options.max_len) for d in data.train)
    print(
        f"{len(data.train)} training documents, vocabulary {data.vocab_size}, "
        f"padded to {options.max_len} tokens: {1 - real / (len(data.train) * options.max_len):.0%}"
        " of a batch is padding."
    )

    runs = {name: train_apart(name, data, options) for name in LOSSES}
    print(f"\n{table(runs)}\n")
    for name in ("masked_loss", "linear"):
        difference = largest_difference(runs["stock idiom"], runs[name])
        print(f"Largest difference from the stock idiom, any step: {difference:.1e} ({name})")
    print(
        f"\nUnder masked_loss.detect_reduced_loss() the bug ends at its first step:\n"
        f"{detected(data, options)}\n"
    )
    draw(runs, given.out)
    given.out.with_suffix(".json").write_text(
        json.dumps({name: asdict(run) for name, run in runs.items()}, indent=1)
    )
    print(f"Curves: {given.out}   numbers: {given.out.with_suffix('.json')}")


if __name__ == "__main__":
    main()
