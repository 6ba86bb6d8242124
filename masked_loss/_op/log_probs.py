# SPDX-License-Identifier: BSD-3-Clause
"""token_log_probs and token_log_probs_entropy: the log-probabilities of logits that are there."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from masked_loss import reference
from masked_loss._op import checks
from masked_loss._op.autograd import Inputs, are_plain, below_autograd, is_differentiated
from masked_loss._op.batching import batch_rows
from masked_loss._op.cross_entropy import require_writable
from masked_loss._op.derivatives import Formulas, differentiable
from masked_loss._op.factory import Operator, fake, fake_like, fake_nothing
from masked_loss._op.memory import logits_pool
from masked_loss._op.tables import LOG_PROB_FIELDS, log_prob_fields, loss_dtype, ops
from masked_loss.options import Scoring

INPUTS = ("logits", "target", "mask", "cu_seqlens", "temperatures")
WHO = "token_log_probs"


class How(NamedTuple):
    scoring: Scoring
    entropy: bool
    inplace: bool
    """Backward writes the gradient over the logits."""


def _call(
    entropy: bool, inputs: Inputs, scoring: Scoring, *, inplace_backward: bool
) -> tuple[Tensor, ...]:
    """log_probs, and the entropy if it is asked for."""
    logits, target, mask, *more = inputs
    if mask is not None and mask.requires_grad:  # it selects
        inputs = logits, target, mask.detach(), *more
    inplace = inplace_backward and are_plain(logits)
    how = How(scoring, entropy, inplace)
    if not is_differentiated(logits):
        return _forward(inputs, how)[: 1 + entropy]
    if inplace:
        require_writable(WHO, logits)
    return (_with_entropy if entropy else _without_entropy)(*inputs, how)


def _forward(inputs: Inputs, how: How) -> tuple[Tensor, ...]:
    """log_probs, perhaps the entropy, and the table of tokens."""
    log_probs, entropy, tokens = ops.token_log_probs_forward.default(
        *inputs, how.entropy, *how.scoring
    )
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
    args = (dlog_probs, *(dentropy or [None]), logits, target, tokens, temperatures, *how.scoring)
    if not plain:
        gradient = ops.token_log_probs_backward.default(*args)
    elif how.inplace:
        with below_autograd():  # to which logits that require grad are not to be written
            ops.token_log_probs_backward_out.default(logits, *args)
        torch.autograd.graph.increment_version(logits)
        gradient = logits.detach()
    else:
        gradient = logits_pool.empty_like(logits)
        ops.token_log_probs_backward_out.default(gradient, *args)
    return gradient, None, None, None, None


def reference_of(saved: Inputs, how: How) -> tuple[Tensor, ...]:
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


def _check(a: SimpleNamespace) -> None:
    check_weights(a)
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
fake_like("logits", "token_log_probs_backward")
fake_nothing("token_log_probs_backward_out")
_ROWS = ("logits", "target", "temperatures")
batch_rows("token_log_probs_forward", (*_ROWS, "mask"))
batch_rows("token_log_probs_backward", (*_ROWS, "dlog_probs", "dentropy"), ("tokens",))

token_log_probs, token_log_probs_entropy = (
    Operator(name, INPUTS, partial(_call, entropy), options=Scoring, check=_check)
    for name, entropy in (("token_log_probs", False), ("token_log_probs_entropy", True))
)
