# SPDX-License-Identifier: BSD-3-Clause
"""The exceptions of masked_loss."""


class ReducedLossError(ValueError):
    """A mask was applied to a loss that is already a scalar.

    A loss reduced to a scalar holds one number for all tokens: ``sum(loss * mask) / sum(mask)``
    is that same number again, so the mask changes nothing and the model trains on its padding.
    Keep one loss per token (``reduction="none"``) until the mask has been applied, or give the
    mask to :func:`masked_loss.masked_cross_entropy`.

    Raised by :func:`masked_loss.masked_reduce` and :func:`masked_loss.masked_mean` when ``values``
    has no dimension and the mask has some, and by :func:`masked_loss.detect_reduced_loss` where a
    reduced loss is multiplied with a mask. It is a :class:`ValueError`, so code that already
    handles bad arguments handles it too.

    >>> issubclass(ReducedLossError, ValueError)
    True
    """
