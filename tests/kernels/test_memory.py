# SPDX-License-Identifier: BSD-3-Clause
"""The kept memory of large gradients: used again when it is idle, and never before."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import subprocess
import sys
import threading

import pytest
import torch

import masked_loss
from masked_loss import masked_cross_entropy
from masked_loss._op import memory

ROWS, COLS = 1024, memory.logits_pool._at_least // 4096  # float32: exactly large enough to be kept


def gradient(seed: int, cols: int = COLS) -> torch.Tensor:
    torch.manual_seed(seed)
    logits = torch.randn(ROWS, cols, requires_grad=True)
    masked_cross_entropy(logits, torch.arange(ROWS) % cols).backward()
    assert logits.grad is not None
    return logits.grad


@pytest.fixture(autouse=True)
def _forget():
    masked_loss.empty_cache()
    yield
    masked_loss.empty_cache()


def test_an_idle_block_is_used_again():
    address = gradient(0).data_ptr()
    assert gradient(1).data_ptr() == address


@pytest.mark.parametrize(
    "keep",
    [
        lambda g: g,
        lambda g: g.view(-1)[5:],
        lambda g: g.detach(),
        lambda g: g.untyped_storage(),
        lambda g: g.numpy(),
    ],
    ids=["tensor", "view", "detached", "storage", "numpy"],
)
def test_a_gradient_that_somebody_holds_stays_as_it_is(keep):
    first = gradient(0)
    truth, address = first.clone(), first.data_ptr()
    held = keep(first)
    del first
    second = gradient(1)
    assert second.data_ptr() != address
    if isinstance(held, torch.UntypedStorage):
        held = torch.empty(0).set_(held)  # as_tensor would read it byte by byte, for minutes
    tensor = torch.as_tensor(held)
    assert torch.equal(tensor.reshape(-1), truth.reshape(-1)[-tensor.numel() :])


def test_a_weights_gradient_has_memory_of_its_own():
    def weight_gradient(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        hidden, weight = torch.randn(8, 64), torch.randn(1 << 15, 64, requires_grad=True)
        masked_loss.linear_cross_entropy(hidden, weight, torch.arange(8)).backward()
        assert weight.grad is not None
        return weight.grad

    first = weight_gradient(0)
    truth, address = first.clone(), first.data_ptr()
    assert weight_gradient(1).data_ptr() != address
    assert torch.equal(first, truth)
    del first
    second = weight_gradient(2)
    address = second.data_ptr()
    del second
    assert weight_gradient(3).data_ptr() == address


def test_masked_rows_of_used_memory_are_zeros():
    """The block still holds the last gradient: what of it is not written would show.

    Rows neither begin nor end where cache lines do.
    """
    cols = COLS + 3
    address = gradient(0, cols).data_ptr()
    logits = torch.randn(ROWS, cols, requires_grad=True)
    mask = torch.arange(ROWS) % 3 == 0
    masked_cross_entropy(logits, torch.zeros(ROWS, dtype=torch.int64), mask).backward()
    assert logits.grad.data_ptr() == address
    assert (logits.grad[~mask] == 0).all()
    assert (logits.grad[mask] != 0).any(dim=1).all()


def test_a_system_without_huge_pages(monkeypatch):
    class Mmap(mmap.mmap):
        def madvise(self, *_):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(memory.mmap, "mmap", Mmap)
    assert gradient(0).isfinite().all()


def test_several_losses_in_one_graph_have_a_gradient_each():
    torch.manual_seed(0)
    logits = [torch.randn(ROWS, COLS, requires_grad=True) for _ in range(2)]
    target = torch.arange(ROWS) % COLS
    sum(masked_cross_entropy(x, target) for x in logits).backward()
    alone = [x.detach().clone().requires_grad_() for x in logits]
    for x in alone:
        masked_cross_entropy(x, target).backward()
    for together, separate in zip(logits, alone, strict=True):
        assert torch.equal(together.grad, separate.grad)


def test_threads_do_not_share_a_block():
    truth = {seed: gradient(seed).clone() for seed in range(3)}
    results: dict[int, torch.Tensor] = {}
    inputs = {}
    for seed in range(3):
        torch.manual_seed(seed)
        inputs[seed] = torch.randn(ROWS, COLS, requires_grad=True)

    def work(seed: int) -> None:
        masked_cross_entropy(inputs[seed], torch.arange(ROWS) % COLS).backward()
        results[seed] = inputs[seed].grad

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(3):
        assert torch.equal(results[seed], truth[seed])


def test_nothing_is_kept_where_the_environment_says_so():
    script = """
import gc, torch, masked_loss
hidden, weight = torch.randn(300, 64), torch.randn(1 << 15, 64, requires_grad=True)
masked_loss.linear_cross_entropy(hidden, weight, torch.arange(300)).backward()
assert weight.grad is not None and weight.grad.any()
weight.grad = None
gc.collect()
from masked_loss._op.memory import logits_pool, weight_pool
print(logits_pool._block is weight_pool._block is None)
"""
    for keeps in ("0", "1"):
        environment = {**os.environ, "MASKED_LOSS_KEEP_MEMORY": keeps}
        run = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True
        )
        assert run.stdout.strip() == str(keeps == "0"), run.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_does_not_write_into_its_parents_gradient():
    first = gradient(0)
    truth = first.clone()
    child = os.fork()
    if child == 0:
        # Not by fill_: it would wait for the threads of PyTorch's pool, which fork leaves behind.
        ctypes.memset(first.data_ptr(), 7, first.nbytes)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert torch.equal(first, truth)
