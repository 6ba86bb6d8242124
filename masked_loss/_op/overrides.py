# SPDX-License-Identifier: BSD-3-Clause
"""How a public function lets a tensor subclass or a mode answer instead of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.overrides import handle_torch_function


def override(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """What ``__torch_function__`` gives for a call of ``function`` with these arguments by name.

    The arguments that its signature takes by position are handed on by position.
    """
    parameters = inspect.signature(function).parameters.values()
    args = [arguments[p.name] for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    kwargs = {p.name: arguments[p.name] for p in parameters if p.kind is p.KEYWORD_ONLY}
    relevant = [x for x in arguments.values() if isinstance(x, Tensor)]
    return handle_torch_function(function, relevant, *args, **kwargs)
