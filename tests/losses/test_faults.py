# SPDX-License-Identifier: BSD-3-Clause
"""Faults that real inputs showed in the functions, each with its kind."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import masked_loss
from masked_loss import cross_entropy, linear_cross_entropy, masked_cross_entropy, masked_reduce
from masked_loss._op import memory
from masked_loss._op.arguments import typed_error

LOGITS, TARGET = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
HIDDEN, WEIGHT = torch.zeros(2, 3, 4), torch.zeros(5, 4)


class Sub(Tensor):
    """As fastai's: everything is inherited."""


@pytest.mark.parametrize("argument", ["logits", "mask"])
def test_statistics_of_a_subclass(argument: str) -> None:
    given = {"logits": LOGITS, "target": TARGET, "mask": torch.ones(2, 3)}
    given[argument] = given[argument].as_subclass(Sub)
    loss, stats = masked_cross_entropy(**given, return_stats=True)
    assert isinstance(stats, masked_loss.LossStats)
    assert type(loss) is type(stats.tokens) is Sub
    assert stats.tokens == 6


def test_statistics_add_up() -> None:
    _, stats = masked_cross_entropy(LOGITS, TARGET, return_stats=True)
    for total in (stats + stats, sum([stats, stats])):
        assert isinstance(total, masked_loss.LossStats)
        assert [float(x) for x in total] == [2 * float(x) for x in stats]
    with pytest.raises(TypeError):
        stats + 1


def with_statistics() -> Iterator[Any]:
    """Every function that counts, called with a mask."""
    y = torch.zeros(2, 3)
    for name in ("masked_cross_entropy", "masked_divergence"):
        function = getattr(masked_loss, name)
        second = {"masked_cross_entropy": torch.zeros(2).long(), "masked_divergence": y}[name]
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            call = partial(function, y.to(dtype), second.to(dtype) if second.dim() == 2 else second)
            yield pytest.param(call, id=f"{name}-{dtype}")
    hidden, weight = torch.zeros(2, 4), torch.zeros(3, 4)
    call = partial(linear_cross_entropy, hidden, weight, torch.zeros(2).long())
    yield pytest.param(call, id="linear_cross_entropy")
    call = partial(masked_loss.linear_divergence, hidden, weight, hidden, weight)
    yield pytest.param(call, id="linear_divergence")


@pytest.mark.parametrize("call", [*with_statistics()])
def test_statistics_hold_any_count(call: Callable[..., Any]) -> None:
    """float32 would lose the second token."""
    mask = torch.tensor([1 << 24, 1])
    for reduction in ("none", "sum", "mean", "sequence_mean"):
        _, stats = call(mask, reduction=reduction, return_stats=True)
        assert all(x.dtype == torch.float64 for x in stats)
        assert int(stats.tokens) == (1 << 24) + 1


def test_moments_hold_any_count() -> None:
    _, _, count = masked_loss.masked_moments(torch.zeros(2), torch.tensor([1 << 24, 1]))
    assert int(count) == (1 << 24) + 1


@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("classes", [1000, 2049, 50_257])
def test_equal_shares_add_up(classes: int, probabilities: bool) -> None:
    """The same number, added up again and again, is rounded the same way each time."""
    logits = 0.1 * torch.randn(4, classes)
    target = torch.full((4, classes), 1 / classes) if probabilities else torch.zeros(4).long()
    for weight in (None, torch.full((classes,), 0.3)):
        wide = target.double() if probabilities else target
        truth = masked_loss.reference.cross_entropy(
            logits.double(), wide, None if weight is None else weight.double(),
            label_smoothing=0.9, reduction="none",
        )  # fmt: skip
        loss = cross_entropy(logits, target, weight, label_smoothing=0.9, reduction="none")
        torch.testing.assert_close(loss.double(), truth, rtol=2.4e-7, atol=0)  # two roundings


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", ["cross entropy", "divergence", "log-probabilities"])
def test_the_slope_of_a_softcap_has_all_its_digits(loss: str, dtype: torch.dtype) -> None:
    """Where tanh is almost 1, 1 - tanh^2 has none left."""
    target = torch.zeros(4).long()

    def call(x: Tensor, softcap: float | None) -> Tensor:
        if loss == "cross entropy":
            return masked_cross_entropy(x, target, softcap=softcap)
        if loss == "divergence":
            teacher = torch.linspace(-3, 3, 50, dtype=x.dtype).expand(4, 50)
            return masked_loss.masked_divergence(x, teacher, softcap=softcap)
        return masked_loss.token_log_probs(x, target, softcap=softcap).sum()

    u = torch.linspace(0.1, 19, 50).to(dtype)
    logits = torch.stack([u, -u, u.flip(0), u * 100]).requires_grad_()
    (gradient,) = torch.autograd.grad(call(logits, 2.0), logits)
    x = logits.detach().double()
    y = (2 * torch.tanh(x / 2)).requires_grad_()
    (of_y,) = torch.autograd.grad(call(y, None), y)
    e = torch.exp(-x.abs())
    truth = of_y * 4 * e / (1 + e) ** 2
    smallest = 1e-6 * of_y.abs().max() * e.amin(-1, keepdim=True).clamp(min=1e-30)
    roundings = 4e-6 if dtype == torch.float32 else 1e-14
    assert ((gradient - truth).abs() <= roundings * truth.abs() + smallest).all()


GOOD: dict[Callable[..., Any], tuple[Tensor, ...]] = {
    masked_cross_entropy: (LOGITS, TARGET),
    linear_cross_entropy: (HIDDEN, WEIGHT, TARGET),
    masked_loss.token_log_probs: (LOGITS, TARGET),
    masked_loss.linear_token_log_probs: (HIDDEN, WEIGHT, TARGET),
    masked_loss.masked_divergence: (LOGITS, LOGITS),
    masked_loss.linear_divergence: (HIDDEN, WEIGHT, HIDDEN, WEIGHT),
    masked_loss.topk_divergence: (LOGITS - 2, LOGITS - 2),
    masked_loss.masked_whiten: (LOGITS,),
    masked_loss.global_normalizer: (TARGET,),
}
SWITCHES = [
    (function, name)
    for function in GOOD
    for name, parameter in inspect.signature(function).parameters.items()
    if isinstance(parameter.default, bool)
]


def test_every_switch_is_known() -> None:
    public = (getattr(masked_loss, name) for name in masked_loss.__all__)
    functions = [x for x in public if inspect.isfunction(x)]
    switched = {
        x
        for x in functions
        if any(isinstance(p.default, bool) for p in inspect.signature(x).parameters.values())
    }
    assert switched == set(GOOD)


@pytest.mark.parametrize("value", [2, 1, 0, "yes", None])
@pytest.mark.parametrize(
    ("function", "name"), SWITCHES, ids=[f"{f.__name__}-{name}" for f, name in SWITCHES]
)
def test_a_bool_is_a_bool(function: Callable[..., Any], name: str, value: Any) -> None:
    text = f"{function.__name__}: {name} must be True or False, got {value!r}"
    with pytest.raises(TypeError, match=text):
        function(*GOOD[function], **{name: value})


HINTS: list[tuple[Callable[[], Any], str]] = [
    (lambda: cross_entropy(LOGITS, TARGET), "the classes are dimension 1 of input"),
    (lambda: cross_entropy(torch.zeros(4, 5), torch.zeros(4, 5).long()), r"target\.argmax\(1\)"),
    (
        lambda: masked_cross_entropy(LOGITS, TARGET, torch.ones(2, 3, 1)),
        r"got \[2, 3, 1\].*mask\.squeeze\(-1\)",
    ),
    (
        lambda: masked_cross_entropy(LOGITS.view(-1, 5), TARGET.view(-1), torch.ones(2, 3)),
        r"mask\.reshape\(\[6\]\)",
    ),
    (lambda: masked_cross_entropy(LOGITS, LOGITS.long()), r"target\.argmax\(-1\)"),
    (lambda: masked_cross_entropy(LOGITS, TARGET.view(-1)), r"target\.reshape\(\[2, 3\]\)"),
    (
        lambda: masked_reduce(torch.zeros(6), torch.ones(2, 3)),
        r"mask\.reshape\(\[6\]\)",
    ),
    (
        lambda: linear_cross_entropy(HIDDEN, WEIGHT, TARGET, torch.ones(2, 3, 1)),
        r"mask\.squeeze\(-1\)",
    ),
    (lambda: cross_entropy(LOGITS.view(-1, 5), TARGET), r"target\.reshape\(\[6\]\)"),
    (
        lambda: linear_cross_entropy(HIDDEN, WEIGHT, TARGET.new_zeros(2, 3, 5)),
        r"target\.argmax\(-1\)",
    ),
]
# By whom it is checked: operators, and functions that have none.
MASKED: list[tuple[Callable[..., Any], tuple[Tensor, ...], dict[str, Any]]] = [
    *((function, args, {}) for function, args in GOOD.items()),
    (masked_reduce, (LOGITS[..., 0],), {}),
    (masked_reduce, (LOGITS[..., 0],), {"dim": -1}),
    (masked_loss.masked_mean, (LOGITS[..., 0],), {}),
    (masked_loss.masked_moments, (LOGITS[..., 0],), {}),
]


@pytest.mark.parametrize(("call", "hint"), HINTS, ids=range(len(HINTS)))
def test_known_mistakes_get_a_hint(call: Callable[[], Any], hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        call()


@pytest.mark.parametrize(
    ("function", "args", "options"), MASKED, ids=[f"{f.__name__}-{o}" for f, _, o in MASKED]
)
def test_masks_get_a_hint_from_every_function(
    function: Callable[..., Any], args: tuple[Tensor, ...], options: dict[str, Any]
) -> None:
    tokens = (2, 3, 5) if function is masked_loss.masked_whiten else (2, 3)
    for mask, hint in (
        (torch.ones(*tokens, 1), r": the weight of each token, .*: mask\.squeeze\(-1\)$"),
        (
            torch.ones(tokens).flatten(),
            rf": flattened .*: mask\.reshape\(\[{str(tokens)[1:-1]}\]\)$",
        ),
        # Of a transposed one to reshape it would be the wrong advice.
        (torch.ones(tokens[::-1]), rf"got \[{str(tokens[::-1])[1:-1]}\]$"),
    ):
        with pytest.raises(
            ValueError, match=f"^{function.__name__}: mask must have shape .*{hint}"
        ):
            function(*args, mask=mask, **options)


def test_a_head_that_is_no_matrix_is_told_so() -> None:
    """And not by an index that is out of range, from the search for a hint."""
    for function, *args in (
        (linear_cross_entropy, TARGET),
        (masked_loss.linear_token_log_probs, TARGET),
        (masked_loss.linear_divergence, HIDDEN, WEIGHT),
    ):
        with pytest.raises(ValueError, match=r"weight must have shape \[V, 4\], got \[\]"):
            function(HIDDEN, torch.tensor(1.0), *args)


def test_errors_name_what_was_passed() -> None:
    input, target = torch.zeros(4, 5), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="cross_entropy: weight is not differentiable"):
        cross_entropy(input, target, weight=torch.ones(5, requires_grad=True))
    with pytest.raises(ValueError, match=r"cross_entropy: weight must have shape \[5\]"):
        cross_entropy(input, target, weight=torch.ones(4))
    with pytest.raises(TypeError, match=r"accumulation_dtype must be a torch.dtype, got 'float32'"):
        linear_cross_entropy(HIDDEN, WEIGHT, TARGET, accumulation_dtype="float32")  # type: ignore[call-overload]
    bounds = torch.zeros(0, dtype=torch.long)
    with pytest.raises(ValueError, match="normalizer must be on the device of log_probs"):
        masked_loss.topk_divergence(input - 2, input - 2, normalizer=torch.ones((), device="meta"))
    with pytest.raises(ValueError, match="cu_seqlens must be on the device of target"):
        masked_loss.global_normalizer(target, cu_seqlens=bounds.to("meta"))


X, T, H, W = torch.zeros(4, 5), torch.zeros(4).long(), torch.zeros(4, 3), torch.zeros(5, 3)
BAD = torch.zeros(4, 1)
IN_A_GRAPH: list[tuple[Callable[[], Any], str]] = [
    (lambda: masked_cross_entropy(X, T, BAD), "masked_cross_entropy: mask must"),
    (lambda: masked_cross_entropy(X, T, softcap=-1), "masked_cross_entropy: softcap must"),
    (lambda: cross_entropy(X, T, weight=W[:, 0].long()), "cross_entropy: weight must"),
    (lambda: cross_entropy(X.long(), T), "cross_entropy: input must"),
    (lambda: cross_entropy(X, T, weight=X[0].to("meta")), "cross_entropy: weight must .* of input"),
    (lambda: masked_reduce(X, BAD), "masked_reduce: mask must"),
    (lambda: linear_cross_entropy(H, W, T, BAD), "linear_cross_entropy: mask must"),
    (lambda: linear_cross_entropy(H, X, T), "linear_cross_entropy: weight must"),
    (lambda: masked_loss.token_log_probs(X, T, BAD), "token_log_probs: mask must"),
    (lambda: masked_cross_entropy(X, T, temperature=X[0]), "masked_cross_entropy: temperature mu"),
    (lambda: masked_loss.linear_token_log_probs(H, W, T, BAD), "linear_token_log_probs: mask must"),
    (lambda: masked_loss.masked_divergence(X, X, BAD), "masked_divergence: mask must"),
    (lambda: masked_loss.linear_divergence(H, W, H, W, BAD), "linear_divergence: mask must"),
]


@pytest.mark.parametrize(("call", "text"), IN_A_GRAPH, ids=range(len(IN_A_GRAPH)))
def test_a_compiled_graph_speaks_for_the_function(call: Callable[[], Any], text: str) -> None:
    torch._dynamo.reset()
    with pytest.raises((TypeError, ValueError), match=f"^{text}") as eager:
        call()
    # What is traced raises the error, which dynamo cites; what a fake finds is told with its name.
    cited = rf"\b{eager.type.__name__}(: |\(['\"]){text}"
    with pytest.raises(RuntimeError, match=cited):
        torch.compile(call, backend="eager", fullgraph=True)()


def test_an_operator_speaks_for_the_function() -> None:
    with pytest.raises(RuntimeError, match="masked_cross_entropy: mask"):
        torch.ops.masked_loss.cross_entropy(X.to("meta"), T.to("meta"), BAD.to("meta"))


def test_a_running_graph_speaks_for_the_function() -> None:
    """An index out of range is found when the numbers are there."""
    for call, who in (
        (lambda t: masked_cross_entropy(X, t), "masked_cross_entropy"),
        (lambda t: linear_cross_entropy(H, W, t), "linear_cross_entropy"),
        (lambda t: masked_loss.token_log_probs(X, t), "token_log_probs"),
    ):
        with pytest.raises(RuntimeError, match=rf"^IndexError: {who}: target\[0\] is 7"):
            torch.compile(call, backend="eager", fullgraph=True)(T + 7)


EMPTY: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "masked_cross_entropy": (masked_cross_entropy, (X, T)),
    "cross_entropy": (cross_entropy, (X, T)),
    "masked_reduce": (masked_reduce, (X, X)),
    "linear_cross_entropy": (linear_cross_entropy, (H, W, T)),
    "token_log_probs": (masked_loss.token_log_probs, (X, T)),
    "linear_token_log_probs": (masked_loss.linear_token_log_probs, (H, W, T)),
    "masked_divergence": (masked_loss.masked_divergence, (X, X)),
    "linear_divergence": (masked_loss.linear_divergence, (H, W, H, W)),
}


@pytest.mark.parametrize("name", EMPTY)
def test_vmap_over_no_element(name: str) -> None:
    """Is empty. So are gradients, where PyTorch can: it scales no batch of nothing by a number."""
    function, args = EMPTY[name]
    none = tuple(x.new_zeros((0, *x.shape)) for x in args)
    result = torch.func.vmap(function)(*none)
    assert result.shape == (0, *function(*args).shape)
    if not name.startswith("linear"):
        first = torch.func.grad(lambda *x: function(*x).sum())
        assert torch.func.vmap(first)(*none).shape == none[0].shape


def test_out_of_memory_is_pytorchs_error() -> None:
    """Which batch-size finders look for."""
    pool = memory.Pool(1, keeps=True)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        pool.empty((1 << 46,), torch.zeros(1))


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process")
def test_out_of_memory_of_an_operator_is_pytorchs_error() -> None:
    """What C++ allocates: copies of logits without rows, tables of tokens. Seen here: "API call
    failed at", and a line of PyTorch's."""
    code = f"""
import resource, torch, masked_loss
x = torch.zeros(1, 2).expand(1 << 40, 2)
resource.setrlimit(resource.RLIMIT_AS, ({8 << 30},) * 2)
y = torch.zeros((), dtype=torch.int64).expand(1 << 40)
for call in (
    lambda: masked_loss.masked_cross_entropy(x[:, ::2], y),
    lambda: torch.ops.masked_loss.cross_entropy(x, y),
    lambda: masked_loss.token_log_probs(x, y),
    lambda: masked_loss.masked_reduce(x[:, 0]),
    lambda: masked_loss.masked_divergence(x, x),
):
    try:
        call()
    except RuntimeError as error:
        assert "DefaultCPUAllocator: can't allocate memory" in str(error), error
    else:
        raise AssertionError("there was room")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_out_of_memory_on_cuda_keeps_its_type() -> None:
    said = RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    error = typed_error("masked_cross_entropy", said, {}, {})
    assert type(error) is torch.OutOfMemoryError
    assert error.args == said.args


def test_kept_memory_can_be_given_back() -> None:
    first = memory.logits_pool.empty((1 << 23,), torch.zeros(1))
    address = first.data_ptr()
    del first
    assert memory.logits_pool._block is not None
    masked_loss.empty_cache()
    assert memory.logits_pool._block is None
    assert address


@pytest.mark.parametrize(
    ("setting", "said"),
    [("false", "False"), ("maybe", "MASKED_LOSS_KEEP_MEMORY must be 0 or 1, got 'maybe'")],
)
def test_the_switch_for_kept_memory(setting: str, said: str) -> None:
    """What 0 and 1 do is in tests/kernels/test_memory.py."""
    code = "from masked_loss._op import memory; print(memory._KEEPS)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "MASKED_LOSS_KEEP_MEMORY": setting},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert run.stdout.strip().endswith(said)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork_while_the_memory_is_locked() -> None:
    """The lock is another thread's, which the child does not have."""
    with memory.logits_pool._lock:
        child = os.fork()
        if child == 0:
            free = memory.logits_pool._lock.acquire(timeout=2)
            os._exit(0 if free else 1)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
