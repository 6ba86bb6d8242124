# SPDX-License-Identifier: BSD-3-Clause
"""examples/parallel.py does what it says, started as it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from rank_cases import needs_gloo

ROOT = Path(__file__).parents[2]


@needs_gloo
def test_the_losses_of_four_ranks_are_those_of_one_process() -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4",
        "examples/parallel.py", "--steps", "3",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    largest = re.search(r"largest difference: (\S+)", run.stdout)
    assert largest is not None, run.stdout
    assert float(largest[1]) < 1e-12
    assert len(re.findall(r"^ *\d \d*", run.stdout, re.MULTILINE)) == 3
