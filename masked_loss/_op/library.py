# SPDX-License-Identifier: BSD-3-Clause
"""Loads the compiled operators, masked_loss/_C.so, into torch.

The library uses the LibTorch stable ABI and no Python: one build serves every torch from 2.10 on.
What can still go wrong is said in one ImportError: what was looked for, what was found, what to do.
"""

from __future__ import annotations

import platform
import re
import sys
from pathlib import Path

import torch

OLDEST_TORCH = (2, 10)
PACKAGE = Path(__file__).resolve().parents[1]
LIBRARY = PACKAGE / ("_C.pyd" if sys.platform == "win32" else "_C.so")


def load(library: Path = LIBRARY, torch_version: str = torch.__version__) -> None:
    """Registers the operators of ``library`` as ``torch.ops.masked_loss.*``.

    Raises:
        ImportError: the library is missing, torch is too old, or the library was built for another
            platform or is damaged. The message says which, and the command that mends it.
    """
    if _release(torch_version) < OLDEST_TORCH:
        raise ImportError(
            f"masked_loss: needs torch >= {_dotted(OLDEST_TORCH)}, found torch {torch_version}.\n"
            f"Upgrade it: {sys.executable} -m pip install --upgrade torch"
        )
    if not library.is_file():
        raise ImportError(
            f"masked_loss: the compiled operators are missing.\n"
            f"Looked for: {library}\n"
            f"Found: {_found_beside(library)}\n"
            f"{_how_to_build()}"
        )
    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        raise ImportError(
            f"masked_loss: the compiled operators do not fit this machine or this torch.\n"
            f"Looked for: a library for {platform.system()} {platform.machine()}, "
            f"torch >= {_dotted(OLDEST_TORCH)} (found torch {torch_version})\n"
            f"Found: {library}, which did not load: {error.__cause__ or error}\n"
            f"{_how_to_build()}"
        ) from error


def _release(version: str) -> tuple[int, int]:
    """The first two numbers of a version such as "2.10.0a0+git1234"."""
    major, minor = re.findall(r"\d+", version)[:2]
    return int(major), int(minor)


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _found_beside(library: Path) -> str:
    others = sorted(path.name for path in library.parent.glob("_C*"))
    return ", ".join(others) if others else f"no file named _C* in {library.parent}"


def _how_to_build() -> str:
    checkout = PACKAGE.parent
    if (checkout / "setup.py").is_file() and (checkout / "csrc").is_dir():
        return (
            f"{checkout} is a source checkout. Build it (this needs a C++ compiler):\n"
            f"    {sys.executable} -m pip install --no-build-isolation -e {checkout}\n"
            "or run Python elsewhere, so that an installed masked_loss is found instead."
        )
    return (
        "Install it again for this machine, from a checkout of the sources "
        "(this needs a C++ compiler):\n"
        f"    {sys.executable} -m pip install --no-build-isolation --force-reinstall --no-deps ."
    )
