# SPDX-License-Identifier: BSD-3-Clause
"""The options of the losses: written here once, and nowhere read by position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch
from torch import Tensor

if TYPE_CHECKING:
    from masked_loss.vocab import VocabShard


class Meaning(NamedTuple):
    """What a loss means, in the order in which the operators take it."""

    reduction: str = "mean"
    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    temperature: float = 1.0
    shift: bool = False


class Scoring(NamedTuple):
    """What the log-probability of a token means, in the operators' order."""

    temperature: float = 1.0
    ignore_index: int = -100
    softcap: float | None = None
    shift: bool = False


class Divergence(NamedTuple):
    """What a divergence compares with what, in the operators' order."""

    temperature: float = 1.0
    teacher_temperature: float = 1.0
    kind: str = "forward_kl"
    beta: float = 0.5
    softcap: float | None = None
    teacher_softcap: float | None = None
    shift: bool = False


class Chunking(NamedTuple):
    """How a linear loss is computed; it means the same however that is."""

    chunk_tokens: int | None = None
    accumulation_dtype: torch.dtype | None = None
    pack: bool = True
    """The host may wait for the number of active tokens, to compute no others."""


class Shards(NamedTuple):
    """Which classes of the vocabulary other ranks have: a VocabShard as the operators take it."""

    vocab_group: str = ""
    """The name of the ranks' group; empty: all classes are here."""
    bounds: Sequence[int] = ()
    """Where the classes of each rank begin, and where the last ones end; empty as well then."""
    reduce_hidden: bool = True
    """The gradient of hidden states is added up over the ranks; otherwise each has its own part."""

    def of_logits(self) -> dict[str, Any]:
        """What a loss of logits takes of it."""
        return {"vocab_group": self.vocab_group, "bounds": self.bounds}


ALL_CLASSES = Shards()


# The keywords of the functions, as their overloads name them.


class _OfRows(TypedDict, total=False):
    softcap: float | None
    temperature: float | Tensor
    shift: bool
    cu_seqlens: Tensor | None


class _Sharded(TypedDict, total=False):
    vocab: VocabShard | None


class _Linear(TypedDict, total=False):
    bias: Tensor | None
    chunk_tokens: int | None
    accumulation_dtype: torch.dtype | None


class _Dense(TypedDict, total=False):
    inplace_backward: bool


class _CrossEntropy(_OfRows, total=False):
    reduction: str
    normalizer: float | Tensor | None
    ignore_index: int
    class_weight: Tensor | None
    label_smoothing: float
    z_loss: float


class CrossEntropyKeywords(_CrossEntropy, _Dense, _Sharded, total=False):
    pass


class LinearCrossEntropyKeywords(_CrossEntropy, _Linear, _Sharded, total=False):
    pass


class _Scoring(_OfRows, total=False):
    ignore_index: int


class ScoringKeywords(_Scoring, _Dense, _Sharded, total=False):
    pass


class LinearScoringKeywords(_Scoring, _Linear, _Sharded, total=False):
    pass


class _Divergence(_OfRows, total=False):
    kind: str
    beta: float
    teacher_temperature: float | Tensor | None
    teacher_softcap: float | None
    reduction: str
    normalizer: float | Tensor | None


class DivergenceKeywords(_Divergence, _Dense, total=False):
    pass


class LinearDivergenceKeywords(_Divergence, _Linear, total=False):
    teacher_bias: Tensor | None
