# SPDX-License-Identifier: BSD-3-Clause
"""Which rules and files: from [tool.masked-loss-lint] of pyproject.toml and the command line."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from masked_loss_lint.rules import RULES

tomllib: Any = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
_KEYS = ("select", "ignore", "exclude")


class ConfigError(Exception):
    """A setting that means nothing; the text says which."""


@dataclass(frozen=True)
class Config:
    select: tuple[str, ...] = tuple(RULES)
    ignore: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    @property
    def codes(self) -> list[str]:
        return [code for code in self.select if code not in self.ignore]


def codes(parts: Iterable[str]) -> tuple[str, ...]:
    """Rule codes; a prefix such as ML stands for all it begins. Raises ConfigError."""
    found: list[str] = []
    for part in parts:
        matching = [code for code in RULES if part and code.startswith(part.upper())]
        if not matching:
            raise ConfigError(f"no rule {part!r}; there are {', '.join(RULES)}")
        found += matching
    return tuple(dict.fromkeys(found))


def read_config(paths: Iterable[Path]) -> Config:
    """The settings of the nearest pyproject.toml above the first path that has any."""
    first = next(iter(paths)).absolute()
    for folder in (first, *first.parents):
        file = folder / "pyproject.toml"
        if not file.is_file():
            continue
        try:
            table = tomllib.loads(file.read_text(encoding="utf-8")).get("tool", {})
        except ValueError as error:
            raise ConfigError(f"{file}: {error}") from error
        if "masked-loss-lint" in table:
            return _checked(table["masked-loss-lint"], file)
    return Config()


def _checked(table: dict[str, Any], file: Path) -> Config:
    for key, value in table.items():
        if key not in _KEYS:
            raise ConfigError(f"{file}: no setting {key!r}; there are {', '.join(_KEYS)}")
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ConfigError(f"{file}: {key} must be a list of strings, got {value!r}")
    try:
        return Config(
            codes(table.get("select", RULES)),
            codes(table.get("ignore", ())),
            tuple(table.get("exclude", ())),
        )
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
