# SPDX-License-Identifier: BSD-3-Clause
"""The bounds of packed sequences, from the forms in which batches carry them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from masked_loss._op.arguments import require_int, require_local

_WHO = "cu_seqlens"
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def cu_seqlens(
    *,
    position_ids: Tensor | None = None,
    segment_ids: Tensor | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    max_sequences: int | None = None,
) -> Tensor:
    r"""The bounds of sequences that are packed one after the other, from what a batch says of them.

    What every function here takes as ``cu_seqlens``, and attention kernels under the same name: for
    S sequences of lengths :math:`n_s`, one after the other in the flattened tokens,

    .. math::
        \text{cu\_seqlens} = \Big(0,\; n_1,\; n_1 + n_2,\; \dots,\; \sum_{s=1}^{S} n_s\Big)

    Args:
        position_ids: [..., T] integers, the position of each token in its sequence: a sequence
            begins where the position does not grow. Padding whose positions stand still is
            sequences of one token.
        segment_ids: [..., T] integers, one number for each sequence: one begins where it changes.
            Padding is a sequence too, which counts nowhere as long as its tokens are masked.
        lengths: [S] integers, or a list of them: the tokens of each sequence; 0 is an empty one.
        max_sequences: the result has this many sequences and one bound more, whatever the batch:
            those that it lacks are empty, and repeat the last bound. So the shape is known before
            the values are, and the host does not wait for a device: for CUDA graphs and compiled
            graphs. None: as many as there are, which position_ids and segment_ids on a device have
            to be asked for; in a compiled graph they need ``max_sequences``.

    A row of position_ids or segment_ids with several dimensions begins a sequence of its own.

    Returns:
        int32 [S + 1], or [max_sequences + 1], on the device of the argument; int64 for 2**31 tokens
        or more, which lengths on a device or in a compiled graph must not sum to.

    Raises:
        TypeError: an argument that is not of integers, or a nested one.
        ValueError: none of the three arguments, or several; a negative length; more sequences than
            ``max_sequences`` (on the CPU; on CUDA, and in a compiled graph, an assertion while it
            runs, as for lengths that sum to too much).

    Source: https://github.com/Dao-AILab/flash-attention, ``flash_attn_varlen_func``.

    >>> import torch, masked_loss
    >>> masked_loss.cu_seqlens(position_ids=torch.tensor([[0, 1, 2, 0, 1]]))
    tensor([0, 3, 5], dtype=torch.int32)
    >>> masked_loss.cu_seqlens(segment_ids=torch.tensor([[1, 1, 1, 2, 2]]), max_sequences=4)
    tensor([0, 3, 5, 5, 5], dtype=torch.int32)
    >>> masked_loss.cu_seqlens(lengths=[3, 0, 2])
    tensor([0, 3, 3, 5], dtype=torch.int32)
    """
    named = {"position_ids": position_ids, "segment_ids": segment_ids, "lengths": lengths}
    given = {name: x for name, x in named.items() if x is not None}
    if len(given) != 1:
        got = " and ".join(given) or "none of them"
        raise ValueError(f"{_WHO}: give position_ids, segment_ids or lengths, got {got}")
    if max_sequences is not None:
        require_int(_WHO, "max_sequences", max_sequences)
        if max_sequences < 0:
            raise ValueError(f"{_WHO}: max_sequences must be at least 0, got {max_sequences}")
    ((name, x),) = given.items()
    if name == "lengths":
        return _of_lengths(_integers(name, _as_tensor(x)), max_sequences)
    ids = _integers(name, x)
    if ids.dim() == 0:
        raise ValueError(f"{_WHO}: {name} must have shape [..., T], got []")
    return _of_begins(_begins(name, ids), max_sequences)


def _as_tensor(lengths: object) -> object:
    if isinstance(lengths, Tensor):
        return lengths
    try:
        return torch.as_tensor(lengths)
    except (RuntimeError, TypeError, ValueError) as error:
        text = f"{_WHO}: lengths must be a tensor or a list of integers"
        raise TypeError(f"{text}, got {lengths!r:.60}") from error


def _integers(name: str, x: object) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{_WHO}: {name} must be a tensor, got {type(x).__name__}")
    require_local(_WHO, **{name: x})
    if x.is_nested:
        raise TypeError(
            f"{_WHO}: {name} must not be nested: the offsets() of a jagged tensor are its bounds"
        )
    if x.numel() and x.dtype not in _INTEGERS:  # an empty list is one of floats
        raise TypeError(f"{_WHO}: {name} must be integers, got {x.dtype}")
    return x


def _of_lengths(lengths: Tensor, max_sequences: int | None) -> Tensor:
    if lengths.dim() != 1:
        raise ValueError(f"{_WHO}: lengths must have shape [S], got {list(lengths.shape)}")
    sequences = lengths.shape[0]
    size = sequences if max_sequences is None else max_sequences
    if sequences > size:
        _fail(size, sequences)
    if _has_values(lengths) and (lengths < 0).any():
        raise ValueError(f"{_WHO}: lengths must be at least 0, got {int(lengths.min())}")
    total = lengths.long().cumsum(0)
    huge = False
    if sequences > 0 and _has_values(lengths):
        huge = int(total[-1]) >= 2**31
    elif sequences > 0:  # the type has to be known before the values are
        text = f"{_WHO}: lengths on a device, or in a compiled graph, must sum to less than 2**31"
        torch._assert_async(total[-1] < 2**31, text)
    bounds = lengths.new_zeros(size + 1, dtype=torch.int64 if huge else torch.int32)
    bounds[1 : sequences + 1] = total
    if 0 < sequences < size:
        bounds[sequences + 1 :] = bounds[sequences]
    return bounds


def _begins(name: str, ids: Tensor) -> Tensor:
    """[tokens]: whether a sequence begins at the token."""
    begins = torch.ones_like(ids, dtype=torch.bool)
    before, after = ids[..., :-1], ids[..., 1:]
    begins[..., 1:] = after <= before if name == "position_ids" else after != before
    return begins.flatten()


def _of_begins(begins: Tensor, max_sequences: int | None) -> Tensor:
    sequences = int(begins.sum()) if max_sequences is None else max_sequences
    if max_sequences is not None:
        _require_at_most(max_sequences, begins.sum())
    begun = begins.cumsum(0)  # how many sequences have, up to each token
    number = torch.arange(1, sequences + 2, device=begins.device)
    # Where that many have begun: behind all tokens if they never do.
    bounds = torch.searchsorted(begun, number)
    return bounds.int() if begins.shape[0] < 2**31 else bounds


def _require_at_most(max_sequences: int, sequences: Tensor) -> None:
    if not _has_values(sequences):
        text = f"{_WHO}: max_sequences must be at least the number of sequences, got fewer"
        torch._assert_async(sequences <= max_sequences, text)
    elif sequences > max_sequences:
        _fail(max_sequences, int(sequences))


def _fail(max_sequences: int, sequences: int) -> NoReturn:
    raise ValueError(
        f"{_WHO}: max_sequences must be at least the number of sequences, {sequences}, "
        f"got {max_sequences}"
    )


def _has_values(x: Tensor) -> bool:
    """Whether the host may look at them: a device would have to be waited for."""
    return x.is_cpu and not torch.compiler.is_compiling()
