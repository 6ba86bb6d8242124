# SPDX-License-Identifier: BSD-3-Clause
"""Cross entropy under a loss mask: correct first, and fast.

>>> import torch, masked_loss
>>> logits, target = torch.randn(2, 5, 100), torch.randint(100, (2, 5))
>>> mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])  # the second sequence is padded
>>> loss = masked_loss.masked_cross_entropy(logits, target, mask)
"""

from masked_loss._op import flops  # noqa: F401  # registers its formulas
from masked_loss._op.memory import empty_cache
from masked_loss.detect import detect_reduced_loss
from masked_loss.distributed import global_normalizer
from masked_loss.divergence import masked_divergence
from masked_loss.errors import ReducedLossError
from masked_loss.functional import cross_entropy, masked_cross_entropy
from masked_loss.fuse import fuse_linear_loss, is_fused, unfuse
from masked_loss.linear import linear_cross_entropy
from masked_loss.linear_divergence import linear_divergence
from masked_loss.linear_log_probs import linear_token_log_probs
from masked_loss.log_probs import token_log_probs
from masked_loss.modules import (
    CrossEntropyLoss,
    LinearCrossEntropyLoss,
    LinearDivergenceLoss,
    LinearTokenLogProbs,
    MaskedCrossEntropyLoss,
    MaskedDivergenceLoss,
    TokenLogProbs,
)
from masked_loss.moments import masked_moments, masked_whiten
from masked_loss.packing import cu_seqlens
from masked_loss.reduce import masked_mean, masked_reduce
from masked_loss.stats import DivergenceStats, LossStats
from masked_loss.topk import topk_divergence
from masked_loss.vocab import VocabShard

__version__ = "0.1.0"

__all__ = [
    "CrossEntropyLoss",
    "DivergenceStats",
    "LinearCrossEntropyLoss",
    "LinearDivergenceLoss",
    "LinearTokenLogProbs",
    "LossStats",
    "MaskedCrossEntropyLoss",
    "MaskedDivergenceLoss",
    "ReducedLossError",
    "TokenLogProbs",
    "VocabShard",
    "cross_entropy",
    "cu_seqlens",
    "detect_reduced_loss",
    "empty_cache",
    "fuse_linear_loss",
    "global_normalizer",
    "is_fused",
    "linear_cross_entropy",
    "linear_divergence",
    "linear_token_log_probs",
    "masked_cross_entropy",
    "masked_divergence",
    "masked_mean",
    "masked_moments",
    "masked_reduce",
    "masked_whiten",
    "token_log_probs",
    "topk_divergence",
    "unfuse",
]
