# SPDX-License-Identifier: BSD-3-Clause
"""Which rules and files: from [tool.masked-loss-lint] of pyproject.toml, else all."""

from __future__ import annotations

import sys
from argparse import ArgumentTypeError
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

from masked_loss_lint.rules import RULES

tomllib: Any = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
DEFAULTS: dict[str, list[str]] = {"select": [*RULES], "ignore": [], "exclude": []}


class ConfigError(ArgumentTypeError):
    """A setting that means nothing; the text says which."""


def codes(parts: Iterable[str]) -> list[str]:
    """Rule codes; a prefix such as ML stands for all it begins. Raises ConfigError."""
    found: list[str] = []
    for part in parts:
        matching = [code for code in RULES if part and code.startswith(part.upper())]
        if not matching:
            raise ConfigError(f"no rule {part!r}; there are {', '.join(RULES)}")
        found += matching
    return found


def read_config(paths: Iterable[Path]) -> dict[str, list[str]]:
    """The settings of the nearest pyproject.toml above the first path that has any."""
    first = next(iter(paths)).absolute()
    for file in (folder / "pyproject.toml" for folder in (first, *first.parents)):
        try:
            tools = tomllib.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            if "masked-loss-lint" in tools.get("tool", {}):
                settings = tools["tool"]["masked-loss-lint"]
                return DEFAULTS | {key: _checked(key, value) for key, value in settings.items()}
        except (ValueError, ConfigError) as error:
            raise ConfigError(f"{file}: {error}") from error
    return DEFAULTS


def _checked(key: str, value: Any) -> list[str]:
    if key not in DEFAULTS:
        raise ConfigError(f"no setting {key!r}; there are {', '.join(DEFAULTS)}")
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ConfigError(f"{key} must be a list of strings, got {value!r}")
    return value if key == "exclude" else codes(value)
