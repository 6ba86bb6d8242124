# SPDX-License-Identifier: BSD-3-Clause
"""token_log_probs and token_log_probs_entropy: the log-probabilities of logits that are there.

sharded_token_log_probs are those of a rank's shard of the classes, as in cross_entropy.py.
"""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from masked_loss import reference
from masked_loss._op import checks, exchange
from masked_loss._op.autograd import (
    Inputs,
    are_plain,
    below_autograd,
    is_differentiated,
    is_traced,
)
from masked_loss._op.batching import batch_by_loop, batch_rows
from masked_loss._op.cross_entropy import require_writable
from masked_loss._op.derivatives import Formulas, differentiable
from masked_loss._op.factory import (
    Operator,
    fake,
    fake_like,
    fake_nothing,
    implement,
    kernel,
    record,
)
from masked_loss._op.memory import logits_pool
from masked_loss._op.tables import LOG_PROB_FIELDS, log_prob_fields, loss_dtype, ops
from masked_loss.options import ALL_CLASSES, Scoring, Shards

INPUTS = ("logits", "target", "mask", "cu_seqlens", "temperatures")
WHO = "token_log_probs"


class How(NamedTuple):
    scoring: Scoring
    entropy: bool
    inplace: bool
    """Backward writes the gradient over the logits."""
    shards: Shards = ALL_CLASSES
    columns: tuple[int, int] | None = None
    """The first class that is here, and how many there are on all ranks."""


def _call(
    entropy: bool, inputs: Inputs, scoring: Scoring, *, inplace_backward: bool, **shards: Any
) -> tuple[Tensor, ...]:
    """log_probs, and the entropy if it is asked for."""
    logits, target, mask, *more = inputs
    if mask is not None and mask.requires_grad:  # it selects
        inputs = logits, target, mask.detach(), *more
    inplace = inplace_backward and are_plain(logits)
    how = How(scoring, entropy, inplace)
    if shards:
        of_ranks = Shards(**shards)
        how = how._replace(shards=of_ranks, columns=exchange.columns(of_ranks))
    if not is_differentiated(logits):
        return _forward(inputs, how)[: 1 + entropy]
    if inplace:
        require_writable(WHO, logits)
    return (_with_entropy if entropy else _without_entropy)(*inputs, how)


def _forward(inputs: Inputs, how: How) -> tuple[Tensor, ...]:
    """log_probs, perhaps the entropy, and the table of tokens."""
    scoring, with_entropy, _, shards, _ = how
    if not shards.bounds:
        results = ops.token_log_probs_forward.default(*inputs, with_entropy, *scoring)
    elif is_traced(*inputs):
        results = ops.sharded_token_log_probs_forward.default(
            *inputs, with_entropy, shards.vocab_group, shards.bounds, *scoring
        )
    else:
        results = _run_sharded(inputs, how)
    log_probs, entropy, tokens = results
    return (log_probs, entropy, tokens) if how.entropy else (log_probs, tokens)


def _save(inputs: Inputs, outputs: tuple[Tensor, ...], how: How) -> Inputs:
    logits, target, _, *more = inputs
    return logits, target, None, *more, outputs[-1]  # the mask's weights are in the table


def _backward(
    saved: Inputs, how: How, upstream: Inputs, needs: tuple[bool, ...], plain: bool
) -> Inputs:
    logits, target, _, _, temperatures, tokens = saved
    dlog_probs, *dentropy = upstream
    if dlog_probs is None:
        dlog_probs = torch.zeros(target.shape, dtype=tokens.dtype, device=tokens.device)
    columns = how.columns or ()
    args = (
        dlog_probs, *(dentropy or [None]), logits, target, tokens, temperatures, *columns,
        *how.scoring,
    )  # fmt: skip
    into, made = ops.token_log_probs_backward_out, ops.token_log_probs_backward
    if columns:
        into, made = ops.token_log_probs_shard_backward_out, ops.token_log_probs_shard_backward
    if not plain:
        gradient = made.default(*args)
    elif how.inplace:
        with below_autograd():  # to which logits that require grad are not to be written
            into.default(logits, *args)
        torch.autograd.graph.increment_version(logits)
        gradient = logits.detach()
    else:
        gradient = logits_pool.empty_like(logits)
        into.default(gradient, *args)
    return gradient, None, None, None, None


def reference_of(saved: Inputs, how: How) -> tuple[Tensor, ...]:
    exchange.require_whole(WHO, how.shards)
    logits, target, mask, cu_seqlens, temperatures, *rest = saved
    if rest:
        sums = rest[0][LOG_PROB_FIELDS.index("sum")]  # of exponentials, or 0
        mask = (sums != 0).reshape(logits.shape[:-1])
    options = how.scoring._asdict()
    if temperatures is not None:
        options["temperature"] = temperatures
    results: Any = reference.token_log_probs(
        logits.to(loss_dtype(logits)), target, mask, cu_seqlens=cu_seqlens, **options,
        return_entropy=how.entropy,
    )  # fmt: skip
    return results if how.entropy else (results,)


_without_entropy, _with_entropy = (
    differentiable(
        Formulas("TokenLogProbs", _forward, _save, _backward, reference_of, results, results)
    )
    for results in (1, 2)
)


# Of a shard of the classes


def merged(
    part: Tensor, shards: Shards, target: Tensor, tokens: Tensor, entropy: bool, scoring: Scoring
) -> tuple[Tensor, ...]:
    """log_probs and entropy, of one exchange; fills the table of tokens."""
    merge, how = ops.token_log_probs_merge, (entropy, *scoring)
    results: tuple[Tensor, ...] = exchange.merged(merge, part, shards, target, tokens, how)
    return results


@kernel
def _run_sharded(inputs: Inputs, how: How) -> tuple[Tensor, ...]:
    logits, target, mask, cu_seqlens, temperatures = inputs
    scoring, with_entropy, _, shards, _ = how
    first, classes = exchange.columns(shards)
    keep_ignored = with_entropy and target.dim() == logits.dim()
    weights = ops.log_probs_weigh.default(
        logits, target, mask, cu_seqlens, classes, scoring.ignore_index, scoring.shift, keep_ignored
    )
    tokens = weights.new_empty((len(log_prob_fields(with_entropy)), *weights.shape))
    tokens[LOG_PROB_FIELDS.index("sum")] = weights
    part = ops.token_log_probs_partial.default(
        logits, target, tokens, temperatures, with_entropy, first, classes, *scoring
    )
    log_probs, entropy = merged(part, shards, target, tokens, with_entropy, scoring)
    return log_probs, entropy.view(logits.shape[:-1]) if with_entropy else entropy, tokens


def _sharded_kernel(
    entropy: bool, inputs: Inputs, scoring: Scoring, *, inplace_backward: bool, **shards: Any
) -> tuple[Tensor, ...]:
    return _run_sharded(inputs, How(scoring, entropy, False, Shards(**shards)))


def _sharded_forward_kernel(a: SimpleNamespace) -> tuple[Tensor, ...]:
    inputs = tuple(getattr(a, name) for name in INPUTS)
    return _run_sharded(
        inputs, How(record(Scoring, a), a.entropy, False, Shards(a.vocab_group, a.bounds))
    )


def _check(a: SimpleNamespace) -> None:
    check_weights(a)
    if not hasattr(a, "bounds"):
        checks.classes(WHO, a.logits)
    checks.formula(WHO, a)
    checks.temperatures(WHO, a.temperatures, a.logits.shape[:-1])


def _fake(a: SimpleNamespace, entropy: bool) -> tuple[Tensor, ...]:
    _check(a)
    tokens, dtype = fake_weights(a), loss_dtype(a.logits)
    return (
        a.logits.new_empty(a.target.shape, dtype=dtype),
        a.logits.new_empty(a.logits.shape[:-1] if entropy else (0,), dtype=dtype),
        a.logits.new_empty((len(log_prob_fields(entropy)), *tokens.shape), dtype=dtype),
    )


@fake("log_probs_weigh")
def _fake_weigh(a: SimpleNamespace) -> tuple[Tensor]:
    return (fake_weights(a),)


def check_weights(a: SimpleNamespace) -> None:
    checks.rows(WHO, a.logits, a.shift)
    tokens = a.logits.shape[:-1]
    checks.class_indices(WHO, a.target)
    if a.target.dim() not in (len(tokens), len(tokens) + 1) or (
        a.target.shape[: len(tokens)] != tokens
    ):
        text = f"target must have shape {list(tokens)}, or one dimension more"
        checks.fail(ValueError, WHO, f"{text}, got {list(a.target.shape)}")
    if a.mask is not None:
        checks.mask_of(WHO, a.mask, tokens)
    checks.cu_seqlens(WHO, a.cu_seqlens)


def fake_weights(a: SimpleNamespace) -> Tensor:
    check_weights(a)
    return a.logits.new_empty((math.prod(a.logits.shape[:-1]),), dtype=loss_dtype(a.logits))


fake("token_log_probs")(lambda a: _fake(a, False))
fake("token_log_probs_entropy")(lambda a: _fake(a, True))
fake("token_log_probs_forward")(lambda a: _fake(a, a.entropy))
fake("sharded_token_log_probs")(lambda a: _fake(a, False))
fake("sharded_token_log_probs_entropy")(lambda a: _fake(a, True))
fake("sharded_token_log_probs_forward")(lambda a: _fake(a, a.entropy))
fake_like("logits", "token_log_probs_backward", "token_log_probs_shard_backward")
fake_nothing("token_log_probs_backward_out", "token_log_probs_shard_backward_out")


@fake("token_log_probs_partial")
def _fake_partial(a: SimpleNamespace) -> tuple[Tensor]:
    ids = a.target.shape[-1] if a.target.dim() == a.logits.dim() else 1
    return (a.tokens.new_empty((2 + a.entropy + ids, a.tokens.shape[1])),)


@fake("token_log_probs_merge")
def _fake_merge(a: SimpleNamespace) -> tuple[Tensor, ...]:
    return (
        a.parts.new_empty(a.target.shape),
        a.parts.new_empty((a.tokens.shape[1] if a.entropy else 0,)),
    )


_ROWS = ("logits", "target", "temperatures")
batch_rows("token_log_probs_forward", (*_ROWS, "mask"))
batch_rows("token_log_probs_backward", (*_ROWS, "dlog_probs", "dentropy"), ("tokens",))

token_log_probs, token_log_probs_entropy = (
    Operator(name, INPUTS, partial(_call, entropy), options=Scoring, check=_check)
    for name, entropy in (("token_log_probs", False), ("token_log_probs_entropy", True))
)
sharded_token_log_probs, sharded_token_log_probs_entropy = (
    Operator(
        f"sharded_{name}", INPUTS, partial(_call, entropy), partial(_sharded_kernel, entropy),
        Scoring, _check,
    )
    for name, entropy in (("token_log_probs", False), ("token_log_probs_entropy", True))
)  # fmt: skip
implement("sharded_token_log_probs_forward", _sharded_forward_kernel)
batch_by_loop("sharded_token_log_probs_forward", "token_log_probs_shard_backward")
