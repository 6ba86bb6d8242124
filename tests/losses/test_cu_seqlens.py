# SPDX-License-Identifier: BSD-3-Clause
"""From position ids, segment ids and lengths to the bounds of packed sequences."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from masked_loss import cu_seqlens, masked_reduce


def bounds_of(lengths: list[int]) -> list[int]:
    return [0, *accumulate(lengths)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=8), st.integers(0, 4), st.sampled_from([0, 2]))
def test_every_form_of_one_batch(lengths: list[int], more: int, start: int) -> None:
    """Empty sequences have no tokens: only lengths know of them. ``start``: as RoBERTa counts."""
    expected = torch.tensor(bounds_of(lengths), dtype=torch.int32)
    for form in (lengths, torch.tensor(lengths, dtype=torch.int64)):
        ours = cu_seqlens(lengths=form)
        assert torch.equal(ours, expected)
        assert ours.dtype == torch.int32
        padded = cu_seqlens(lengths=form, max_sequences=len(lengths) + more)
        assert torch.equal(padded, torch.cat([expected, expected[-1:].expand(more)]))
    some = [n for n in lengths if n]
    expected = torch.tensor(bounds_of(some), dtype=torch.int32)
    positions = [start + p for n in some for p in range(n)]
    segments = [s for s, n in enumerate(some) for _ in range(n)]
    for name, ids in (("position_ids", positions), ("segment_ids", segments)):
        for dtype in (torch.int64, torch.int32):
            x = {name: torch.tensor(ids, dtype=dtype)[None]}
            ours = cu_seqlens(**x)
            assert torch.equal(ours, expected)
            assert ours.dtype == torch.int32
            padded = cu_seqlens(**x, max_sequences=len(some) + more)
            assert torch.equal(padded, torch.cat([expected, expected[-1:].expand(more)]))


def test_rows_begin_sequences() -> None:
    positions = torch.tensor([[3, 4, 5], [6, 0, 1]])  # the second row goes on where the first ends
    assert cu_seqlens(position_ids=positions).tolist() == [0, 3, 4, 6]
    assert cu_seqlens(segment_ids=torch.ones(2, 3, dtype=torch.int64)).tolist() == [0, 3, 6]
    assert cu_seqlens(segment_ids=torch.ones(2, 0, dtype=torch.int64)).tolist() == [0]


def test_positions_that_skip_are_one_sequence() -> None:
    """Positions that jump ahead (PoSE) do not start again; padding of zeros is one-token ones."""
    assert cu_seqlens(position_ids=torch.tensor([0, 1, 9, 10, 0, 7])).tolist() == [0, 4, 6]
    assert cu_seqlens(position_ids=torch.tensor([0, 1, 0, 0])).tolist() == [0, 2, 3, 4]


@pytest.mark.parametrize("max_sequences", [0, 1, 3, 9])
def test_a_compiled_graph_of_fixed_size(max_sequences: int) -> None:
    def mean(values: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        bounds = cu_seqlens(position_ids=positions, max_sequences=max_sequences)
        return masked_reduce(values, reduction="sequence_mean", cu_seqlens=bounds), bounds

    compiled = torch.compile(mean, backend="aot_eager", fullgraph=True, dynamic=True)
    for lengths in ([2], [1, 4], [2, 1, 3], [1] * 9):
        positions = torch.cat([torch.arange(n) for n in lengths])
        values = torch.randn(len(positions))
        if len(lengths) > max_sequences:
            with pytest.raises(ValueError, match=f"sequences, {len(lengths)}, got {max_sequences}"):
                mean(values, positions)
            with pytest.raises(RuntimeError, match="the number of sequences, got fewer"):
                compiled(values, positions)
            continue
        ours, bounds = compiled(values, positions)
        theirs, _ = mean(values, positions)
        assert torch.equal(ours, theirs)
        expected = bounds_of(lengths) + [len(positions)] * (max_sequences - len(lengths))
        assert bounds.tolist() == expected


def test_lengths_of_2_to_the_31_tokens() -> None:
    lengths = torch.tensor([2**31 - 2, 1])
    compiled = torch.compile(lambda x: cu_seqlens(lengths=x), backend="aot_eager", fullgraph=True)
    for bounds in (cu_seqlens(lengths=lengths), compiled(lengths)):
        assert bounds.dtype == torch.int32
        assert bounds.tolist() == [0, 2**31 - 2, 2**31 - 1]
    lengths += 1
    assert cu_seqlens(lengths=lengths).tolist() == [0, 2**31 - 1, 2**31 + 1]
    with pytest.raises(RuntimeError, match="must sum to less than"):
        compiled(lengths)


IDS = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({}, ValueError, "give position_ids, segment_ids or lengths, got none of them"),
        ({"position_ids": IDS, "lengths": [3]}, ValueError, "got position_ids and lengths"),
        (
            {"position_ids": IDS.float()},
            TypeError,
            "position_ids must be integers, got torch.float",
        ),
        ({"segment_ids": [1, 1]}, TypeError, "segment_ids must be a tensor, got list"),
        ({"segment_ids": IDS[0, 0]}, ValueError, r"must have shape \[..., T\], got \[\]"),
        ({"lengths": "1 2"}, TypeError, "a tensor or a list of integers, got '1 2'"),
        ({"lengths": [[1], [2, 3]]}, TypeError, r"a list of integers, got \[\[1\], \[2, 3\]\]"),
        ({"lengths": [None]}, TypeError, r"a list of integers, got \[None\]"),
        (
            {"position_ids": torch.nested.nested_tensor([IDS[0], IDS[1, :2]], layout=torch.jagged)},
            TypeError,
            r"position_ids must not be nested: the offsets\(\) .* are its bounds",
        ),
        ({"lengths": [1.5]}, TypeError, "lengths must be integers, got torch.float32"),
        ({"lengths": IDS}, ValueError, r"lengths must have shape \[S\], got \[2, 3\]"),
        ({"lengths": [2, -1]}, ValueError, "lengths must be at least 0, got -1"),
        ({"lengths": [2, 1], "max_sequences": 1}, ValueError, "number of sequences, 2, got 1"),
        ({"lengths": [2], "max_sequences": -1}, ValueError, "at least 0, got -1"),
        ({"lengths": [2], "max_sequences": 2.0}, TypeError, "must be int, got float"),
        ({"lengths": [2], "max_sequences": True}, TypeError, "must be int, got bool"),
    ],
)
def test_bad_input(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^cu_seqlens: .*{text}"):
        cu_seqlens(**arguments)


def test_as_transformers_flattens() -> None:
    """DataCollatorWithFlattening's cu_seq_lens_q from its position_ids, and from its seq_idx."""
    collator = pytest.importorskip("transformers").DataCollatorWithFlattening
    documents = [{"input_ids": list(range(1, n + 1))} for n in (3, 1, 4)]
    batch = collator(return_tensors="pt", return_flash_attn_kwargs=True, return_seq_idx=True)(
        documents
    )
    for arguments in ({"position_ids": batch["position_ids"]}, {"segment_ids": batch["seq_idx"]}):
        assert torch.equal(cu_seqlens(**arguments), batch["cu_seq_lens_q"])
