# SPDX-License-Identifier: BSD-3-Clause
"""Which tests say of which operators that their schemas, fakes and formulas are right."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

Test = Callable[..., None]


def opchecks(*names: str) -> Callable[[Test], Test]:
    """A test of these operators: it fails where it gives torch.library.opcheck others, or fewer."""

    def decorate(test: Test) -> Test:
        @functools.wraps(test)
        def checked(*args: Any, **kwargs: Any) -> None:
            real = torch.library.opcheck
            with mock.patch.object(torch.library, "opcheck", wraps=real) as opcheck:
                test(*args, **kwargs)
            found = {str(call.args[0]) for call in opcheck.call_args_list}
            assert found == {f"masked_loss.{name}.default" for name in names}

        return checked

    return decorate


def checked_operators() -> set[str]:
    """What the tests below this folder are decorated with, read in their source."""
    return {
        ast.literal_eval(name)
        for path in Path(__file__).parent.rglob("test_*.py")
        for test in ast.walk(ast.parse(path.read_text()))
        if isinstance(test, ast.FunctionDef) and test.name.startswith("test_")
        for call in test.decorator_list
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "opchecks"
        for name in call.args
    }
