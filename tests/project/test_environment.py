# SPDX-License-Identifier: BSD-3-Clause
"""One table has every environment variable; nobody is sent to an index that lacks the package."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("setup.py", "csrc", "masked_loss", "tools", "benchmarks", "examples")
SUFFIXES = (".py", ".cpp", ".h", ".cu", ".cuh", ".md", ".toml", ".sh", "")
READS = re.compile(
    r"""(?:environ(?:\.get)?[\[(]\s*|getenv\(|for variable in \()"""
    r"""["']([A-Z_]+)["'](?:, ["']([A-Z_]+)["'])?"""
)
READS_OF_SCRIPTS = re.compile(r"\$\{([A-Z_]+):-")
# Set for child processes, or by what runs a script; nobody sets them for masked_loss.
FOREIGN = {"PATH", "PYTHONPATH", "HOME", "OMP_NUM_THREADS"}


def files(*names: str) -> list[Path]:
    paths = [ROOT / name for name in names]
    found = [p for path in paths for p in ([path] if path.is_file() else path.rglob("*"))]
    return [p for p in found if p.is_file() and p.suffix in SUFFIXES and ".so" not in p.name]


def test_the_table_has_every_variable() -> None:
    read = set()
    for path in files(*SOURCES):
        if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"):
            for pair in READS.findall(path.read_text(encoding="utf-8")):
                read |= {name for name in pair if name}
        elif path.suffix == ".sh":
            read |= set(READS_OF_SCRIPTS.findall(path.read_text(encoding="utf-8")))
    table = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert {"MASKED_LOSS_KEEP_MEMORY", "ATEN_CPU_CAPABILITY", "CUDA_PATH"} <= read
    assert read - FOREIGN <= listed
    assert {name for name in listed if "MASKED_LOSS" in name} <= read


def test_nothing_is_installed_from_an_index_that_lacks_it() -> None:
    """A checkout is what there is: `pip install .`, not `pip install masked_loss`."""
    advice = re.compile(r"pip[^\n`#]* install[^\n`#]*[ '\"]masked[-_]loss", re.IGNORECASE)
    assert advice.search("python -m pip install --no-binary masked_loss masked_loss")
    wrong = [
        f"{path.relative_to(ROOT)}: {found[0]}"
        for path in files(*SOURCES, "docs", "lint", "README.md", "CONTRIBUTING.md", "CHANGELOG.md")
        if (found := advice.search(path.read_text(encoding="utf-8", errors="ignore")))
    ]
    assert not wrong
