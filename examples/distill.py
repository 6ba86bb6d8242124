# SPDX-License-Identifier: BSD-3-Clause
"""A model of half the width learns from the demo's model, instead of from the text alone.

The teacher is the demo's model (train_minimind.py), trained with masked_loss. Students of half its
width see the same batches in the same order, and differ in their loss only: the labels' cross
entropy, the KL divergence of the student from the teacher, or the Jensen-Shannon divergence of the
two. All are means over real tokens: what the teacher makes of padding is not read.

    python examples/distill.py [--data my.jsonl] [--steps N] [--out picture.png]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import docstrings
import torch
import torch.nn.functional as F
from minimind import Config, MiniMind
from torch import Tensor
from tqdm import tqdm
from train_minimind import Options, batches, learning_rate

from masked_loss import masked_cross_entropy, masked_divergence


def from_labels(student: Tensor, teacher: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """The teacher is not asked."""
    return masked_cross_entropy(student, tokens, mask, shift=True)


def by_kl(student: Tensor, teacher: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """KL(teacher || student): the student has to cover all that the teacher believes possible."""
    return masked_divergence(student, teacher, mask, shift=True)


def by_jsd(student: Tensor, teacher: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Their distances from the mixture of both: never above log 2, however far apart they are."""
    return masked_divergence(student, teacher, mask, kind="jsd", beta=0.5, shift=True)


Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
LOSSES: dict[str, Loss] = {"labels": from_labels, "KL": by_kl, "JSD": by_jsd}


@dataclass
class Run:
    """step -> what was measured on documents that no model has seen."""

    loss: dict[int, float] = field(default_factory=dict)  # per real token
    divergence: dict[int, float] = field(
        default_factory=dict
    )  # KL from the teacher, per real token


@torch.no_grad()
def validate(
    model: MiniMind, teacher: MiniMind, documents: list[list[int]], options: Options
) -> tuple[float, float]:
    """Loss and KL from the teacher, per real token, written plainly."""
    loss = divergence = 0.0
    count = 0
    for start in range(0, min(len(documents), options.valid_documents), options.valid_batch):
        chunk = documents[start : start + options.valid_batch]
        tokens, mask = docstrings.pad(chunk, min(options.max_len, max(map(len, chunk))))
        real = mask[:, 1:]
        q, p = (m(tokens)[:, :-1][real].log_softmax(-1) for m in (model, teacher))
        loss += F.nll_loss(q, tokens[:, 1:][real], reduction="sum").item()
        divergence += F.kl_div(q, p, reduction="sum", log_target=True).item()
        count += int(real.sum())
    return loss / count, divergence / count


def train(
    name: str, model: MiniMind, teacher: MiniMind | None, data: docstrings.Data, options: Options
) -> Run:
    """Trains ``model`` by the loss of this name. Without a teacher it is the teacher."""
    run, every = Run(), max(1, options.steps // 10)
    optimizer = torch.optim.AdamW(model.parameters())
    stream = batches(data.train, options)
    for step in tqdm(range(1, options.steps + 1), desc=f"{name:>12}", unit="step"):
        tokens, mask = next(stream)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        logits = model(tokens)
        with torch.no_grad():
            target = logits if teacher is None else teacher(tokens)
        loss = LOSSES[name](logits, target, tokens, mask)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        optimizer.step()
        if teacher is not None and (step % every == 0 or step == options.steps):
            run.loss[step], run.divergence[step] = validate(model, teacher, data.valid, options)
    return run


def make_model(data: docstrings.Data, width: int, options: Options) -> MiniMind:
    torch.manual_seed(options.seed)
    return MiniMind(Config(vocab_size=data.vocab_size, dim=width, max_len=options.max_len))


def distill(data: docstrings.Data, options: Options) -> tuple[float, dict[str, Run]]:
    """The teacher's validation loss, and a student's run for each loss."""
    teacher = make_model(data, Config.dim, options)
    train("labels", teacher, None, data, replace(options, steps=2 * options.steps))
    students = {
        name: train(name, make_model(data, Config.dim // 2, options), teacher, data, options)
        for name in LOSSES
    }
    return validate(teacher, teacher, data.valid, options)[0], students


def draw(teacher: float, students: dict[str, Run], out: Path) -> None:
    """Left, how well they predict the text; right, how close they are to the teacher."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {"labels": "#8a8f98", "KL": "#0d3b66", "JSD": "#ffb300"}
    figure, (loss, divergence) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name, run in students.items():
        loss.plot(list(run.loss), list(run.loss.values()), label=name, color=colours[name])
        divergence.plot(
            list(run.divergence), list(run.divergence.values()), label=name, color=colours[name]
        )
    loss.axhline(teacher, color="black", linestyle=":", label="the teacher")
    loss.set_title("Validation loss, nats per real token", loc="left")
    divergence.set_title("KL(teacher ‖ student), nats per real token", loc="left")
    for axes in (loss, divergence):
        axes.set_xlabel("training step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    loss.legend(frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def table(teacher: float, students: dict[str, Run]) -> str:
    rows = [("student learns from", "validation loss", "KL from the teacher")]
    for name, run in students.items():
        last = max(run.loss)
        rows.append((name, f"{run.loss[last]:.4f}", f"{run.divergence[last]:.4f}"))
    rows.append(("(the teacher)", f"{teacher:.4f}", "0"))
    return "\n".join(f"{a:<20}{b:>17}{c:>21}" for a, b, c in rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="a .txt or .jsonl of your own")
    parser.add_argument(
        "--steps", type=int, default=Options.steps, help="the teacher takes twice as many"
    )
    parser.add_argument("--batch", type=int, default=Options.batch, help="sequences per step")
    parser.add_argument("--max-len", type=int, default=Options.max_len, help="tokens per sequence")
    parser.add_argument("--out", type=Path, default=Path("demo/distill.png"))
    given = parser.parse_args(arguments)
    options = Options(given.steps, given.batch, given.max_len)

    data = docstrings.load(given.data, Config.vocab_size)
    teacher, students = distill(data, options)
    print(f"\n{table(teacher, students)}\n")
    draw(teacher, students, given.out)
    given.out.with_suffix(".json").write_text(
        json.dumps({name: asdict(run) for name, run in students.items()}, indent=1)
    )
    print(f"Curves: {given.out}   numbers: {given.out.with_suffix('.json')}")


if __name__ == "__main__":
    main()
