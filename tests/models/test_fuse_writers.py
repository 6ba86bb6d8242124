# SPDX-License-Identifier: BSD-3-Clause
"""Whoever writes into a head or into hidden states: lazy logits are the old ones, or an error."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import masked_loss
from masked_loss.fuse import LazyLogits

N, D = 24, 48
CLASSES = {"whole": 37, "sampled": 211}  # 211 * 48 elements are more than are compared one by one


def step_of(kind: type[torch.optim.Optimizer], **options: object) -> Callable[[Tensor], None]:
    def step(x: Tensor) -> None:
        with torch.no_grad():
            x.grad = torch.randn_like(x)
        kind([x], lr=1e-2, **options).step()  # type: ignore[call-arg]

    return step


def through_pointer(x: Tensor) -> None:
    """As kernels of bitsandbytes, apex and DeepSpeed do, which PyTorch knows nothing of."""
    values = (ctypes.c_float * x.numel()).from_address(x.data_ptr())
    for i in range(x.numel()):
        values[i] += 0.5


class PointerOptimizer(torch.optim.Optimizer):
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                through_pointer(p)


def swapped(x: Tensor) -> None:
    """An exponential moving average takes the place of the weights."""
    x.data, _ = x.data * 0.9, x.data


def numpy_write(x: Tensor) -> None:
    x.detach().numpy()[...] *= 0.9


def one_row(x: Tensor) -> None:
    numpy_write(x[x.shape[0] // 2])


def one_column(x: Tensor) -> None:
    numpy_write(x[:, 5])


def no_grad_copy(x: Tensor) -> None:
    with torch.no_grad():
        x.copy_(torch.randn_like(x))


def averaged_back(x: Tensor) -> None:
    torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)([x.data], [torch.randn_like(x)], 0)


WRITERS: dict[str, Callable[[Tensor], None]] = {
    "SGD": step_of(torch.optim.SGD),
    "SGD, fused": step_of(torch.optim.SGD, fused=True),
    "Adam, foreach": step_of(torch.optim.Adam, foreach=True),
    "AdamW, fused": step_of(torch.optim.AdamW, fused=True),
    "Adagrad, fused": step_of(torch.optim.Adagrad, fused=True),
    "optimizer of pointers": lambda x: PointerOptimizer([x], {}).step(),
    "pointer": through_pointer,
    ".data, in place": lambda x: x.data.mul_(0.9),
    ".data.copy_": lambda x: x.data.copy_(torch.randn_like(x)),
    ".data assigned": swapped,
    "set_": lambda x: x.data.set_(torch.randn_like(x)),
    "moving average": averaged_back,
    "copy_": no_grad_copy,
    "numpy": numpy_write,
    "one row": one_row,
    "one column": one_column,
    "foreach": lambda x: torch._foreach_mul_([x.data], 0.9),
    "vector_to_parameters": lambda x: nn.utils.vector_to_parameters(torch.randn(x.numel()), [x]),
}


@pytest.mark.parametrize("ask", ["values", "loss", "below torch functions"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize(
    ("writer", "what"),
    [
        (w, x)
        for w in WRITERS
        for x in ("weight", "hidden", "bias")
        if (w[:3], x) != ("one", "bias")
    ],
)
@pytest.mark.parametrize("size", CLASSES)
def test_nobody_writes_unseen(size: str, writer: str, what: str, grad: bool, ask: str) -> None:
    classes = CLASSES[size]
    model = nn.Module()
    model.lm_head = nn.Linear(D, classes)
    masked_loss.fuse_linear_loss(model)
    rows = 150 if size == "sampled" else N
    hidden = torch.randn(rows, D).requires_grad_(grad)
    target = torch.randint(classes, (rows,))
    with torch.set_grad_enabled(grad):
        logits = model.lm_head(hidden)
    assert type(logits) is LazyLogits
    with torch.no_grad():
        truth = F.linear(hidden, model.lm_head.weight, model.lm_head.bias)
    WRITERS[writer](hidden if what == "hidden" else getattr(model.lm_head, what))
    try:
        if ask == "values":
            got, expected = logits + 0, truth
        elif ask == "loss":
            got, expected = F.cross_entropy(logits, target), F.cross_entropy(truth, target)
        else:
            with torch._C.DisableTorchFunctionSubclass():
                got, expected = logits * 1, truth
    except RuntimeError as error:
        if "hidden states or head have changed in place" not in str(error):
            raise
        return
    torch.testing.assert_close(got.detach(), expected)


@pytest.mark.parametrize("fused", [False, True])
def test_accuracy_after_the_step_is_no_other_heads(fused: bool) -> None:
    model = nn.Module()
    model.lm_head = nn.Linear(D, 64, bias=False)
    masked_loss.fuse_linear_loss(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, fused=fused)
    hidden, target = torch.randn(200, D), torch.randint(64, (200,))
    logits = model.lm_head(hidden)
    F.cross_entropy(logits, target).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="changed in place"):
        (logits.argmax(-1) == target).float().mean()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_unchanged_weights_are_never_taken_for_changed(dtype: torch.dtype) -> None:
    """NaN and infinities included, transposed weights too, and after backward."""
    for weight in (torch.randn(211, D), torch.randn(D, 211).t()):
        model = nn.Module()
        model.lm_head = nn.Linear(D, 211, bias=False, dtype=dtype)
        model.lm_head.weight = nn.Parameter(weight.to(dtype))
        with torch.no_grad():
            model.lm_head.weight[3] = torch.nan
            model.lm_head.weight[5] = torch.inf
        masked_loss.fuse_linear_loss(model)
        logits = model.lm_head(torch.randn(150, D, dtype=dtype))
        F.cross_entropy(logits, torch.randint(211, (150,))).backward()
        assert logits.isnan().any()


def below_torch_functions(logits: Tensor) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return logits * 1


@pytest.mark.parametrize(
    "ask",
    [
        lambda logits: logits.argmax(-1),
        lambda logits: F.cross_entropy(logits, torch.zeros(150, dtype=torch.long)),
        below_torch_functions,
    ],
    ids=["values", "loss", "below torch functions"],
)
@pytest.mark.parametrize("what", ["weight", "hidden", "bias"])
@pytest.mark.parametrize("size", CLASSES)
def test_freed_memory_is_not_read(size: str, what: str, ask: Callable[[Tensor], Tensor]) -> None:
    """As FSDP frees it, which no version counts. Seen here: a segmentation fault."""
    model = nn.Module()
    model.lm_head = nn.Linear(D, CLASSES[size])
    masked_loss.fuse_linear_loss(model)
    hidden = torch.randn(150, D)
    logits = model.lm_head(hidden)
    freed = hidden if what == "hidden" else getattr(model.lm_head, what)
    freed.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="were freed before the logits"):
        ask(logits)
