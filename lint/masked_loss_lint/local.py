# SPDX-License-Identifier: BSD-3-Clause
"""What one function alone decides: ML002, and the guards that ML003 accepts."""

from __future__ import annotations

import ast
from functools import lru_cache

from masked_loss_lint import names
from masked_loss_lint.torch_losses import LossSpec, legacy_reduction

_LEGACY = ("size_average", "reduce")
_COUNTING = {"any", "all", "sum", "count_nonzero", "numel", "len"}
_REPAIRS = {"nan_to_num", "nan_to_num_", "isnan", "isfinite", "isinf"}


def legacy_arguments(spec: LossSpec, node: ast.Call, skip: int = 0) -> tuple[str, bool] | None:
    """ML002: what is said of size_average / reduce, and whether it can be rewritten.

    The first `skip` arguments are none of the loss.
    """
    hidden = any(isinstance(a, ast.Starred) for a in node.args)
    args = [] if hidden else node.args[skip:]
    keywords = {k.arg: k.value for k in node.keywords}
    given = dict(zip(spec.parameters, args, strict=False)) | keywords
    legacy = {name: given[name] for name in _LEGACY if name in given}
    constants = {n: v.value for n, v in legacy.items() if isinstance(v, ast.Constant)}
    named = [n for n in legacy if n in keywords or constants.get(n, 0) is not None]
    wrapper = all(isinstance(v, ast.Name) and v.id == n for n, v in legacy.items())
    if not named or wrapper:
        return None  # kl_div(p, q, None, None, "sum"), or its caller chose: reduce=reduce
    fixable = len(constants) == len(legacy) and not (hidden or None in keywords or skip)
    if len(constants) < len(legacy):
        advice = "choose a reduction= instead"
    elif all(value is None for value in constants.values()):
        advice = "None is their default: leave out"
    else:
        flags = [None if (v := constants.get(n)) is None else bool(v) for n in _LEGACY]
        advice = f'this call means reduction="{legacy_reduction(*flags)}"'
        for name, value in constants.items():
            if value is not None and not isinstance(value, (bool, int)):
                fixable = False
                advice += f", for {name}={value!r} counts as {bool(value)}"
                advice += f"; was reduction={value!r} meant?" if isinstance(value, str) else ""
    are = " and ".join(named) + (" are" if len(named) > 1 else " is")
    return f"{spec.name}: {are} deprecated: {advice}", fixable


def is_guarded(function: ast.AST, masks: set[str], divisor: ast.expr) -> bool:
    """True where a function looks at a count or a mask, by these texts, besides dividing by it."""
    tested, counted = _tests(function)
    counts = {names.text(divisor), names.key(divisor)}  # also count of count.unsqueeze(-1)
    return tested is None or bool(counts & tested) or bool(masks & counted)


@lru_cache(maxsize=4)
def _tests(function: ast.AST) -> tuple[set[str] | None, set[str]]:
    """The names that are compared or tested (None: NaN is looked for or replaced), and x of a
    tested x.any(), x.sum(), len(x)."""
    tested: set[str] = set()
    counted: set[str] = set()
    tests: list[ast.expr] = []
    for node in ast.walk(function):
        called = names.last_name(node.func) if isinstance(node, ast.Call) else ""
        if called in _REPAIRS or (isinstance(node, ast.Compare) and _is_nan_test(node)):
            return None, set()
        if isinstance(node, ast.Compare) and not _is_identity(node):
            tested.add(names.text(node.left))  # count[count == 0] = 1
        if called == "where" or isinstance(node, (ast.If, ast.While, ast.IfExp, ast.Assert)):
            tests += getattr(node, "args", [getattr(node, "test", None)])[:1]
    for test in tests:
        if isinstance(test, ast.BoolOp):
            tests += test.values
        elif not _is_identity(test):  # `mask is not None` says nothing of what it holds
            for inner in ast.walk(test):
                if isinstance(inner, (ast.Name, ast.Attribute)):
                    tested.add(names.text(inner))
                elif isinstance(inner, ast.Call) and names.last_name(inner.func) in _COUNTING:
                    owner = getattr(inner.func, "value", inner.func)
                    counted |= {names.key(part) for part in (owner, *inner.args)}
    return tested, counted


def _is_nan_test(node: ast.Compare) -> bool:
    return names.text(node.left) == names.text(node.comparators[0])  # loss != loss


def _is_identity(node: ast.expr) -> bool:
    ops = node.ops if isinstance(node, ast.Compare) else []
    return bool(ops) and all(isinstance(op, (ast.Is, ast.IsNot)) for op in ops)
