# SPDX-License-Identifier: BSD-3-Clause
"""What the interpreter meets and the rules judge: losses computed, multiplied, divided, reduced."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field

from masked_loss_lint.project import ClassInfo, FunctionNode, ModuleInfo, Scope
from masked_loss_lint.torch_losses import LossSpec
from masked_loss_lint.values import Loss, Place, Value


@dataclass(frozen=True)
class Frame:
    """One evaluation of one function, or of a module's top level."""

    module: ModuleInfo
    scope: Scope
    node: FunctionNode | ast.Module
    owner: ClassInfo | None = None
    per_sample: bool = False
    caller: Frame | None = None
    returns: list[Value] = field(default_factory=list)

    def place(self, node: ast.expr | ast.stmt) -> Place:
        source = self.module.source
        lines = (node.lineno, node.end_lineno or node.lineno)
        return Place(
            str(source.path), *source.cell(node.lineno), node.col_offset + 1, source, lines
        )


@dataclass(frozen=True)
class Multiplication:
    """A loss times something that is not known to be a number."""

    frame: Frame
    node: ast.expr | ast.stmt
    loss: Loss
    factor: ast.expr
    value: Value


@dataclass(frozen=True)
class Reduction:
    """sum() or mean() of a loss."""

    frame: Frame
    node: ast.expr
    loss: Loss


@dataclass(frozen=True)
class Division:
    """A loss divided by something."""

    frame: Frame
    node: ast.expr | ast.stmt
    loss: Loss
    divisor: ast.expr
    value: Value


@dataclass(frozen=True)
class LossCall:
    """A call of a loss function, or of the constructor or the instance of a loss module."""

    frame: Frame
    node: ast.Call
    spec: LossSpec
    args: tuple[Value, ...]
    constructs: bool


Event = Multiplication | Reduction | Division | LossCall


def arguments_of(spec: LossSpec, node: ast.Call) -> dict[str, ast.expr] | None:
    """The arguments of a call by parameter name, or None where * or ** hides some."""
    if any(isinstance(a, ast.Starred) for a in node.args) or any(not k.arg for k in node.keywords):
        return None
    given = dict(zip(spec.parameters, node.args, strict=False))
    return given | {k.arg: k.value for k in node.keywords if k.arg}
