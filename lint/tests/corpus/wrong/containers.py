# SPDX-License-Identifier: BSD-3-Clause
"""Losses in dictionaries, dataclasses, named tuples and tuples."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F


@dataclass
class Output:
    loss: torch.Tensor
    logits: torch.Tensor


class Pair(NamedTuple):
    logits: torch.Tensor
    loss: torch.Tensor


def as_dataclass(x, y):
    return Output(F.cross_entropy(x, y), x)


def as_named_tuple(x, y):
    return Pair(x, F.cross_entropy(x, y))


def as_dictionary(x, y):
    out = dict(logits=x)  # noqa: C408
    out["loss"] = F.cross_entropy(x, y)
    return out


def as_tuple(x, y):
    return x, F.cross_entropy(x, y)


def step(x, y, mask):
    a = as_dataclass(x, y).loss * mask  # expect: ML001
    b = as_named_tuple(x, y).loss * mask  # expect: ML001
    c = as_dictionary(x, y)["loss"] * mask  # expect: ML001
    _, loss = as_tuple(x, y)
    return a + b + c + loss * mask + as_tuple(x, y)[1] * mask  # expect: ML001
