# SPDX-License-Identifier: BSD-3-Clause
"""token_log_probs on the CUDA emulator."""

from __future__ import annotations

import pytest
import torch
from cuda_emulator.checks import Configure
from log_prob_samples import OPTIONS, check, sample

from masked_loss import token_log_probs

pytestmark = pytest.mark.usefixtures("emulator")


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("ids", [None, 5], ids=lambda k: f"{k}_ids")
@pytest.mark.parametrize("classes", [1, 9, 130, 1025])
def test_results_and_gradients(
    classes: int, ids: int | None, options: str, dtype: torch.dtype
) -> None:
    check(classes, ids, options, dtype)


@pytest.mark.parametrize("classes", [9000, 20_001])
def test_a_block_of_512_threads(classes: int, dtype: torch.dtype) -> None:
    check(classes, 3, "everything", dtype)


def test_more_ids_than_threads() -> None:
    check(40, 300, "everything", torch.float32)


def test_an_id_out_of_range(capfd: pytest.CaptureFixture[str]) -> None:
    """Also where it is not the first of its token."""
    ids = torch.tensor([[1, 2], [3, 9], [0, 0]])
    with pytest.raises(RuntimeError, match="device-side assert"):
        token_log_probs(torch.randn(3, 5), ids)
    assert "target of token 1 is 9, expected 0 <= target < 5" in capfd.readouterr().out


@pytest.mark.parametrize("classes", [60, 20_001])
def test_a_row_alone_has_the_same_bits(classes: int, configure: Configure) -> None:
    """How a row is split depends on the number of classes alone, and not on how many rows there are
    or how large the chip is."""
    s = sample(classes, 3, "temperature", torch.bfloat16, (6,))
    configure(multiprocessors=16)
    together = token_log_probs(s.logits, s.target, return_entropy=True)
    configure(multiprocessors=132)
    for i in range(6):
        alone = token_log_probs(s.logits[i : i + 1], s.target[i : i + 1], return_entropy=True)
        for ours, expected in zip(alone, together, strict=True):
            assert torch.equal(ours[0], expected[i])


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
def test_the_order_of_threads_does_not_matter(inplace: bool, configure: Configure) -> None:
    """The same bits whatever runs first: in place, an id's logit is read before its class is
    written, and its class written after all others."""
    for classes in (70, 3000):
        first = None
        for seed in range(6):
            configure(seed=seed, max_blocks=2)
            s = sample(classes, 40, "entropy", torch.float32)
            s.options["inplace_backward"] = inplace
            results = s.call(token_log_probs, torch.float32)
            first = first or results
            for name, result in results.items():
                assert torch.equal(result, first[name]), f"seed {seed}: {name}"
