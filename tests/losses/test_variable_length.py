# SPDX-License-Identifier: BSD-3-Clause
"""The same documents padded, packed and jagged: the same results and gradients, for every function.

Padded, each document is a row of its own, whose padding is masked; packed, they are one row with
cu_seqlens; jagged, they are nested tensors. Behind the last document there may be padding.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from threads import threads
from torch import Tensor

import masked_loss
from masked_loss import cu_seqlens
from masked_loss._op.jagged import _EACH_TOKEN

CLASSES, WIDTH = 7, 4
LENGTHS = [0, 1, 5, 0, 7, 1, 3]
"""Empty documents, of one token, and others."""

PADDING = {"target": -100, "mask": 0.0, "temperature": 1.0}


@dataclass
class Case:
    """A function, the arguments that tokens have, the others, and the options that it takes."""

    function: Callable[..., Any]
    tokens: tuple[str, ...]
    others: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    reductions: tuple[str, ...] = ()
    shift: bool = True
    leaves: tuple[str, ...] = ("logits",)

    def __str__(self) -> str:
        more = ",".join(f"{k}={v}" for k, v in self.options.items())
        return self.function.__name__ + (f"({more})" if more else "")


ALL = ("none", "sum", "mean", "sequence_mean")
LOGITS = ("logits", "target", "mask")
HIDDEN = ("hidden", "target", "mask")
HEAD = ("weight", "bias")
TEACHERS = ("teacher_weight",)
OF_HEAD = ("hidden", "weight", "bias")
CASES = [
    Case(
        masked_loss.masked_cross_entropy, (*LOGITS, "temperature"), (), {}, ALL, True,
        ("logits", "mask"),
    ),
    Case(
        masked_loss.masked_cross_entropy, LOGITS, ("class_weight",),
        {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0}, ALL, True, ("logits", "mask"),
    ),
    Case(
        masked_loss.linear_cross_entropy, (*HIDDEN, "temperature"), HEAD, {"z_loss": 0.1}, ALL,
        True, OF_HEAD,
    ),
    Case(masked_loss.token_log_probs, (*LOGITS, "temperature"), (), {"return_entropy": True}),
    Case(masked_loss.token_log_probs, ("logits", "target", "mask"), (), {"K": 3}),
    Case(
        masked_loss.linear_token_log_probs, HIDDEN, HEAD,
        {"return_entropy": True, "temperature": 0.7, "chunk_tokens": 4}, (), True, OF_HEAD,
    ),
    Case(
        masked_loss.masked_divergence, ("logits", "teacher_logits", "mask", "temperature"), (),
        {"kind": "jsd"}, ALL, True, ("logits", "mask"),
    ),
    Case(
        masked_loss.linear_divergence, ("hidden", "teacher_hidden", "mask"), ("weight", *TEACHERS),
        {"chunk_tokens": 4}, ALL, True, ("hidden", "weight", "mask"),
    ),
    Case(
        masked_loss.topk_divergence, ("log_probs", "teacher_log_probs", "mask"), (), {}, ALL,
        False, ("log_probs",),
    ),
    Case(masked_loss.masked_reduce, ("values", "mask"), (), {}, ALL, False, ("values", "mask")),
    Case(
        masked_loss.masked_reduce, ("values", "mask"), (), {"dim": -1}, ("sum", "mean"), False,
        ("values", "mask"),
    ),
    Case(masked_loss.masked_moments, ("values", "mask"), (), {}, (), False, ("values", "mask")),
    Case(
        masked_loss.masked_moments, ("values", "mask"), (), {"dim": -1, "correction": 0.5}, (),
        False, ("values", "mask"),
    ),
    Case(masked_loss.masked_whiten, ("values", "mask"), (), {}, (), False, ("values",)),
    Case(masked_loss.global_normalizer, ("target", "mask"), (), {}, (), True, ()),
    Case(
        masked_loss.global_normalizer, ("target", "mask"), (), {"count": "sequences"}, (), True, ()
    ),
]  # fmt: skip


def numbers(case: Case, tokens: int, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """What the documents' tokens have, one after the other, and what all of them share."""
    ids = (case.options["K"],) if "K" in case.options else ()

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(dtype)

    target = torch.randint(CLASSES, (tokens, *ids))
    target[torch.rand(target.shape) < 0.1] = -100
    x = {
        "logits": randn(tokens, CLASSES),
        "teacher_logits": randn(tokens, CLASSES),
        "hidden": randn(tokens, WIDTH),
        "teacher_hidden": randn(tokens, WIDTH + 1),
        "log_probs": randn(tokens, CLASSES).log_softmax(-1)[:, :3],
        "teacher_log_probs": randn(tokens, CLASSES).log_softmax(-1)[:, :3],
        "target": target,
        "mask": (0.5 + torch.rand(tokens).to(dtype)) * (torch.rand(tokens) < 0.7),
        "values": randn(tokens),
        "temperature": 0.5 + torch.rand(tokens).to(dtype),
        "weight": randn(CLASSES, WIDTH),
        "bias": randn(CLASSES),
        "teacher_weight": randn(CLASSES, WIDTH + 1),
        "class_weight": 0.5 + torch.rand(CLASSES).to(dtype),
    }
    given = {name: x[name] for name in (*case.tokens, *case.others)}
    return {k: v.requires_grad_(k in case.leaves) for k, v in given.items()}


def padded(name: str, x: Tensor, lengths: list[int]) -> Tensor:
    rows = x.new_full((len(lengths), max(1, *lengths), *x.shape[1:]), PADDING.get(name, 0.0))
    for row, piece in enumerate(x[: sum(lengths)].split(lengths)):
        rows = rows.index_put((torch.tensor(row), torch.arange(lengths[row])), piece)
    return rows


def jagged(name: str, x: Tensor, offsets: Tensor) -> Tensor:
    return torch.nested.nested_tensor_from_jagged(x[: int(offsets[-1])], offsets)


def packed(result: Tensor, lengths: list[int], tokens: int) -> Tensor:
    """A padded result for each token, as the packed form has it."""
    pieces = [row[:n] for row, n in zip(result, lengths, strict=True)]
    behind = result.new_zeros(tokens - sum(lengths), *result.shape[2:])
    return torch.cat([*pieces, behind])


def results(
    form: str, case: Case, x: dict[str, Any], lengths: list[int], options: dict[str, Any]
) -> list[Tensor]:
    """What a form gives, one number for each token as the packed form has them; and gradients."""
    offsets = cu_seqlens(lengths=lengths).long()
    tokens = {name: x[name] for name in case.tokens}
    others = {name: x[name] for name in case.others}
    count = len(next(iter(tokens.values())))
    more = {k: v for k, v in {**case.options, **options}.items() if k != "K"}
    if form == "padded":
        tokens = {name: padded(name, t, lengths) for name, t in tokens.items()}
    elif form == "jagged":
        tokens = {name: jagged(name, t, offsets) for name, t in tokens.items()}
    else:
        more["cu_seqlens"] = offsets
    found = case.function(**tokens, **others, **more)
    found = list(found) if isinstance(found, tuple) else [found]
    each_token = options.get("reduction", "none" if not case.reductions else "") == "none"
    if case.function in (masked_loss.masked_moments, masked_loss.global_normalizer):
        each_token = False
    if form == "jagged":
        assert [y.is_nested for y in found] == [each_token] * len(found)
    if each_token and form == "padded":
        found = [packed(y, lengths, count) for y in found]
    elif each_token and form == "jagged":
        behind = count - sum(lengths)
        found = [y.values() for y in found]
        found = [torch.cat([y, y.new_zeros(behind, *y.shape[1:])]) for y in found]
    leaves = [x[name] for name in case.leaves]
    random = torch.Generator().manual_seed(0)
    total = sum((y * torch.randn(y.shape, generator=random)).sum() for y in found)
    gradients = torch.autograd.grad(total, leaves, allow_unused=True) if leaves else ()
    zeros = (
        g if g is not None else torch.zeros_like(x) for g, x in zip(gradients, leaves, strict=True)
    )
    return [*(y.detach() for y in found), *zeros]


def assert_one_meaning(
    case: Case, lengths: list[int], behind: int, options: dict[str, Any]
) -> None:
    x = numbers(case, sum(lengths) + behind)
    theirs = results("padded", case, x, lengths, options)
    for form in ("packed", "jagged"):
        ours = results(form, case, x, lengths, options)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, msg=lambda text, f=form: f"{f}: {text}")


def options_of(case: Case) -> list[dict[str, Any]]:
    shifts = [{"shift": s} for s in (False, True)] if case.shift else [{}]
    reductions = [{"reduction": r} for r in case.reductions] or [{}]
    return [{**s, **r} for s in shifts for r in reductions]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_padded_packed_and_jagged_mean_the_same(case: Case) -> None:
    for options in options_of(case):
        assert_one_meaning(case, LENGTHS, 2, options)
        if options.get("reduction", "none") != "none":
            assert_one_meaning(case, LENGTHS, 0, {**options, "normalizer": 2.5})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_documents(case: Case) -> None:
    @settings(max_examples=8, deadline=None)
    @given(
        st.lists(st.integers(0, 6), min_size=1, max_size=6),
        st.integers(0, 3),
        st.sampled_from(options_of(case)),
        st.integers(0, 99),
    )
    def check(lengths: list[int], behind: int, options: dict[str, Any], seed: int) -> None:
        torch.manual_seed(seed)
        assert_one_meaning(case, lengths, behind, options)

    check()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_masked(case: Case) -> None:
    """Nothing of the documents is read: results and gradients are 0."""
    x = numbers(case, sum(LENGTHS))
    with torch.no_grad():
        for name in case.tokens:
            if name == "mask":
                x[name].zero_()
            elif x[name].is_floating_point() and name != "temperature":
                x[name].fill_(float("nan"))
    for options in options_of(case):
        for form in ("packed", "jagged"):
            for y in results(form, case, x, LENGTHS, options):
                assert torch.equal(y, torch.zeros_like(y)), (form, options)


def test_gradients_of_jagged_leaves_are_jagged() -> None:
    rows = [torch.randn(n, CLASSES) for n in (2, 1, 4)]
    logits = torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=True)
    target = torch.nested.nested_tensor_from_jagged(torch.randint(CLASSES, (7,)), logits.offsets())
    loss = masked_loss.masked_cross_entropy(logits, target, reduction="none", shift=True)
    assert loss.shape == target.shape  # the same symbol: they can be multiplied
    (loss * 2).values().sum().backward()
    assert logits.grad.is_nested
    assert torch.equal(logits.grad.offsets(), logits.offsets())
    flat = logits.values().detach().requires_grad_()
    bounds = logits.offsets()
    masked_loss.masked_cross_entropy(
        flat, target.values(), reduction="sum", shift=True, cu_seqlens=bounds
    ).mul(2).backward()
    torch.testing.assert_close(logits.grad.values(), flat.grad)
    leaf = logits.detach().requires_grad_()
    own = leaf * 1  # is not overwritten: autograd could not follow
    options = {"reduction": "none", "shift": True, "inplace_backward": True}
    each = masked_loss.masked_cross_entropy(own, target, **options)
    (each * 2).values().sum().backward()
    torch.testing.assert_close(leaf.grad.values(), flat.grad)
    assert torch.equal(own.values(), leaf.values())


def test_modules_and_fused_models_take_jagged_tensors() -> None:
    hidden = nested(2, 3, more=(WIDTH,))
    target = torch.nested.nested_tensor_from_jagged(torch.arange(5), hidden.offsets())
    mask = torch.nested.nested_tensor_from_jagged(torch.tensor([1, 0, 1, 1, 1]), hidden.offsets())
    model = torch.nn.Module()
    model.lm_head = torch.nn.Linear(WIDTH, CLASSES)
    logits = model.lm_head(hidden)
    options = {"reduction": "sequence_mean", "shift": True}
    expected = masked_loss.masked_cross_entropy(logits, target, mask, **options)
    ours = masked_loss.MaskedCrossEntropyLoss(**options)(logits, target, mask)
    assert torch.equal(ours, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that its logits are computed
        logits = masked_loss.fuse_linear_loss(model).lm_head(hidden)
    ours = masked_loss.masked_cross_entropy(logits, target, mask, **options)
    torch.testing.assert_close(ours, expected)
    ours = masked_loss.LinearCrossEntropyLoss(**options)(
        hidden, model.lm_head.weight, target, mask, bias=model.lm_head.bias
    )
    torch.testing.assert_close(ours, expected)
    values = torch.nested.nested_tensor_from_jagged(torch.arange(5.0), hidden.offsets())
    assert masked_loss.masked_mean(values, mask) == (0 + 2 + 3 + 4) / 4


def nested(*lengths: int, more: tuple[int, ...] = (), layout: Any = torch.jagged) -> Tensor:
    rows = [torch.ones(n, *more) for n in lengths]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the old layout
        return torch.nested.nested_tensor(rows, layout=layout)


def holes() -> Tensor:
    offsets, lengths = torch.tensor([0, 2, 5]), torch.tensor([1, 3])
    return torch.nested.nested_tensor_from_jagged(torch.ones(5), offsets, lengths)


BAD: dict[str, tuple[Tensor, Tensor | None, dict[str, Any], str]] = {
    "offsets": (
        nested(2, 3), nested(3, 2), {},
        r"mask must have the offsets of values, \[0, 2, 5\], got \[0, 3, 5\]",
    ),
    "a device": (
        nested(2, 3), nested(2, 3).to("meta"), {},
        "mask must be on the device of values, cpu, got meta",
    ),
    "sequences": (
        nested(2, 3), nested(2, 3, 1), {}, r"offsets of values, \[0, 2, 5\], got \[0, 2, 5, 6\]",
    ),
    "many": (
        nested(*[1] * 20), nested(2, *[1] * 18), {},
        r"values, \[0, 1, .*, 8, ..., 20\], got \[0, 2, 3, .*, ..., 20\]",
    ),
    "a plain mask": (
        nested(2, 3), torch.ones(2, 3), {},
        r"mask must be jagged like values, \[2, j\], got a tensor \[2, 3\]",
    ),
    "plain values": (
        torch.ones(5), nested(2, 3), {},
        r"values must be jagged like mask, \[2, j\], got a tensor \[5\]",
    ),
    "holes": (
        holes(), None, {},
        r"without holes, .* \[0, 2, 5\] and lengths \[1, 3\]: values.contiguous\(\) has none",
    ),
    "another layout": (
        nested(2, 3, layout=torch.strided), None, {}, "layout=torch.jagged, got torch.strided",
    ),
    "transposed": (
        nested(2, 3, more=(4,)).transpose(1, 2), None, {},
        r"must be \[B, j, ...\], .* got \[2, 4, j\]",
    ),
    "cu_seqlens too": (
        nested(2, 3), None, {"cu_seqlens": torch.tensor([0, 2, 5])}, "are the offsets of jagged",
    ),
    "nothing of tokens": (
        nested(2, 3), None, {"normalizer": nested(1, 1)}, "normalizer has nothing for each token",
    ),
    "dim": (nested(2, 3), None, {"dim": 0}, "dim must be -1 with cu_seqlens, got 0"),
    "several values a token": (
        nested(2, 3, more=(4,)), nested(2, 3, more=(4,)), {},
        r"values must be \[B, j\], a number for each token, got \[2, j, 4\]",
    ),
    "several weights a token": (
        nested(2, 3), nested(2, 3, more=(1,)), {}, r"mask must be \[B, j\], .* got \[2, j, 1\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("values", "mask", "options", "text"), BAD.values(), ids=BAD.keys())
def test_what_jagged_tensors_cannot_do(
    values: Tensor, mask: Tensor | None, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(ValueError, match=f"^masked_reduce: .*{text}"):
        masked_loss.masked_reduce(values, mask, **options)


def test_every_function_wants_a_number_for_each_token() -> None:
    values = nested(2, 3, more=(4,))
    for function in (
        masked_loss.masked_mean,
        masked_loss.masked_moments,
        masked_loss.masked_whiten,
    ):
        with pytest.raises(ValueError, match=r"values must be \[B, j\].* got \[2, j, 4\]"):
            function(values)
    with pytest.raises(ValueError, match=r"target must be \[B, j\].* got \[2, j, 4\]"):
        masked_loss.global_normalizer(values.long())
    ids = torch.zeros_like(values).long()  # of which a token may have several
    assert masked_loss.token_log_probs(values, ids).shape == values.shape


def test_what_is_jagged_is_known_of_every_function() -> None:
    for name in masked_loss.__all__:
        function = getattr(masked_loss, name)
        parameters = inspect.signature(function).parameters if inspect.isfunction(function) else {}
        if "cu_seqlens" in parameters and "reduction" not in parameters:
            assert name in _EACH_TOKEN


def test_offsets_of_their_own_may_be_equal() -> None:
    values, mask = nested(2, 3), nested(2, 3)
    assert values.offsets() is not mask.offsets()
    assert torch.equal(masked_loss.masked_reduce(values, mask, dim=1), torch.ones(2))
    filled = holes().contiguous()
    assert masked_loss.masked_reduce(filled, reduction="sum") == 4


def test_the_dropin_says_who_takes_nested_tensors() -> None:
    with pytest.raises(
        ValueError, match=r"^cross_entropy: .*functions with cu_seqlens, as masked_cross"
    ):
        masked_loss.cross_entropy(nested(2, 3, more=(4,)), torch.zeros(5, dtype=torch.long))


def test_micro_batches_are_counted_in_any_form() -> None:
    target, bounds = torch.tensor([4, -100, 7, 1, 5]), torch.tensor([0, 3, 5])
    jagged = torch.nested.nested_tensor_from_jagged(target, bounds)
    count = masked_loss.global_normalizer(
        [target, target[None], jagged], cu_seqlens=[bounds, None, None], shift=True
    )
    assert count == 2 + 3 + 2
    with pytest.raises(ValueError, match=r"target and cu_seqlens must be .* got 2 and 1"):
        masked_loss.global_normalizer([target, target], cu_seqlens=bounds)


def test_compiled_graphs_take_any_documents() -> None:
    """One graph of every function, for batches of any number of documents of any length."""

    def both(logits: Tensor, target: Tensor, bounds: Tensor) -> list[Tensor]:
        options = {"cu_seqlens": bounds, "shift": True}
        log_probs, entropy = masked_loss.token_log_probs(
            logits, target, return_entropy=True, **options
        )
        each = masked_loss.masked_reduce(log_probs, dim=-1, cu_seqlens=bounds)
        mean, _, count = masked_loss.masked_moments(entropy, dim=-1, cu_seqlens=bounds)
        loss = masked_loss.masked_divergence(
            logits, logits.detach().flip(-1), reduction="sequence_mean", **options
        )
        return [log_probs, each, mean, count, loss]

    def of_nested(logits: Tensor, target: Tensor) -> list[Tensor]:
        loss = masked_loss.masked_cross_entropy(
            logits, target, reduction="sequence_mean", shift=True
        )
        each = masked_loss.masked_cross_entropy(logits, target, reduction="none", shift=True)
        return [loss, each.values()]

    torch._dynamo.reset()
    compiled = torch.compile(both, backend="aot_eager", fullgraph=True, dynamic=True)
    compiled_nested = torch.compile(of_nested, backend="aot_eager", fullgraph=True, dynamic=True)
    for lengths in ([3, 6], [1, 0, 6, 5], [2, 2, 2, 2, 2]):
        bounds = cu_seqlens(lengths=lengths).long()
        logits = torch.randn(sum(lengths), CLASSES, requires_grad=True)
        target = torch.randint(CLASSES, (sum(lengths),))
        args = (logits, target, bounds)
        rows = [torch.nested.nested_tensor_from_jagged(x, bounds) for x in args[:2]]
        for found, expected in (
            (compiled(*args), both(*args)),
            (compiled_nested(*rows), of_nested(*rows)),
        ):
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, theirs)
            ours, theirs = (
                torch.autograd.grad(sum(x.sum() for x in xs), logits)[0] for xs in (found, expected)
            )
            torch.testing.assert_close(ours, theirs)


def test_the_same_bits_for_any_number_of_threads() -> None:
    lengths = [1, 5000, 0, 3, 900, *[7] * 300]
    bounds = cu_seqlens(lengths=lengths)
    logits, teacher = torch.randn(2, sum(lengths) + 5, CLASSES).unbind()
    target = torch.randint(CLASSES, logits.shape[:1])
    found = []
    for number in (1, 2, 5):
        with threads(number):
            options = {"cu_seqlens": bounds, "shift": True}
            log_probs = masked_loss.token_log_probs(logits, target, **options)
            options["reduction"] = "sequence_mean"
            loss = masked_loss.masked_divergence(logits, teacher, **options)
            moments = masked_loss.masked_moments(log_probs, dim=-1, cu_seqlens=bounds)
            found.append((log_probs, loss, *moments))
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))
