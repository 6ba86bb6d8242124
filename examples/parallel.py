# SPDX-License-Identifier: BSD-3-Clause
"""The demo's model on four ranks, as 2 x 2: halves of every batch, halves of every matrix.

Along `data` the ranks have different sequences, and FSDP averages their gradients: one normalizer
for all of them makes that the gradient of all tokens. Along `tensor` they have halves of each
block's matrices and of the vocabulary, whose table is the embedding and the head at once. The
logits exist nowhere: each rank multiplies the hidden states with its half of the head, a chunk at a
time, and three numbers a token say what the other half is.

Rank 0 trains the same model alone before, on the whole batches. The losses are equal to rounding,
step for step. In float64, where a mistake cannot pass for rounding.

    torchrun --nproc-per-node 4 examples/parallel.py [--steps N]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import docstrings
import torch
import torch.distributed as dist
from minimind import Config, MiniMind
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from masked_loss import global_normalizer, linear_cross_entropy

BATCH, LENGTH = 8, 48
PLAN = {
    "embed": RowwiseParallel(input_layouts=Replicate()),  # rows of the table are classes
    "blocks.*.attention.q": ColwiseParallel(),
    "blocks.*.attention.k": ColwiseParallel(),
    "blocks.*.attention.v": ColwiseParallel(),
    "blocks.*.attention.out": RowwiseParallel(),
    "blocks.*.mlp.gate": ColwiseParallel(),
    "blocks.*.mlp.up": ColwiseParallel(),
    "blocks.*.mlp.down": RowwiseParallel(),
}


class WithLoss(nn.Module):
    """A model whose forward ends with the loss, while FSDP still holds the head's weight."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.model = MiniMind(config)

    def forward(self, tokens: Tensor, mask: Tensor, normalizer: Tensor) -> Tensor:
        hidden, head = self.model.hidden(tokens), self.model.embed.weight
        if isinstance(head, DTensor):  # of which this rank has some rows, and all hidden states
            hidden = DTensor.from_local(hidden, head.device_mesh, [Replicate()])
        loss = linear_cross_entropy(hidden, head, tokens, mask, normalizer=normalizer, shift=True)
        return loss.to_local().clone() if isinstance(loss, DTensor) else loss


def make_model() -> tuple[WithLoss, int]:
    """The same on every rank; a byte is a token, and the vocabulary no multiple of two."""
    torch.manual_seed(0)
    config = Config(vocab_size=259, dim=48, layers=2, heads=4, kv_heads=2, max_len=LENGTH)
    return WithLoss(config), config.vocab_size


def make_batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    """Docstrings of torch.nn.functional, of every length, padded."""
    source = Path(torch.nn.functional.__file__).read_bytes()
    documents = [[b + 3 for b in text.encode()] for text in docstrings.docstrings_in(source)]
    documents = sorted(documents) * (1 + steps * BATCH // len(documents))
    rows = (documents[i * BATCH : (i + 1) * BATCH] for i in range(steps))
    return [docstrings.pad(batch, LENGTH) for batch in rows]


def parallelized(model: WithLoss, mesh: DeviceMesh) -> WithLoss:
    parallelize_module(model.model, mesh["tensor"], PLAN)
    for block in model.model.blocks:
        block.attention.heads //= mesh["tensor"].size()  # this rank's
        block.attention.kv_heads //= mesh["tensor"].size()
        fully_shard(block, mesh=mesh["data"])
    return fully_shard(model, mesh=mesh["data"])


def train(batches: list[tuple[Tensor, Tensor]], mesh: DeviceMesh | None = None) -> list[float]:
    """The loss of each step; of a mesh, the mean over its ranks."""
    model, _ = make_model()
    group, part = None, slice(None)
    if mesh is not None:
        model = parallelized(model, mesh)
        group, rank = mesh.get_group("data"), mesh.get_local_rank("data")
        share = BATCH // mesh["data"].size()
        part = slice(rank * share, (rank + 1) * share)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for tokens, mask in batches:
        if mesh is None:
            normalizer = mask[:, 1:].sum()
        else:
            normalizer = global_normalizer(tokens[part], mask[part], shift=True, group=group)
        loss = model(tokens[part], mask[part], normalizer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        whole = loss.detach().clone()
        if mesh is not None:
            dist.all_reduce(whole, group=group)
            whole /= mesh["data"].size()
        losses.append(whole.item())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=30)
    batches = make_batches(parser.parse_args().steps)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    alone = train(batches) if dist.get_rank() == 0 else []
    losses = train(batches, mesh)
    if dist.get_rank() == 0:
        print(f"{'step':>4} {'one process':>14} {'2 x 2 ranks':>14} {'difference':>11}")
        for step, (one, four) in enumerate(zip(alone, losses, strict=True)):
            print(f"{step:>4} {one:>14.10f} {four:>14.10f} {abs(one - four):>11.1e}")
        worst = max(abs(one - four) for one, four in zip(alone, losses, strict=True))
        if not worst < 1e-9:
            raise SystemExit(f"parallel: expected equal losses to rounding, got {worst:.1e} apart")
        print(f"largest difference: {worst:.1e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
