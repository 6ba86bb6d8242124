# SPDX-License-Identifier: BSD-3-Clause
"""What can be run of benchmarks/gpu*.py without a GPU: all but its clocks.

On a borrowed GPU nothing may fail after the measuring.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from masked_loss import masked_cross_entropy

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
sys.path.append(str(Path(__file__).resolve().parents[1] / "kernels"))

import gpu
import gpu_check
import gpu_counters
import gpu_peers
import gpu_report
import timing
from cuda_emulator.build import build
from cuda_emulator.operators import emulated, load
from gpu_times import patience


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_the_kernels_pass_the_check(seed: int) -> None:
    """The very lines that a first run on a GPU begins with; whatever the seed."""
    load(build())
    with emulated():
        assert gpu_check.check("cpu", tokens=16, seed=seed) == []


def test_the_check_reports_every_failure() -> None:
    calls = 0

    def wrong(logits: Tensor, target: Tensor, **options: object) -> Tensor:
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            raise RuntimeError("boom")
        return masked_cross_entropy(logits, target, **options) * (1 + 1e-3 * (calls % 2))  # type: ignore[arg-type]

    found = gpu_check.check("cpu", wrong, dtypes=[torch.float32], classes=[5, 1000], tokens=8)
    assert any("boom" in line for line in found)
    assert any("two runs differ" in line for line in found)
    assert any("times as far off as allowed" in line for line in found)
    assert all(any(f"V = {v}," in line for line in found) for v in (5, 1000))


# From the check to the last table, on the CPU.


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for results and for the files that show them; clocks that give 1 ms and so on."""
    marks = "before <!-- gpu: begin -->\nold\n<!-- gpu: end --> after\n"
    for name in ("README.md", "README.zh-CN.md", "benchmarks/README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(marks)
    monkeypatch.setattr(timing, "HERE", tmp_path / "benchmarks")
    monkeypatch.setattr(timing, "RESULTS", tmp_path / "benchmarks" / "results")
    timing.RESULTS.mkdir()
    return tmp_path


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is a CPU."""

    def clock(call: Any, *_: object) -> float:
        call()
        return 1e-3

    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "median", clock)
    monkeypatch.setattr(gpu, "host_seconds", clock)
    monkeypatch.setattr(gpu, "peak_bytes", lambda call: 1 << 20)
    monkeypatch.setattr(gpu, "l2_bytes", lambda: 1000)
    monkeypatch.setattr(gpu, "kernel_seconds", lambda call: {"rows_kernel": 5e-4})
    monkeypatch.setattr(gpu, "LINEAR", (4, 8, 12))
    monkeypatch.setattr(gpu, "limits", lambda: {"read": 3e12, "copy": 3e12})
    monkeypatch.setattr(gpu_check, "check", lambda seed: [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a CPU")


LOSSES = ("mean", "none", "statistics", "everything", "log-probs", "divergence")


def test_a_run_from_the_check_to_the_plot(
    project: Path, device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [gpu.Case(6, 40, loss=loss) for loss in LOSSES]
    cases += [gpu.Case(6, 40, masked=0.5), gpu.Case(5, 11, "float32"), gpu.Case(8192, 5)]
    monkeypatch.setattr(gpu, "CASES", cases)
    honest = gpu_peers.cross_entropies

    def peers(reduction: str, compile_too: bool) -> dict[str, Any]:
        return honest(reduction, False) | {"wrong": lambda x, t: x.sum()}

    linear = gpu_peers.linear()
    shrunk = {"wrong": sloped(linear["ours"], 0.9)}
    monkeypatch.setattr(gpu_peers, "cross_entropies", peers)
    monkeypatch.setattr(gpu_peers, "linear", lambda: linear | shrunk)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert gpu.main() == 0

    results = json.loads((timing.RESULTS / "gpu.json").read_text())
    measured = {(row["candidate"], row["loss"], row["pass"]) for row in results["rows"]}
    assert {("ours", loss, "step") for loss in LOSSES} < measured
    eager = [loss for loss in LOSSES if loss != "statistics"]
    assert {("PyTorch eager", loss, "forward") for loss in eager} < measured
    assert [row["candidate"] for row in results["linear"]][:2] == ["three products", "ours"]
    assert "wrong" not in [row["candidate"] for row in results["linear"]]
    left_out = results["left out"]
    assert sum("its loss is" in line for line in left_out) == 5  # every mean, and none
    assert sum("its dhidden is 0.1 off" in line for line in left_out) == 1
    for name in (
        "README.md",
        "README.zh-CN.md",
        "benchmarks/README.md",
        "benchmarks/results/gpu.md",
    ):
        assert "a CPU" in (project / name).read_text(), name
    assert (timing.RESULTS / "gpu.png").stat().st_size > 1000


def scaled(x: Tensor, slope: Tensor | float) -> Tensor:
    """x, and its gradient times the slope."""
    return x.detach() + (x - x.detach()) * slope


def sloped(loss: gpu_peers.Loss, slope: Tensor | float) -> gpu_peers.Loss:
    return lambda x, *args: loss(scaled(x, slope), *args)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_wrong_gradient_is_not_timed(loss: str, dtype: str, device: None) -> None:
    """Of all classes, of some of one row, or of all that are improbable; the loss is right."""
    case = gpu.Case(6, 40, dtype, loss=loss)
    p = gpu.Problem(case)
    one_row = torch.ones(6, 40, dtype=getattr(torch, dtype))
    one_row[3, 10:] = 0
    probable = (p.all[0].softmax(-1) > 0.01).to(one_row)
    for name, candidate in case.candidates(False).items():
        assert gpu.complaint(name, candidate, p) is None, name
        for slope in (1.05 if name == "ours" else 1.3, one_row, probable):
            wrong = gpu.complaint(name, sloped(candidate, slope), p)
            assert wrong is not None, name
            assert "its gradient is" in wrong


def test_a_peer_may_leave_anything_in_its_logits(
    device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where one set of them is large enough, and the next call gets the same."""
    monkeypatch.setattr(gpu, "l2_bytes", lambda: 1)
    p = gpu.Problem(gpu.Case(6, 40))
    assert len(p.all) == 1

    def peer(x: Tensor, t: Tensor) -> Tensor:
        found = masked_cross_entropy(x * 1, t)
        x.detach().zero_()
        return found

    assert gpu.complaint("peer", peer, p) is None


def test_masked_rows_have_no_gradient(device: None) -> None:
    p = gpu.Problem(gpu.Case(16, 40, masked=0.5))
    leak = (p.target == -100)[:, None] * 1e-3
    ours = gpu_peers.ours()
    assert gpu.complaint("ours", ours, p) is None
    wrong = gpu.complaint("ours", lambda x, t: ours(x, t) + (x - x.detach()).mul(leak).sum(), p)
    assert wrong is not None
    assert "its gradient is" in wrong


def test_cases_are_chosen_and_then_not_written(
    project: Path, device: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--case", "linear", "--minutes", "0"])
    assert gpu.main() == 0
    assert "of the products" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--case", "no such case"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "linear 4 x 8 x 12" in capsys.readouterr().err
    assert list(timing.RESULTS.iterdir()) == []


def test_a_peer_that_takes_too_long_is_stopped() -> None:
    benchmark = gpu.Benchmark(1.0, 1.0)
    with benchmark.attempt("slow"), patience(0.05):
        time.sleep(600)
    assert benchmark.left_out == ["slow: TimeoutError: not done after 0.05 s"]


def rows() -> list[dict[str, Any]]:
    """What a whole run measures, in made-up times: a peer takes longer, a step too."""
    found = []
    for case, what in itertools.product(gpu.CASES, ("forward", "step")):
        names = ["ours", *(() if case.loss == "statistics" else ("PyTorch eager", "Liger"))]
        for i, name in enumerate(names):
            seconds = 1e-3 * (1 + i) * (2 if what == "step" else 1) * (1 - case.masked / 2)
            row = {**vars(case), "candidate": name, "pass": what, "seconds": seconds}
            row |= {"host seconds": 4e-5, "bytes read": 1.2e9, "bytes copied": 1.2e9}
            kernels = {"rows_kernel": seconds * 0.5, "divergence_kernel": seconds / 4, "zero": 1.0}
            found.append(row | ({"kernels": kernels} if name == "ours" else {}))
    return found


ENVIRONMENT: dict[str, Any] = {
    "gpu": "NVIDIA X1",
    "driver": "580.1",
    "torch": "2.11.0",
    "cuda": "13.0",
}
ENVIRONMENT |= {"limits": {"read": 3e12, "copy": 3e12}}
ENVIRONMENT |= {"python": "3.12.3", "command": "python benchmarks/gpu.py", "date": "2026-11-26"}


def results(**others: Any) -> dict[str, Any]:
    environment = {**ENVIRONMENT, "failed checks": []}
    return {"environment": environment, "rows": rows(), "linear": [], "left out": [], **others}


def cells(text: str, begin: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {begin}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_tables_say_what_the_rows_hold() -> None:
    text = gpu_report.tables(results())
    case = "8192 x 32000 bfloat16"
    # Beside each time its share of the limit, which is 0.8 ms, then how long the peers take.
    mean = ["forward", "1 ms", "80%", "750 µs", "107%", "40 µs", "2.00", "3.00"]
    assert cells(text, f"{case} | forward") == [case, *mean]
    half = text.split("### Half")[1].split("###")[0]
    assert cells(half, f"{case} | step")[2:] == [
        *("1.5 ms", "53%", "1.13 ms", "71%", "40 µs", "0.75", "2.00", "3.00")
    ]
    others = text.split("### Other")[1]
    assert cells(others, f"{case} | statistics | forward")[-2:] == ["-", "-"]
    assert "reads 2 GiB with 3.00 TB/s and copies them with 3.00." in text
    assert "Every check passed" in text


def test_the_tables_of_less_than_a_whole_run() -> None:
    failed = {**ENVIRONMENT, "failed checks": ["one"]}
    text = gpu_report.tables(results(environment=failed, rows=[], **{"left out": ["Liger: a\nb"]}))
    assert "**1 checks failed**" in text
    assert "- Liger: a\n" in text
    untold = [{**row, "kernels": {}} for row in rows() if row["candidate"] == "ours"]
    assert cells(gpu_report.tables(results(rows=untold)), "8192 x 6400 bf")[4:6] == ["-", "-"]


def test_the_headline_is_that_of_half_types_and_8192_tokens() -> None:
    text = gpu_report.headline(results())
    assert cells(text, "8192 × 32000 | forward |")[2:] == ["80%", "2.00", "3.00"]
    assert text.count("8192 ×") == 10
    assert "前向加反向" in gpu_report.headline(results(), chinese=True)


def test_a_file_without_marks_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("no marks")
    with pytest.raises(ValueError, match="no marks"):
        gpu_report.replace_between_marks(path, "text")
    assert path.read_text() == "no marks"


# Counters


COUNTERS = Path(__file__).with_name("ncu.csv")  # of an H100


def test_counters_become_a_table() -> None:
    text = gpu_counters.table(COUNTERS.read_text().splitlines())
    forward = cells(text, "forward_kernel<BFloat16, 4>")
    assert forward[1:8] == ["8192 x 128", "174 µs", "524.4", "2.0", "3.02", "48", "60 of 62"]
    assert forward[8:] == ["29", "2", "long_scoreboard 85%, barrier 6%, wait 5%"]
    assert cells(text, "rows_kernel<BFloat16, CrossEntropy<0>, 16>")[2] == "1.58 ms"


def test_counters_in_other_units() -> None:
    text = COUNTERS.read_text().replace('"ns"', '"us"').replace("174,240", "174.24")
    assert cells(gpu_counters.table(text.splitlines()), "forward_kernel")[2] == "174 µs"


@pytest.mark.parametrize("lines", [[], ["==ERROR== no permission"], ['"a","b"', '"","s"']])
def test_what_is_no_file_of_counters_is_an_error(lines: list[str]) -> None:
    with pytest.raises(ValueError, match="expected what `ncu --csv --page raw` writes"):
        gpu_counters.table(lines)


def test_a_counter_that_was_not_asked_for_is_an_error() -> None:
    text = COUNTERS.read_text().replace("lts__t_sector_hit_rate.pct", "other")
    with pytest.raises(ValueError, match=r"no column lts__t_sector_hit_rate\.pct"):
        gpu_counters.table(text.splitlines())
