# SPDX-License-Identifier: BSD-3-Clause
"""What the tests of divergences ask for: every kind, every option, students and teachers."""

from __future__ import annotations

from typing import Any

import torch

from masked_loss import reference

KINDS = list(reference.DIVERGENCES)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 2.0, "teacher_temperature": 0.7},
    "temperatures": {"temperature": True},
    "softcap": {"softcap": 5.0, "teacher_softcap": 9.0},
    "shift": {"shift": True},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "normalizer": {"normalizer": 7.0},
    "sequence_mean": {"reduction": "sequence_mean"},
    "everything": {"temperature": True, "softcap": 5.0, "shift": True, "reduction": "none"},
}


def problem(dtype: torch.dtype, cols: int = 301, options: str = "plain", near: float | None = None):
    """Student, teacher, mask and options; the teacher ``near`` the student, or unrelated to it."""
    student = 3 * torch.randn(3, 4, cols, dtype=torch.float64)
    teacher = 3 * torch.randn(3, 4, cols, dtype=torch.float64)
    if near is not None:
        teacher = student + near * teacher
    mask = torch.rand(3, 4) * (torch.rand(3, 4) < 0.8)
    mask[0, 1], mask[2] = 1, 0
    more = dict(OPTIONS[options])
    if more.get("temperature") is True:
        more["temperature"] = 0.5 + torch.rand(3, 4)
    return student.to(dtype).requires_grad_(), teacher.to(dtype), mask.requires_grad_(), more
