# SPDX-License-Identifier: BSD-3-Clause
"""examples/masked_loss.ipynb runs from its first cell to its last; its own assertions judge it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.slow
def test_the_notebook_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tokenizers")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.syspath_prepend(EXAMPLES)
    pyplot.switch_backend("Agg")
    cells = json.loads((EXAMPLES / "masked_loss.ipynb").read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    shown = []
    monkeypatch.setattr(pyplot, "show", lambda: shown.append(pyplot.gcf()))
    namespace: dict[str, Any] = {}
    for number, source in enumerate(sources, 1):
        exec(compile(source, f"masked_loss.ipynb, code cell {number}", "exec"), namespace)
    assert len(shown) == sum(source.count("plt.show()") for source in sources) > 0
    pyplot.close("all")
